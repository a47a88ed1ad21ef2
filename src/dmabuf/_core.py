"""The C core: the only importer of the compiled extension, and the only place where it raises."""

from __future__ import annotations

import os

from dmabuf.errors import os_error

try:
    from dmabuf._ext import ffi, lib
except ImportError as error:
    if error.name == "dmabuf._ext":
        why = "the C core is not built: run `pip install .` in the checkout"
    elif "subinterpreters" in str(error):  # what CPython 3.12 and later raise in an isolated one
        why = "cffi does not work in an isolated subinterpreter: use a process or the main one"
    else:
        why = f"the C core cannot be loaded: {error}"
    raise ImportError(f"import dmabuf: {why}", name=error.name) from error

TYPE_CHECKING = False  # typing's own: `import dmabuf` comes here, and must stay quick
if TYPE_CHECKING:
    import mmap

__all__ = ["address_of", "check", "failure", "ffi", "lib"]


def check(rc: int, what: str, path: str | None = None) -> int:
    """Return a count from the core, or raise the OSError that a negative one stands for.

    Args:
        rc: what a function of the core returned: 0, a count, or -errno.
        what: what was attempted, and what is likely the cause.
        path: the file it was attempted on.
    """
    if rc >= 0:
        return rc
    raise failure(-rc, what, path)


def failure(errno: int, what: str, path: str | None = None) -> OSError:
    """The OSError for an errno, with what was attempted before the kernel's own word for it."""
    return os_error(errno, f"{what}: {os.strerror(errno)}", path)


def address_of(memory: mmap.mmap | bytearray | memoryview) -> int:
    """Return the address of the first byte of contiguous memory, valid while that exists."""
    pointer = ffi.from_buffer(memory)
    try:
        return int(ffi.cast("uintptr_t", pointer))
    finally:
        ffi.release(pointer)
