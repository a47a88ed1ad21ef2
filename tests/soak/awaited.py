"""The soak's awaited transfers: many at once in one event loop, some of them cancelled."""

import os
from typing import TYPE_CHECKING

import anyio

from dmabuf import aio
from tests.soak.world import LIMIT, noise

if TYPE_CHECKING:
    from tests.soak.work import Soak
    from tests.soak.world import Memory, Target

PIECE = 16 << 10


def at_once(soak: "Soak", backend: str) -> int:
    """Run up to 64 transfers twice, each with its own part of a target and of a memory."""
    memory = max(soak.memories, key=lambda memory: memory.size)
    target = soak.dice.choice(soak.targets)
    if target.grows and len(target.model) < LIMIT:
        target.put(bytes(LIMIT - len(target.model)), len(target.model))
        os.ftruncate(target.fd, LIMIT)
    return anyio.run(_at_once, soak, target, memory, backend=backend)


async def _at_once(soak: "Soak", target: "Target", memory: "Memory") -> int:
    dice = soak.dice
    count = min(memory.size // PIECE, LIMIT // PIECE, 64)
    if not count:
        return 0
    spots = dice.sample(range(LIMIT // PIECE), count)
    memory.put(noise(dice, memory.size), 0)
    file = await aio.open(target.path, "r+")

    async def read(offset: int, start: int) -> None:
        where = {"file_offset": offset, "buffer_offset": start}
        soak.count_route(await file.read_into(memory.buffer, PIECE, **where), awaited=True)
        memory.model[start : start + PIECE] = target.model[offset : offset + PIECE]

    async def write(offset: int, start: int) -> None:
        where = {"file_offset": offset, "buffer_offset": start}
        soak.count_route(await file.write_from(memory.buffer, PIECE, **where), awaited=True)
        target.put(memory.model[start : start + PIECE], offset)

    async def never() -> None:
        """Read from an empty pipe until it is cancelled."""
        ends = os.pipe()
        try:
            async with await aio.open(ends[0]) as pipe:
                with anyio.CancelScope() as scope:
                    async with anyio.create_task_group() as inner:
                        inner.start_soon(pipe.read_into, memory.buffer, 1)
                        await anyio.sleep(0)
                        scope.cancel()
        finally:
            for end in ends:
                os.close(end)

    for _ in range(2):  # by lanes once the first have found out what there is to know
        async with anyio.create_task_group() as group:
            for number, at in enumerate(spots):
                group.start_soon(dice.choice([read, write]), at * PIECE, number * PIECE)
            group.start_soon(never)
    await file.aclose()
    target.check("many at once")
    memory.check("many at once")
    return 2 * (count + 1)
