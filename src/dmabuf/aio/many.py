"""dmabuf.aio.read_files and write_files: many files at once, as tasks of the event loop."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence

import anyio

from dmabuf.aio.engine import loop_engine
from dmabuf.aio.file import open as open_file
from dmabuf.aio.waiter import Loop
from dmabuf.copying import (
    AnyFileRange,
    Outcome,
    Range,
    check_paths_differ,
    check_ranges,
    check_replaceable,
    named,
    replacement,
)
from dmabuf.memory import Buffer
from dmabuf.transfer import Terms, Transfer

DEPTH = 32
"""Files in flight, unless the caller asks for another number."""


async def read_files(
    files: Iterable[AnyFileRange],
    buffer: Buffer,
    *,
    terms: Terms | None = None,
    queue_depth: int = DEPTH,
) -> list[Outcome]:
    """Read a range of each of many files into a buffer; see `dmabuf.read_files`.

    Cancelling it cancels the transfers in flight, and returns when the devices have finished with
    the buffer's memory.
    """
    terms = terms or Terms()

    async def read(one: Range) -> Transfer:
        async with await open_file(one.path) as file:
            return await file.read_into(
                buffer,
                one.size,
                file_offset=one.file_offset,
                buffer_offset=one.buffer_offset,
                terms=terms,
            )

    return await _run(check_ranges(files, buffer), queue_depth, read)


async def write_files(
    files: Iterable[AnyFileRange],
    buffer: Buffer,
    *,
    terms: Terms | None = None,
    queue_depth: int = DEPTH,
) -> list[Outcome]:
    """Write ranges of a buffer to many files, each whole or not; see `dmabuf.write_files`.

    Cancelling it cancels the transfers in flight, and returns when the devices have finished with
    the buffer's memory. A file that was not complete by then is as it was before.
    """
    terms = terms or Terms()
    ranges = check_ranges(files, buffer)
    check_paths_differ(ranges)
    loop = Loop(await loop_engine())

    async def write(one: Range) -> Transfer:
        with replacement(one.path) as place:
            check_replaceable(place, one.path)
            async with await open_file(place.temporary, "w") as file:
                transfer = await file.write_from(
                    buffer,
                    one.size,
                    file_offset=one.file_offset,
                    buffer_offset=one.buffer_offset,
                    terms=terms,
                )
            await loop.call(lambda: place.commit(None, sync=terms.sync))
            return transfer

    return await _run(ranges, queue_depth, write)


async def _run(
    ranges: Sequence[Range], queue_depth: int, move: Callable[[Range], Awaitable[Transfer]]
) -> list[Outcome]:
    """Move every range, `queue_depth` files at once, and return what became of each."""
    if not 1 <= queue_depth <= 4096:
        raise ValueError(f"invalid queue_depth={queue_depth}: use a number from 1 to 4096")
    outcomes: list[Outcome | None] = [None] * len(ranges)
    left = iter(enumerate(ranges))

    async def work() -> None:
        for index, one in left:
            try:
                outcomes[index] = await move(one)
            except OSError as error:
                outcomes[index] = named(error, one.path)

    async with anyio.create_task_group() as tasks:
        for _ in range(min(queue_depth, len(ranges))):
            tasks.start_soon(work)
    return outcomes  # type: ignore[return-value] # each was set
