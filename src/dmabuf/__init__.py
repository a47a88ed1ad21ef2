"""Files into dma-bufs and back: shared device memory, read and written as files are.

    >>> import dmabuf
    >>> buf = dmabuf.allocate("1MiB")
    >>> with dmabuf.open("/etc/hostname") as f:
    ...     transfer = f.read_into(buf)

A `Buffer` is memory that devices can share, and a file object. A `File`, made by `dmabuf.open`, is
what lies on the other side. Every transfer returns a `Transfer`, which reports the route of the
bytes and the reason.
"""

from dmabuf import _core as _core  # a core that is not built is an ImportError here already
from dmabuf.errors import (
    BusyError,
    ClosedError,
    IntegrityError,
    RouteUnavailable,
    ShortReadError,
    TransferError,
)

__version__ = "0.1.0"

TYPE_CHECKING = False  # typing's own, without what importing typing costs
if TYPE_CHECKING:
    from dmabuf.copying import Copy, CopySide, FileRange, copy, read_files, write_files
    from dmabuf.devices.block import BlockDevice, as_block_device
    from dmabuf.memory import (
        Buffer,
        BufferFile,
        Slab,
        Window,
        allocate,
        as_file,
        from_dlpack,
        from_fd,
    )
    from dmabuf.transfer import (
        Engine,
        File,
        Plan,
        Route,
        Terms,
        Transfer,
        open,  # noqa: A004 - dmabuf.open is the API
    )

__all__ = [
    "BlockDevice",
    "Buffer",
    "BufferFile",
    "BusyError",
    "ClosedError",
    "Copy",
    "CopySide",
    "Engine",
    "File",
    "FileRange",
    "IntegrityError",
    "Plan",
    "Route",
    "RouteUnavailable",
    "ShortReadError",
    "Slab",
    "Terms",
    "Transfer",
    "TransferError",
    "Window",
    "allocate",
    "as_block_device",
    "as_file",
    "copy",
    "from_dlpack",
    "from_fd",
    "open",
    "read_files",
    "write_files",
]

if not TYPE_CHECKING:
    _ROOMS = {
        "copying": ("Copy", "CopySide", "FileRange", "copy", "read_files", "write_files"),
        "memory": (
            "Buffer",
            "BufferFile",
            "Slab",
            "Window",
            "allocate",
            "as_file",
            "from_dlpack",
            "from_fd",
        ),
        "devices.block": ("BlockDevice", "as_block_device"),
        "transfer": ("Engine", "File", "Plan", "Route", "Terms", "Transfer", "open"),
    }

    def __getattr__(name):
        """Return a public name, loading its room when it is first used (PEP 562)."""
        for room, names in _ROOMS.items():
            if name in names:
                from importlib import import_module

                value = getattr(import_module(f"{__name__}.{room}"), name)
                globals()[name] = value
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__all__})
