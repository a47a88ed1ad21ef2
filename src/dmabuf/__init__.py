"""Files into dma-bufs and back: shared device memory, read and written as files are.

    >>> import dmabuf
    >>> buf = dmabuf.allocate("1MiB")
    >>> with dmabuf.open("/etc/hostname") as f:
    ...     transfer = f.read_into(buf)

A `Buffer` is memory that devices can share, and a file object. A `File`, made by `dmabuf.open`, is
what lies on the other side. Every transfer returns a `Transfer`, which tells the route the bytes
took and why.
"""

import os
from _thread import RLock  # threading's own, without what importing threading costs

from dmabuf import _ffi as _ffi  # a core that is not built is an ImportError here already
from dmabuf.errors import (
    BusyError,
    ClosedError,
    IntegrityError,
    RouteUnavailable,
    ShortReadError,
)

TYPE_CHECKING = False  # typing's own, without what importing typing costs
if TYPE_CHECKING:
    from dmabuf._as_file import BufferFile, as_file
    from dmabuf.buffer import Buffer, Slab
    from dmabuf.engine import Engine, Transfer
    from dmabuf.exporters import allocate, from_dlpack, from_fd
    from dmabuf.file import File, open  # noqa: A004 - dmabuf.open is the API
    from dmabuf.pipeline import Copy, copy
    from dmabuf.route import Plan, Route

__all__ = [
    "Buffer",
    "BufferFile",
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
    "as_file",
    "copy",
    "from_dlpack",
    "from_fd",
    "open",
]

if not TYPE_CHECKING:
    _HOMES = {
        "Buffer": "buffer",
        "BufferFile": "_as_file",
        "Copy": "pipeline",
        "Engine": "engine",
        "File": "file",
        "Plan": "route",
        "Route": "route",
        "Slab": "buffer",
        "Transfer": "engine",
        "allocate": "exporters",
        "as_file": "_as_file",
        "copy": "pipeline",
        "from_dlpack": "exporters",
        "from_fd": "exporters",
        "open": "file",
    }

    # A fork waits for a name that another thread is loading: its child could never load it.
    _loading = RLock()
    os.register_at_fork(
        before=_loading.acquire,
        after_in_parent=_loading.release,
        after_in_child=_loading.release,
    )

    def __getattr__(name):
        """A public name, loaded when it is first asked for (PEP 562)."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        with _loading:
            from importlib import import_module

            value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *__all__})
