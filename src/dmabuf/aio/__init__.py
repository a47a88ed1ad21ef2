"""Transfers in an event loop of asyncio or trio: `pip install dmabuf[aio]`.

`File` mirrors `dmabuf.File`: the same verbs, keywords, records and errors, awaited. What may enter
this room is how a transfer waits in an event loop, and nothing about what a transfer is.

Each event loop has an engine of its own: one io_uring ring, whose completions wake the loop through
an eventfd. Any number of transfers can be in flight, and none has a thread. Calls on which the
kernel cannot be polled (allocating a file's blocks, flushing to the medium) run in threads, and so
do a whole `copy`, `read_files` and `write_files`.

Cancelling a transfer, closing its File and throwing its coroutine away cancel its requests. The
transfer ends when the device has finished with the buffer's memory, and the buffer stays open until
then. A coroutine that was never awaited has started nothing. The engine ends with its loop.

Memory is not registered with the ring, because pinning a large buffer would block the loop.
"""

try:
    import anyio as _anyio  # noqa: F401 - names what is missing
except ImportError as error:
    raise ImportError(f"dmabuf.aio needs anyio ({error}): pip install dmabuf[aio]") from error

from dmabuf.aio.file import File, open, wait  # noqa: A004 - as dmabuf.open
from dmabuf.aio.threads import call, copy, read_files, write_files
from dmabuf.aio.waiter import ready

__all__ = ["File", "call", "copy", "open", "read_files", "ready", "wait", "write_files"]
