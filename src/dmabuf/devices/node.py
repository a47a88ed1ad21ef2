"""Device nodes: open one, and issue ioctls, with errors that state what to do."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping

from dmabuf.errors import os_error
from dmabuf.kernel import uapi

__all__ = ["call", "failure", "open_node"]

Fixes = Mapping[int, str]
"""The cause and the fix of an error, by errno."""


def open_node(path: str, flags: int, major: int, kind: str, examples: str, group: str) -> int:
    """Open a character device, close-on-exec and for reading and writing.

    Args:
        path: the node.
        flags: more flags for open(2).
        major: the major number that all nodes of this kind have.
        kind: what it is, in errors, such as "DRM".
        examples: where nodes of this kind are.
        group: the groups that usually own them.

    Raises:
        OSError: ENODEV where it is another kind of file; what open(2) raises.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISCHR(status.st_mode) or os.major(status.st_rdev) != major:
            raise os_error(errno.ENODEV, f"not a {kind} device: use {examples}", path)
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | flags)
    except OSError as error:
        fixes = {
            errno.ENOENT: f"no such {kind} device: use {examples}",
            errno.ENXIO: f"no such {kind} device: its driver is not loaded",
            errno.EACCES: f"permission denied: join its group, often {group}, or be root",
            errno.EBUSY: "another program is using it",
        }
        if error.errno in fixes:
            raise os_error(error.errno, fixes[error.errno], path) from None
        raise


def call(
    fd: int, request: int, argument: object, what: str, path: str, fixes: Fixes | None = None
) -> int:
    """Issue an ioctl, again while a signal interrupts it, and return its result.

    Raises:
        OSError: as the kernel's, with ``what`` was attempted, the cause and the fix.
    """
    while True:
        try:
            result = uapi.ioctl(fd, request, argument)  # type: ignore[call-overload]
            return result if isinstance(result, int) else 0  # `bytes` are returned as they are
        except InterruptedError:
            continue
        except BlockingIOError:
            raise
        except OSError as error:
            raise failure(error, what, path, fixes) from None


def failure(error: OSError, what: str, path: str, fixes: Fixes | None = None) -> OSError:
    """Return an OSError of the same errno: ``what`` was attempted, the cause and the fix."""
    number = error.errno or errno.EIO
    known = {errno.EBUSY: "another program is using it", errno.ENODEV: "the device is gone"}
    cause = (known | dict(fixes or {})).get(number, os.strerror(number))
    return os_error(number, f"{what}: {cause}", path)
