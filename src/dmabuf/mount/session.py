"""A mount from its beginning to its end: what is checked before, and what is tidied after."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from typing import Any

from dmabuf import _sysfs
from dmabuf.errors import os_error
from dmabuf.mount.files import Files
from dmabuf.store import default_path

_DEVICE = "/dev/fuse"
_KIND = "fuse.dmabuf"
_IDLE = 3  # tasks that wait for the next request; others end, and their 1 MiB goes
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def mount(
    directory: str,
    store: str | None = None,
    *,
    ready: Callable[[str], None],
    tell: Callable[[str], None],
) -> None:
    """Show a store as files in ``directory`` until it is unmounted, or SIGTERM or SIGINT comes.

    ``store`` is the path of its socket, None the usual one. ``ready`` is called with that path when
    the files are there, and ``tell`` with what an errno cannot say. Root's mount is for every user,
    another user's for that user alone. What is left of a mount whose process died is taken away.

    Raises OSError: ENOTDIR, ENOTEMPTY, EACCES, EBUSY for the directory, ENODEV without FUSE, what
    :func:`dmabuf.store.connect` raises; ImportError without pyfuse3.
    """
    pyfuse3 = _import()
    path = default_path() if store is None else os.fspath(store)
    directory = os.path.realpath(directory)
    if _take_away_dead(directory):
        tell(f"{directory}: a mount whose process had died was there, and was taken away")
    _check_directory(directory)
    _check_device()
    files = Files(path)
    try:
        _serve(pyfuse3, files, directory, path, ready, tell)
    finally:
        files.close()


def _import() -> Any:
    try:
        import pyfuse3
    except ImportError as error:
        raise ImportError(
            f"{error}: a mount needs pyfuse3 (pip install 'dmabuf[fuse]', which builds it: "
            "apt-get install libfuse3-dev pkg-config gcc fuse3)"
        ) from None
    return pyfuse3


def _serve(
    pyfuse3: Any,
    files: Files,
    directory: str,
    path: str,
    ready: Callable[[str], None],
    tell: Callable[[str], None],
) -> None:
    import trio

    from dmabuf.mount.operations import Operations

    shared = os.geteuid() == 0
    options = {
        "default_permissions",
        f"fsname={_escape(path)}",
        "subtype=dmabuf",
        "nosuid",
        "nodev",
    }
    if shared:
        options.add("allow_other")
    try:
        pyfuse3.init(Operations(files, shared=shared, tell=tell), directory, options)
    except RuntimeError:
        text = "the kernel refuses to mount here (the line above has its reason)"
        raise os_error(errno.EPERM, text, directory) from None
    try:
        trio.run(_loop, pyfuse3, lambda: ready(path))
    finally:
        pyfuse3.close()


async def _loop(pyfuse3: Any, ready: Callable[[], None]) -> None:
    import trio

    with trio.open_signal_receiver(*_SIGNALS) as signals:
        async with trio.open_nursery() as nursery:

            async def serve() -> None:
                await pyfuse3.main(min_tasks=_IDLE)
                nursery.cancel_scope.cancel()

            nursery.start_soon(serve)
            ready()
            async for _ in signals:
                nursery.cancel_scope.cancel()
                break


def _escape(text: str) -> str:
    """As libfuse's options have it."""
    return text.replace("\\", "\\\\").replace(",", "\\,")


def _take_away_dead(directory: str) -> bool:
    """Unmount what is left of a mount of ours whose process is gone; whether there was one."""
    try:
        os.stat(directory)
        return False
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise os_error(error.errno or errno.EIO, error.strerror or "", directory) from None
    if _mounted(directory) != _KIND:
        text = "a FUSE mount of another program is dead there: fusermount3 -u -z, then again"
        raise os_error(errno.ENOTCONN, text, directory)
    if os.geteuid() == 0:
        subprocess.run(["umount", "-l", directory], check=True)
    else:
        subprocess.run(["fusermount3", "-u", "-z", directory], check=True)
    return True


def _mounted(directory: str) -> str | None:
    """The kind of file system that is mounted at a directory, whose path has no symlinks."""
    kind = None
    for mount in _sysfs.mounts():
        if mount.point == directory:
            kind = mount.kind
    return kind


def _check_directory(directory: str) -> None:
    if _mounted(directory) == _KIND:
        raise os_error(errno.EBUSY, "a store is mounted there already", directory)
    try:
        there = os.listdir(directory)
    except OSError as error:
        raise os_error(error.errno or errno.EIO, error.strerror or "", directory) from None
    if there:
        text = f"has {len(there)} entries, which a mount would hide: mount on an empty directory"
        raise os_error(errno.ENOTEMPTY, text, directory)
    if not os.access(directory, os.W_OK):
        raise os_error(errno.EACCES, "you may mount only where you may write", directory)


def _check_device() -> None:
    try:
        os.close(os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        fixes = {
            errno.ENOENT: "no FUSE in this kernel, or not loaded (as root: modprobe fuse)",
            errno.ENXIO: "no FUSE in this kernel, or not loaded (as root: modprobe fuse)",
            errno.ENODEV: "no FUSE in this kernel, or not loaded (as root: modprobe fuse)",
            errno.EACCES: "not for this user (as root: chmod 666 /dev/fuse)",
            errno.EPERM: "not permitted (a container has to be given the device: --device)",
        }
        text = fixes.get(error.errno or 0, error.strerror)
        raise os_error(error.errno or errno.EIO, str(text), _DEVICE) from None
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        text = "is missing, and only root mounts without it (apt-get install fuse3)"
        raise os_error(errno.ENOENT, text, "fusermount3")
