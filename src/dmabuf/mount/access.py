"""CPU access to a Buffer for a FUSE server that must not block."""

from __future__ import annotations

import errno
import os
from typing import Literal

import trio

from dmabuf.memory import Buffer

FENCE_SECONDS = 10.0
"""How long a request waits for the devices that use the memory before it fails with ETIMEDOUT."""

_ZEROS = bytes(1 << 20)


async def wait_for_devices(buffer: Buffer, direction: Literal["read", "write"], name: str) -> None:
    """Wait until the fences of a buffer allow the CPU to read it, or to write it.

    Other requests are served meanwhile. Raises OSError(ETIMEDOUT) after FENCE_SECONDS.
    """
    if not buffer.is_dmabuf:
        return
    try:
        buffer.wait(direction, 0)
        return
    except TimeoutError:
        pass
    # A dma-buf polls readable when its writers are done, writable when all users are.
    wait = trio.lowlevel.wait_readable if direction == "read" else trio.lowlevel.wait_writable
    with trio.move_on_after(FENCE_SECONDS) as scope:
        for slab in buffer.slabs:
            own = os.dup(slab.fd)
            try:
                await wait(own)
            finally:
                os.close(own)
    if scope.cancelled_caught:
        text = f"a device still uses the memory after {FENCE_SECONDS:.0f} s"
        raise OSError(errno.ETIMEDOUT, text, name)


def zero(buffer: Buffer, start: int, end: int) -> None:
    """Zero bytes ``[start, end)`` of a buffer."""
    while start < end:
        size = min(end - start, len(_ZEROS))
        buffer.pwrite(memoryview(_ZEROS)[:size], start)
        start += size
