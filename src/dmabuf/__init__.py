"""Files into dma-bufs and back: shared device memory, read and written as files are.

    >>> import dmabuf
    >>> buf = dmabuf.allocate("1MiB")
    >>> with dmabuf.open("/etc/hostname") as f:
    ...     transfer = f.read_into(buf)

A `Buffer` is memory that devices can share, and a file object. A `File`, made by `dmabuf.open`, is
what lies on the other side. Every transfer returns a `Transfer`, which tells the route the bytes
took and why.
"""

from dmabuf.buffer import Buffer, Slab
from dmabuf.engine import Engine, Transfer
from dmabuf.errors import (
    BusyError,
    ClosedError,
    IntegrityError,
    RouteUnavailable,
    ShortReadError,
)
from dmabuf.exporters import allocate, from_fd
from dmabuf.file import File, open  # noqa: A004 - dmabuf.open is the API
from dmabuf.pipeline import Copy, copy
from dmabuf.route import Plan, Route

__all__ = [
    "Buffer",
    "BusyError",
    "ClosedError",
    "Copy",
    "Engine",
    "File",
    "IntegrityError",
    "Plan",
    "Route",
    "RouteUnavailable",
    "ShortReadError",
    "Slab",
    "Transfer",
    "allocate",
    "copy",
    "from_fd",
    "open",
]
