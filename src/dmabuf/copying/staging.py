"""Any memory as the end of a transfer: in a Buffer directly, everywhere else through blocks."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from dmabuf._core import address_of
from dmabuf.copying.blocks import check_block_size
from dmabuf.errors import ClosedError, RouteUnavailable
from dmabuf.memory import Buffer, allocate, find_buffer
from dmabuf.transfer import File, Terms


class Staging:
    """Blocks between Files and memory that lies in no Buffer.

    Memory that lies in a Buffer of this process, such as that of `Buffer.asarray`, is read and
    written there, by the best route. For all other memory the file is moved into and out of a
    block, and the CPU copies between the block and the memory: no device touches that memory.

    Thread-safe: each call has a block of its own. Blocks are kept for the next call until `close`.
    """

    def __init__(self, block_size: int | str = "8MiB") -> None:
        self._size = check_block_size(block_size)
        self._lock = threading.Lock()
        self._idle: list[Buffer] = []
        self._closed = False

    def read(
        self, file: File, memory: memoryview, file_offset: int, terms: Terms | None = None
    ) -> int:
        """Read from an offset of the file into all of `memory`, and return how many bytes came.

        They are fewer where the file ends before. `memory` is writable and flat bytes.

        Raises:
            OSError, ValueError: as `File.read_into`. RouteUnavailable also if `terms` require
                zero-copy and the memory is in no Buffer.
        """
        terms = terms or Terms()
        place = _place(file, memory, terms)
        if place is not None:
            buffer, start = place
            return file.read_into(
                buffer, len(memory), file_offset=file_offset, buffer_offset=start, terms=terms
            ).nbytes
        done = 0
        with self._block() as block:
            while done < len(memory):
                start, size = _piece(file_offset + done, len(memory) - done, block)
                got = file.read_into(
                    block, size, file_offset=file_offset + done, buffer_offset=start, terms=terms
                ).nbytes
                with block.map("r", start, got) as view:
                    memory[done : done + got] = view
                done += got
                if got < size:
                    break
        return done

    def write(
        self, file: File, memory: memoryview, file_offset: int, terms: Terms | None = None
    ) -> int:
        """Write all of `memory`, flat bytes, to an offset of the file, and return its size.

        Raises what `File.write_from` raises, and RouteUnavailable as `read` does.
        """
        terms = terms or Terms()
        place = _place(file, memory, terms)
        if place is not None:
            buffer, start = place
            return file.write_from(
                buffer, len(memory), file_offset=file_offset, buffer_offset=start, terms=terms
            ).nbytes
        done = 0
        with self._block() as block:
            while done < len(memory):
                start, size = _piece(file_offset + done, len(memory) - done, block)
                with block.map("w", start, size) as view:
                    view[:] = memory[done : done + size]
                file.write_from(
                    block, size, file_offset=file_offset + done, buffer_offset=start, terms=terms
                )
                done += size
        return done

    @contextmanager
    def _block(self) -> Iterator[Buffer]:
        with self._lock:
            if self._closed:
                raise ClosedError("these staging blocks are closed")
            block = self._idle.pop() if self._idle else None
        if block is None:
            block = allocate(self._size, name="dmabuf staging")
            block.closes_unasked = True
        try:
            yield block
        finally:
            with self._lock:
                keep = not self._closed
                if keep:
                    self._idle.append(block)
            if not keep:
                block.close()

    def close(self) -> None:
        """Release the blocks; one that a call uses, when the call ends."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for block in idle:
            block.close()


def _place(file: File, memory: memoryview, terms: Terms) -> tuple[Buffer, int] | None:
    """Return the Buffer that memory lies in, and where; None if it lies in none."""
    found = find_buffer(address_of(memory), len(memory)) if len(memory) else None
    if found is None and len(memory) and terms.require == "zero-copy":
        text = "the memory is in no Buffer, so the CPU copies; use memory of dmabuf.allocate()"
        raise RouteUnavailable(text, file.target.path)
    return found


def _piece(file_offset: int, left: int, block: Buffer) -> tuple[int, int]:
    """Return the offset in a block that agrees with the file's modulo a page, and a size."""
    start = file_offset % mmap.PAGESIZE
    return start, min(left, block.size - start)
