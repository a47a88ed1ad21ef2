"""The store's socket: its path, and the lock that gives it to one server."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import socket
import stat
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

__all__ = ["default_path", "listening", "notify_systemd"]

_PATH_BYTES = 107  # sun_path has 108 with the final zero: unix(7)
_BACKLOG = 128
_FIRST_OF_SYSTEMD = 3  # SD_LISTEN_FDS_START
_OF_SYSTEMD = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "NOTIFY_SOCKET", "FDSTORE")
_PROGRAM = "dmabuf.cli"
"""The module of the command, started by its name: this room imports nothing of it."""
_IDLE_SECONDS = 3600


def default_path() -> str:
    """Return ``$XDG_RUNTIME_DIR/dmabuf.sock``, or ``/run/dmabuf.sock`` for root.

    Raises OSError(ENOENT) for a user without XDG_RUNTIME_DIR.
    """
    if os.geteuid() == 0:
        return "/run/dmabuf.sock"
    folder = os.environ.get("XDG_RUNTIME_DIR")
    if not folder:
        text = "path of the store: XDG_RUNTIME_DIR is not set; set it, or use --socket PATH"
        raise OSError(errno.ENOENT, text)
    return os.path.join(folder, "dmabuf.sock")


def start_server(path: str) -> str:
    """Start a store at a path, as a process of its own, and return when it serves.

    Returns why none was started; another one may have been started there meanwhile.
    """
    import subprocess

    if not sys.executable:
        return "sys.executable is empty; start one: dmabuf serve"
    env = {name: value for name, value in os.environ.items() if name not in _OF_SYSTEMD}
    env["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, sys.path))
    command = [sys.executable, "-P", "-m", _PROGRAM, "serve", "--background"]
    ended = subprocess.run(
        [*command, "--idle", str(_IDLE_SECONDS), "--socket", os.path.abspath(path)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        cwd="/",
        env=env,
        check=False,
    )
    lines = ended.stderr.decode(errors="replace").strip().splitlines()
    return lines[-1].removeprefix("error: ") if lines else f"exit status {ended.returncode}"


def check_path(path: str) -> None:
    """Raise OSError(ENAMETOOLONG) for a path that no socket can have."""
    if len(os.fsencode(path)) > _PATH_BYTES:
        text = f"the path of a socket has at most {_PATH_BYTES} bytes"
        raise OSError(errno.ENAMETOOLONG, text, path)


@contextmanager
def listening(
    path: str,
    group: str | None = None,
    taken: socket.socket | None = None,
    *,
    kind: socket.SocketKind = socket.SOCK_SEQPACKET,
) -> Iterator[socket.socket]:
    """Give a socket that listens at a path; at the end remove it, unless the user has closed it.

    The socket has mode 0600; with ``group``, mode 0660 and that group. ``taken`` is one that
    listens there already, ``kind`` the kind of the socket. A socket that a killed server left
    behind is replaced. While this call looks, it holds a lock on ``path`` + ".lock".

    Raises OSError: EADDRINUSE if a server listens there, EEXIST for a file that is not a socket,
    EPERM if the lock is not a private file of this user; LookupError for an unknown group.
    """
    check_path(path)
    listener = taken or socket.socket(socket.AF_UNIX, kind)
    try:
        if taken is not None:
            _give_to(group, path)
            ours = os.stat(path)
        else:
            with _locked(f"{path}.lock"):
                _remove_stale(path, kind)
                try:
                    listener.bind(path)
                except OSError as error:
                    raise OSError(error.errno, error.strerror, path) from None
                ours = os.stat(path)
                try:
                    _give_to(group, path)
                    listener.listen(_BACKLOG)  # no client can connect before this
                except BaseException:
                    os.unlink(path)
                    raise
        try:
            yield listener
        finally:
            with suppress(OSError):
                if listener.fileno() >= 0 and os.path.samestat(os.lstat(path), ours):
                    os.unlink(path)
    finally:
        listener.close()


def _give_to(group: str | None, path: str) -> None:
    if group is not None:
        shutil.chown(path, group=group)
    os.chmod(path, 0o600 if group is None else 0o660)


def activated() -> tuple[socket.socket | None, dict[str, int]]:
    """Return the socket that systemd passed (sd_listen_fds(3)), and what its store held, by name.

    Raises OSError(EINVAL) for any other descriptor.
    """
    count = 0
    if os.environ.get("LISTEN_PID") == str(os.getpid()):
        count = int(os.environ.get("LISTEN_FDS") or 0)
    names = os.environ.get("LISTEN_FDNAMES", "").split(":") + [""] * count
    for variable in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(variable, None)
    listener, stored = None, dict[str, int]()
    for fd, name in enumerate(names[:count], _FIRST_OF_SYSTEMD):
        os.set_inheritable(fd, False)
        if re.fullmatch(r"[bc][0-9]+\.[0-9]+", name):
            stored[name] = fd
        else:
            listener = listener or _listener(fd)
    return listener, stored


def _listener(fd: int) -> socket.socket:
    with suppress(OSError):
        listener = socket.socket(fileno=fd)
        if (
            listener.family == socket.AF_UNIX
            and listener.type == socket.SOCK_SEQPACKET
            and listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        ):
            return listener
        listener.detach()
    text = "the descriptor from systemd is not a listening socket; use ListenSequentialPacket="
    raise OSError(errno.EINVAL, text)


def notify_systemd(state: str, *descriptors: int) -> None:
    """Send a state such as READY=1 to systemd, if it waits for one (sd_notify(3))."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path[:1] in ("/", "@"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as manager:
            manager.connect("\0" + path[1:] if path[0] == "@" else path)
            socket.send_fds(manager, [state.encode()], descriptors)


def user_of(connection: socket.socket) -> tuple[int, int]:
    """Return the user and group at the other end of a connection: SO_PEERCRED, unix(7)."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    _, uid, gid = struct.unpack("=iII", credentials)
    return uid, gid


@contextmanager
def _locked(lock: str) -> Iterator[None]:
    """Hold the lock file. It is private: a lock on the directory could be held by any reader."""
    fd = _lock(lock)
    while not _is_at(fd, lock):  # its last holder has removed it
        os.close(fd)
        fd = _lock(lock)
    try:
        yield
    finally:
        with suppress(FileNotFoundError):
            os.unlink(lock)
        os.close(fd)


def _lock(lock: str) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(lock, flags, 0o600)
    except FileNotFoundError as error:
        folder = os.path.dirname(lock) or "."
        raise OSError(error.errno, "no such directory", folder) from None
    try:
        status = os.fstat(fd)
        private = not status.st_mode & 0o077 and status.st_uid == os.geteuid()
        if not private or not stat.S_ISREG(status.st_mode):
            text = "not a private lock file of this user; remove it, or use another --socket PATH"
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


def _remove_stale(path: str, kind: socket.SocketKind) -> None:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise OSError(errno.EEXIST, "the file is not a socket; nothing was changed", path)
    with socket.socket(socket.AF_UNIX, kind) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:  # a listener with a full backlog
            pass
        except OSError as error:
            raise OSError(error.errno, error.strerror, path) from None
    raise OSError(errno.EADDRINUSE, "another server listens there", path)
