"""A mount from start to end: the checks before, and the cleanup after."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from typing import TYPE_CHECKING

from dmabuf.kernel import proc
from dmabuf.store import default_path

if TYPE_CHECKING:
    from dmabuf.mount.files import Files

__all__ = ["mount"]

_DEVICE = "/dev/fuse"
_KIND = "fuse.dmabuf"
_IDLE_TASKS = 3  # tasks that wait for the next request; each holds a buffer of 1 MiB
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_NO_FUSE = "the kernel has no FUSE, or has not loaded it; as root: modprobe fuse"


def mount(
    directory: str,
    store: str | None = None,
    *,
    ready: Callable[[str], None],
    tell: Callable[[str], None],
) -> None:
    """Show a store as files in a directory, until it is unmounted or a signal comes.

    ``store`` is the path of its socket, None the default one. ``ready`` is called with that path
    once the files are there, ``tell`` with each explanation that an errno cannot carry. Root's
    mount is for every user, another user's for that user only. A mount there whose process has died
    is removed first. SIGINT, SIGTERM and SIGHUP end the mount.

    Raises OSError: ENOTDIR, ENOTEMPTY, EACCES or EBUSY for the directory, ENODEV without FUSE, and
    what :func:`dmabuf.store.connect` raises; ImportError without pyfuse3.
    """
    try:
        import pyfuse3  # noqa: F401
    except ImportError as error:
        text = f"mount: {error}; pip install 'dmabuf[fuse]', after apt-get install libfuse3-dev"
        raise ImportError(text) from None
    from dmabuf.mount.files import Files

    path = default_path() if store is None else os.fspath(store)
    directory = os.path.realpath(directory)
    if _remove_dead_mount(directory):
        tell(f"{directory}: removed a mount whose process had died")
    _check_directory(directory)
    _check_device()
    files = Files(path, tell)
    try:
        _serve(files, directory, path, ready, tell)
    finally:
        files.close()


def _serve(
    files: Files,
    directory: str,
    path: str,
    ready: Callable[[str], None],
    tell: Callable[[str], None],
) -> None:
    import pyfuse3
    import trio

    from dmabuf.mount.operations import Operations

    async def serve() -> None:
        with trio.open_signal_receiver(*_SIGNALS) as signals:
            async with trio.open_nursery() as nursery:

                async def answer() -> None:
                    await pyfuse3.main(min_tasks=_IDLE_TASKS)
                    nursery.cancel_scope.cancel()

                nursery.start_soon(answer)
                ready(path)
                async for _ in signals:
                    nursery.cancel_scope.cancel()
                    break

    shared = os.geteuid() == 0
    source = path.replace("\\", "\\\\").replace(",", "\\,")
    options = {"default_permissions", f"fsname={source}", "subtype=dmabuf", "nosuid", "nodev"}
    if shared:
        options.add("allow_other")
    try:
        pyfuse3.init(Operations(files, shared=shared, tell=tell), directory, options)
    except RuntimeError:
        text = "the kernel refuses to mount here; the line above has the reason"
        raise OSError(errno.EPERM, text, directory) from None
    try:
        trio.run(serve)
    finally:
        pyfuse3.close()


def _remove_dead_mount(directory: str) -> bool:
    """Unmount what a killed mount process left at a directory; return whether there was one."""
    try:
        os.stat(directory)
        return False
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise OSError(error.errno, error.strerror, directory) from None
    if _kind_of_mount(directory) != _KIND:
        text = "a dead FUSE mount of another program is here; run fusermount3 -u -z first"
        raise OSError(errno.ENOTCONN, text, directory)
    command = ["umount", "-l"] if os.geteuid() == 0 else ["fusermount3", "-u", "-z"]
    subprocess.run([*command, directory], check=True)
    return True


def _kind_of_mount(directory: str) -> str | None:
    """Return the filesystem mounted at a directory, whose path has no symbolic links."""
    kind = None
    for mount in proc.mounts():
        if mount.point == directory:
            kind = mount.kind
    return kind


def _check_directory(directory: str) -> None:
    if _kind_of_mount(directory) == _KIND:
        raise OSError(errno.EBUSY, "a store is already mounted here", directory)
    try:
        there = os.listdir(directory)
    except OSError as error:
        raise OSError(error.errno, error.strerror, directory) from None
    if there:
        text = f"the mount would hide its {len(there)} entries; use an empty directory"
        raise OSError(errno.ENOTEMPTY, text, directory)
    if not os.access(directory, os.W_OK):
        text = "permission denied; use a directory that you may write to"
        raise OSError(errno.EACCES, text, directory)


def _check_device() -> None:
    try:
        os.close(os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        fixes = {
            errno.ENOENT: _NO_FUSE,
            errno.ENXIO: _NO_FUSE,
            errno.ENODEV: _NO_FUSE,
            errno.EACCES: f"permission denied; as root: setfacl -m u:{os.getuid()}:rw {_DEVICE}",
            errno.EPERM: "not permitted; give the container the device: --device /dev/fuse",
        }
        text = fixes.get(error.errno or 0, error.strerror)
        raise OSError(error.errno, text, _DEVICE) from None
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        text = "program not found, and only root mounts without it; apt-get install fuse3"
        raise OSError(errno.ENOENT, text, "fusermount3")
