"""The exceptions of dmabuf.

An error of the kernel is a plain ``OSError`` with errno, a sentence and the path, so Python picks
``PermissionError`` and the like by itself. A bad range is a plain ``ValueError``. A class of this
package exists only where an errno does not suffice, and inherits the nearest builtin::

    OSError
     ├── RouteUnavailable   the route that require= or route= asks for is impossible (EOPNOTSUPP)
     ├── TransferError      a transfer failed under way; carries nbytes and file_offset
     └── IntegrityError     bytes read back differ from the bytes written (EIO)
    BufferError
     └── BusyError          a buffer that a transfer or a device uses cannot be closed
    ValueError
     └── ClosedError        use of a buffer, window, file or engine after close()
    EOFError
     └── ShortReadError     a file ended within a range that must be read whole

All of them can be pickled, so they cross process pools.
"""

from __future__ import annotations

import errno
import os
import sys

TYPE_CHECKING = False  # typing's own: `import dmabuf` loads this module, and must stay fast
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

__all__ = [
    "BusyError",
    "ClosedError",
    "IntegrityError",
    "RouteUnavailable",
    "ShortReadError",
    "TransferError",
]

_Path = str | bytes | int | None


class Uncopyable:
    """A base of classes that own a descriptor or memory: a copy would close the original's.

    So copy.copy(), copy.deepcopy() and pickle raise TypeError, which states what to do instead.
    multiprocessing sends objects of the classes in `SENDERS` to another process.
    """

    __slots__ = ()
    _instead: str

    def __init_subclass__(cls, *, instead: str | None = None) -> None:
        super().__init_subclass__()
        if instead is not None:
            cls._instead = instead

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        context = sys.modules.get("multiprocessing.context")
        send = SENDERS.get(type(self))
        if send is not None and context is not None and context.get_spawning_popen() is not None:
            return send(self)  # an argument of a process that is being started
        name = type(self).__name__
        raise TypeError(f"a {name} cannot be copied or pickled: {self._instead}")


SENDERS: dict[type, Callable[[Any], tuple[object, ...]]] = {}
"""How multiprocessing sends objects of a class: functions that return what __reduce__ does."""


def enable_sending() -> None:
    """Have the queues and pipes of multiprocessing use `SENDERS`, if that is imported by now.

    Constructors call this: only who has multiprocessing pays for it.
    """
    reduction = sys.modules.get("multiprocessing.reduction")
    pickler = getattr(reduction, "ForkingPickler", None)  # none while another thread imports it
    if pickler is not None:
        for sent, send in SENDERS.items():
            pickler.register(sent, send)


class RouteUnavailable(OSError):
    """The route that ``require=`` or ``route=`` names is not possible; errno is EOPNOTSUPP.

    ``reason`` (also ``strerror``) is a sentence with the cause and, if there is one, the fix;
    ``filename`` is the file's path; ``route`` the requested route and ``plan`` the possible one, or
    None.
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


class TransferError(OSError):
    """A transfer that failed under way. ``errno``, ``strerror`` and ``filename`` have the cause.

    ``nbytes`` is how many bytes were moved before it without a gap; ``file_offset`` the offset of
    the first byte in the file that could not be moved, or None if it is not known. Where Python has
    a class for the errno, such as BrokenPipeError, the exception is also one of that class.
    """

    def __new__(cls, number: int, *args: object, **kwargs: object) -> TransferError:
        """Return an exception that is also of Python's class for the errno."""
        builtin = type(OSError(number, ""))
        if cls is TransferError and builtin is not OSError:
            if builtin not in _BOTH:
                _BOTH[builtin] = type("TransferError", (TransferError, builtin), {})
            cls = _BOTH[builtin]
        return super().__new__(cls, number, *args)

    def __init__(
        self,
        number: int,
        message: str,
        path: _Path = None,
        *,
        nbytes: int = 0,
        file_offset: int | None = None,
    ) -> None:
        super().__init__(number, message, path)
        self.nbytes = nbytes
        self.file_offset = file_offset

    def __reduce__(self) -> tuple[object, ...]:
        return TransferError, (self.errno, self.strerror, self.filename), self.__dict__


_BOTH: dict[type[OSError], type[TransferError]] = {}


class IntegrityError(OSError):
    """Bytes read back differ from the bytes written; errno is EIO.

    ``offset`` is the file offset, in bytes, of the first difference, or None if it is not known;
    ``counts`` the wrong bytes by kind ("unchanged", "partial", "stale", "zeros", "shifted",
    "misdirected", "foreign"), if they were counted; ``nbytes`` the number of right bytes before the
    first, as far as they were compared. ``report`` is text for the author of a driver: kernel,
    device, exporter, route, range, and where which bytes are wrong.
    """

    nbytes = 0

    def __init__(
        self,
        message: str,
        path: _Path = None,
        *,
        offset: int | None = None,
        counts: Mapping[str, int] | None = None,
        report: str = "",
    ) -> None:
        super().__init__(errno.EIO, message, path)
        self.offset = offset
        self.counts = dict(counts or {})
        self.report = report

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.strerror, self.filename), self.__dict__


class BusyError(BufferError):
    """A buffer that a running transfer or a device uses cannot be closed; it stays as it was."""


class ClosedError(ValueError):
    """Use of a buffer, window, file or engine after it was closed."""


class ShortReadError(EOFError):
    """A file ended within a range that must be read whole.

    ``index`` is the first short segment (None if there are no segments), and ``nbytes`` the number
    of bytes that arrived, without a gap, from the first segment's start.
    """

    def __init__(self, message: str, index: int | None = None, nbytes: int = 0) -> None:
        super().__init__(message, index, nbytes)
        self.index = index
        self.nbytes = nbytes

    def __str__(self) -> str:
        return str(self.args[0])


def os_error(number: int, text: str, path: _Path | os.PathLike[str] = None) -> OSError:
    """Return the OSError for an errno; ``text`` is what was attempted, the cause and the fix."""
    return OSError(number, text, os.fspath(path) if isinstance(path, os.PathLike) else path)
