"""The only importer of the compiled core."""

import os

from dmabuf.errors import os_error

try:
    from dmabuf._core import ffi, lib
except ImportError as error:  # a checkout that was never built
    raise ImportError(
        f"dmabuf's C core is not built ({error}): run `pip install .` in the checkout"
    ) from error

__all__ = ["check", "failure", "ffi", "lib"]


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
