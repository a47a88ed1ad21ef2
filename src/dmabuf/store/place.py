"""Where the store listens: its path, and the socket there, which only one server has."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_PATH_BYTES = 107  # sockaddr_un has room for these and a zero
_BACKLOG = 128
_FIRST_OF_SYSTEMD = 3  # SD_LISTEN_FDS_START
_SO_PASSRIGHTS = 83


def default_path() -> str:
    """``$XDG_RUNTIME_DIR/dmabuf.sock``, and for root ``/run/dmabuf.sock``.

    Raises OSError(ENOENT) for a user without XDG_RUNTIME_DIR.
    """
    if os.geteuid() == 0:
        return "/run/dmabuf.sock"
    folder = os.environ.get("XDG_RUNTIME_DIR")
    if not folder:
        text = "XDG_RUNTIME_DIR is not set: say where the store's socket is (--socket PATH)"
        raise OSError(errno.ENOENT, text)
    return os.path.join(folder, "dmabuf.sock")


def check_path(path: str) -> None:
    """Raises OSError(ENAMETOOLONG) for a path that no socket can have."""
    if len(os.fsencode(path)) > _PATH_BYTES:
        text = f"a socket's path has at most {_PATH_BYTES} bytes"
        raise OSError(errno.ENAMETOOLONG, text, path)


@contextmanager
def listening(path: str) -> Iterator[socket.socket]:
    """A socket that listens at a path, taken away at the end.

    Root's is for every user, since the names have modes of their own; another user's is for that
    user. One that is left of a server that was killed is replaced.

    Raises OSError: EADDRINUSE where a server listens already, EEXIST for what is no socket, EPERM
    where another user made the lock (``path`` and ".lock"), which is there for as long as this
    takes.
    """
    check_path(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        with _alone(path):
            _take_away_stale(path)
            try:
                listener.bind(path)
            except OSError as error:
                raise OSError(error.errno, error.strerror, path) from None
            # Nobody can connect before it listens.
            os.chmod(path, 0o666 if os.geteuid() == 0 else 0o600)
            refuse_descriptors(listener)
            listener.listen(_BACKLOG)
            ours = os.stat(path)
        try:
            yield listener
        finally:
            with suppress(OSError):
                if os.path.samestat(os.lstat(path), ours):
                    os.unlink(path)
    finally:
        listener.close()


def activated() -> socket.socket | None:
    """The socket that systemd listens on for us (sd_listen_fds(3)), None without one.

    Raises OSError(EINVAL) for another kind of descriptor.
    """
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or "LISTEN_FDS" not in os.environ:
        return None
    del os.environ["LISTEN_PID"], os.environ["LISTEN_FDS"]
    with suppress(OSError):
        listener = socket.socket(fileno=_FIRST_OF_SYSTEMD)
        listener.set_inheritable(False)
        if (
            listener.family == socket.AF_UNIX
            and listener.type == socket.SOCK_SEQPACKET
            and listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        ):
            refuse_descriptors(listener)
            return listener
        listener.detach()
    text = "what systemd handed over is no socket that listens (ListenSequentialPacket=)"
    raise OSError(errno.EINVAL, text)


def refuse_descriptors(listener: socket.socket) -> None:
    """Have the kernel refuse what clients send along, where it can (Linux 6.16).

    Connections inherit this when they are made, and not when they are accepted.
    """
    with suppress(OSError):
        listener.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)


def may_carry_descriptors(connection: socket.socket) -> bool:
    """Whether descriptors may have come on a connection."""
    try:
        return connection.getsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS) != 0
    except OSError:
        return True


def tell_systemd(state: str) -> None:
    """Such as READY=1, where systemd waits for that (sd_notify(3))."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path[:1] in ("/", "@"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as manager:
            manager.sendto(state.encode(), "\0" + path[1:] if path[0] == "@" else path)


@contextmanager
def _alone(path: str) -> Iterator[None]:
    """One server at a time looks at what is at a path and makes its socket there.

    The lock is on a file that nobody else may open: a folder is locked by whoever may read it.
    """
    lock = f"{path}.lock"
    fd = _locked(lock)
    while not _is_at(fd, lock):  # whoever had it took it away
        os.close(fd)
        fd = _locked(lock)
    try:
        yield
    finally:
        with suppress(FileNotFoundError):
            os.unlink(lock)
        os.close(fd)


def _locked(lock: str) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(lock, flags, 0o600)
    except FileNotFoundError as error:
        folder = os.path.dirname(lock) or "."
        raise OSError(error.errno, "there is no such directory", folder) from None
    try:
        status = os.fstat(fd)
        private = not status.st_mode & 0o077 and status.st_uid == os.geteuid()
        if not private or not stat.S_ISREG(status.st_mode):
            text = "is no lock of this user's: take it away, or serve at another --socket PATH"
            raise OSError(errno.EPERM, text, lock)
        fcntl.flock(fd, fcntl.LOCK_EX)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _is_at(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def _take_away_stale(path: str) -> None:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise OSError(errno.EEXIST, "is there, and no socket: nothing was changed", path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:
            pass  # it listens, and has much to do
        except OSError as error:
            raise OSError(error.errno, error.strerror, path) from None
    raise OSError(errno.EADDRINUSE, "another server listens there already", path)
