"""The directory that a node serves: nothing outside it is opened, by whatever path."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from contextlib import suppress

from dmabuf.errors import os_error
from dmabuf.kernel import files
from dmabuf.transfer import File, Mode

_FLAGS: dict[str, int] = {
    "r": os.O_RDONLY,
    "r+": os.O_RDWR,
    "w": os.O_RDWR | os.O_CREAT,
    "x": os.O_RDWR | os.O_CREAT | os.O_EXCL,
}
_PLACE = os.O_PATH | os.O_DIRECTORY
_PERMISSIONS = 0o666  # as open(2) of most programs; the umask applies


class Served:
    """A file below the directory that a client has open.

    A new file that replaces the one with its path has a temporary name until `commit`, and vanishes
    without it.
    """

    def __init__(
        self, fd: int, path: str, mode: Mode, folder: int = -1, temporary: str = ""
    ) -> None:
        """Take over descriptors: the file's, and for a temporary name that of its folder."""
        self.path = path
        self._folder, self._temporary = folder, temporary
        try:
            self.file = File(fd, mode)
        except BaseException:
            self._remove()
            raise
        finally:
            os.close(fd)

    def commit(self, *, sync: bool) -> None:
        """Give it its name, with `sync` also on the medium, and close it.

        The content is on the medium before the name, so that a power cut leaves the old or the new.

        Raises OSError: EINVAL unless it replaces a file.
        """
        if not self._temporary:
            raise os_error(errno.EINVAL, "commit: the file has its name already", self.path)
        name = os.path.basename(self.path)
        self.file.target.flush(0)
        os.rename(self._temporary, name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        self._temporary = ""
        if sync:
            folder = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._folder)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        self.close()

    def close(self) -> None:
        """Close it, and remove it unless it has its name."""
        self.file.close()
        self._remove()

    def _remove(self) -> None:
        folder, self._folder = self._folder, -1
        if folder >= 0:
            if self._temporary:
                with suppress(OSError):
                    os.unlink(self._temporary, dir_fd=folder)
            os.close(folder)


class Folder:
    """A directory, served whatever becomes of its path."""

    def __init__(self, path: str | os.PathLike[str], *, read_only: bool) -> None:
        self.path = os.fspath(path)
        self._read_only = read_only
        self._fd = os.open(self.path, _PLACE | os.O_CLOEXEC)

    def close(self) -> None:
        """Close it."""
        os.close(self._fd)

    def open(self, path: str, mode: str) -> Served:
        """Open a regular file. `mode` is that of `dmabuf.open`, or "replace".

        Raises OSError: EACCES for a path that leads out of the directory, EROFS, and those of
        open(2).
        """
        if mode != "r" and self._read_only:
            raise os_error(errno.EROFS, "the node serves for reading only", path)
        if mode == "replace":
            return self._replacing(path)
        creates = mode in ("w", "x")
        flags = _FLAGS[mode] | os.O_NONBLOCK | os.O_NOCTTY  # a FIFO would wait for its peer
        fd = self._beneath(path, flags, _PERMISSIONS if creates else 0)
        try:
            _check_regular(fd, path)
            os.set_blocking(fd, True)
            if mode == "w":
                os.ftruncate(fd, 0)
        except BaseException:
            os.close(fd)
            raise
        return Served(fd, path, "r" if mode == "r" else "r+")

    def _replacing(self, path: str) -> Served:
        where, name = os.path.split(path)
        if name in ("", ".", ".."):
            raise os_error(errno.EISDIR, "the path of a file is needed", path)
        permissions = _PERMISSIONS
        with suppress(FileNotFoundError):
            old = self._beneath(path, os.O_PATH | os.O_NOFOLLOW, 0)
            try:
                _check_regular(old, path)
                permissions = stat.S_IMODE(os.fstat(old).st_mode)
            finally:
                os.close(old)
        folder = self._beneath(where or ".", _PLACE, 0)
        try:
            temporary = f".{name[:200]}.{secrets.token_hex(4)}.part"
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(temporary, flags, permissions, dir_fd=folder)
        except BaseException:
            os.close(folder)
            raise
        if permissions != _PERMISSIONS:
            os.fchmod(fd, permissions)
        return Served(fd, path, "r+", folder, temporary)

    def _beneath(self, path: str, flags: int, permissions: int) -> int:
        try:
            return files.open_beneath(self._fd, path, flags, permissions)
        except OSError as error:
            if error.errno == errno.EXDEV:
                text = "the path leads out of the directory that the node serves"
                raise os_error(errno.EACCES, text, path) from None
            if error.errno == errno.ENXIO:
                raise _not_regular(path) from None
            raise


def _check_regular(fd: int, path: str) -> None:
    mode = os.fstat(fd).st_mode
    if stat.S_ISDIR(mode):
        raise os_error(errno.EISDIR, "it is a directory: name a file in it", path)
    if not stat.S_ISREG(mode):
        raise _not_regular(path)


def _not_regular(path: str) -> OSError:
    return os_error(errno.EINVAL, "it is not a regular file", path)
