"""The exceptions of dmabuf.

What the kernel refuses is a plain ``OSError`` with errno, a sentence and the path, so Python
picks ``PermissionError`` and its kin by itself, and a bad range is a plain ``ValueError``. A class
of our own exists only for what an errno cannot say, and each inherits the nearest builtin::

    OSError
     ├── RouteUnavailable   the route that require= or route= asks for is not to be had (EOPNOTSUPP)
     └── IntegrityError     bytes read back differ from the bytes written (EIO)
    BufferError
     └── BusyError          a buffer that a transfer or a device uses cannot be closed
    ValueError
     └── ClosedError        use of a buffer, window, file or engine after close()
    EOFError
     └── ShortReadError     a file ended inside what had to be read whole

All of them can be pickled, so they cross process pools.
"""

from __future__ import annotations

import errno
import os

TYPE_CHECKING = False  # typing's own: `import dmabuf` comes here, and is to stay quick
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, NoReturn

__all__ = ["BusyError", "ClosedError", "IntegrityError", "RouteUnavailable", "ShortReadError"]

_Path = str | bytes | int | None


class Uncopyable:
    """A base of classes that own a descriptor or memory: a copy would close the original's.

    So copy.copy(), copy.deepcopy() and pickle raise TypeError, which states what to do instead.
    """

    __slots__ = ()
    _instead: str

    def __init_subclass__(cls, *, instead: str | None = None) -> None:
        super().__init_subclass__()
        if instead is not None:
            cls._instead = instead

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        name = type(self).__name__
        raise TypeError(f"a {name} cannot be copied or pickled: {self._instead}")


class RouteUnavailable(OSError):
    """The route that ``require=`` or ``route=`` asks for is not to be had; errno is EOPNOTSUPP.

    ``reason`` (also ``strerror``) is a sentence with the cause and, where there is one, the fix;
    ``filename`` the file's path; ``route`` and ``plan`` are what was asked for and what there is
    instead, or None.
    """

    def __init__(
        self, reason: str, path: _Path = None, *, route: object = None, plan: object = None
    ) -> None:
        super().__init__(errno.EOPNOTSUPP, reason, path)
        self.reason = reason
        self.route = route
        self.plan = plan

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.strerror, self.filename), self.__dict__


class IntegrityError(OSError):
    """Bytes read back differ from the bytes written; errno is EIO.

    ``offset`` is the file offset, in bytes, of the first difference, or None if it is not known;
    ``counts`` the bytes that are wrong by kind ("unchanged poison", "stale", "zeros", "foreign",
    "shifted"), where that was looked into; ``nbytes`` how many are right before the first.
    """

    nbytes = 0

    def __init__(
        self,
        message: str,
        path: _Path = None,
        *,
        offset: int | None = None,
        counts: Mapping[Any, int] | None = None,
    ) -> None:
        super().__init__(errno.EIO, message, path)
        self.offset = offset
        self.counts: dict[str, int] = {str(kind): count for kind, count in (counts or {}).items()}

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.strerror, self.filename), self.__dict__


class BusyError(BufferError):
    """A buffer that a running transfer or a device uses cannot be closed; nothing has changed."""


class ClosedError(ValueError):
    """Use of a buffer, window, file or engine after it was closed."""


class ShortReadError(EOFError):
    """A file ended inside what had to be read whole.

    ``index`` is the first segment that came up short (None where there are no segments), and
    ``nbytes`` the number of bytes that did arrive, without a gap, from the first segment's start.
    """

    def __init__(self, message: str, index: int | None = None, nbytes: int = 0) -> None:
        super().__init__(message, index, nbytes)
        self.index = index
        self.nbytes = nbytes

    def __str__(self) -> str:
        return str(self.args[0])


def os_error(number: int, text: str, path: _Path | os.PathLike[str] = None) -> OSError:
    """The OSError for an errno: ``text`` says what was attempted, with the cause and the fix."""
    return OSError(number, text, os.fspath(path) if isinstance(path, os.PathLike) else path)
