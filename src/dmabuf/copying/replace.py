"""A regular file that appears whole under its name, or not at all.

The bytes go to a file without a name (O_TMPFILE), which gets its name by linkat(2) once it is
whole. Where a file of that name exists, it gets a hidden name beside it first and then takes the
place by rename(2). The content is flushed before that: otherwise a power cut may leave the new name
and, of a file that was written through the page cache, zeros. So a program that opens the target
sees the old content or the new, also after a crash, and a killed copy leaves nothing, except
between those two calls a file with a hidden name. Filesystems without O_TMPFILE (NFS, FUSE) have
the hidden name from the start, and so has a file that is not to keep a descriptor open.

Some files can be written but not replaced: the files that containers have mounted over others, the
files of /proc and /sys, and files in a directory without write permission. They are written in
place, which is noted, since an error then leaves them incomplete.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import sys
from collections.abc import Callable
from contextlib import suppress

from dmabuf.errors import os_error

_NOT_TAKEN_OVER = frozenset({"security.capability", "security.ima", "security.evm"})
"""Attributes that vouch for the old content."""
_FS_IOC_GETFLAGS = 0x80086601
_FS_APPEND_FL = 0x20  # <linux/fs.h>


class Replacement:
    """A context manager: write to `temporary`, then `commit`; without that nothing has happened.

    With `nameless` False it keeps no descriptor open, and a kill leaves a file with a hidden name.

    An existing target keeps its permissions, owner and attributes as far as that is allowed. A
    symbolic link stays one, and the file it points to is replaced.
    """

    def __init__(
        self, path: str, *, force: bool, note: Callable[[str], object], nameless: bool = True
    ) -> None:
        self.path = os.path.realpath(path) if os.path.islink(path) else path
        self.in_place: str | None = None
        """Why the target is written in place; None if it is replaced."""
        self._asked = path
        self._force = force
        self._note = note
        self._nameless = nameless
        self._folder = os.path.dirname(self.path) or "."
        self._hidden = os.path.join(self._folder, f".dmabuf-{os.urandom(6).hex()}.tmp")
        self._fd = -1
        self._old: os.stat_result | None = None
        self._keeps_owner = True

    @property
    def temporary(self) -> str:
        """The path to write to, valid while this is open."""
        if self.in_place is not None:
            return self.path
        return self._hidden if self._fd < 0 else f"/proc/self/fd/{self._fd}"

    def __enter__(self) -> Replacement:
        with suppress(FileNotFoundError):
            self._old = os.stat(self.path)
        if self._old is not None:
            self._check_writable(self._old)
            self.in_place = self._why_not_replaced(self._old)
        if self.in_place is None:
            try:
                self._make(0o600 if self._old else 0o666)
            except OSError as error:
                if self._old is None:
                    text = "no file can be made beside it, to take its name when whole"
                    if error.errno in (errno.ENOENT, errno.ENOTDIR):
                        text = "its directory"
                    text = f"{text}: {error.strerror}"
                    raise os_error(error.errno or errno.EIO, text, self._asked) from None
                self.in_place = f"no file can be made beside it ({error.strerror})"
            except BaseException:
                self._remove()
                raise
        if self.in_place is not None:
            self._note(f"note: {self._asked} is written in place: {self.in_place}")
        elif self._old is not None and self._old.st_nlink > 1:
            self._note(
                f"note: {self.path} has {self._old.st_nlink} names (hard links): this one gets the "
                "new file, the others keep the old"
            )
        return self

    def _check_writable(self, old: os.stat_result) -> None:
        """Raise OSError for a file that this user may not write, unless forced.

        O_CREAT in a sticky directory has the kernel apply fs.protected_regular: another user may
        have made the file there to receive what a privileged program writes.
        """
        sticky = os.stat(self._folder).st_mode & stat.S_ISVTX
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        try:
            os.close(os.open(self.path, flags | (os.O_CREAT if sticky else 0)))
            return
        except OSError as error:
            refused = error
        if refused.errno == errno.ETXTBSY:
            return  # a program that runs can be replaced
        if refused.errno == errno.EPERM:
            text = "it is append-only or immutable: append with >>, or remove that with chattr -ai"
            raise os_error(errno.EPERM, text, self._asked)
        if self._force:
            self._keeps_owner = not sticky
            return
        text = f"may not be written ({os.strerror(refused.errno or 0).lower()})"
        if sticky and refused.errno == errno.EACCES and old.st_uid != os.geteuid():
            text = f"{text}: it is another user's, in a sticky directory"
        raise os_error(errno.EACCES, f"{text}: pass force=True to replace it", self._asked)

    def _why_not_replaced(self, old: os.stat_result) -> str | None:
        """Return why rename(2) could not put another file in the target's place."""
        if _mount_id(self.path) != _mount_id(self._folder):
            return "it is a mount point"
        if _is_append_only(self._folder):
            return "its directory is append-only"
        folder = os.stat(self._folder)
        if folder.st_mode & stat.S_ISVTX and os.geteuid() not in (0, folder.st_uid, old.st_uid):
            return "it is another user's, in a sticky directory"
        return None

    def _make(self, mode: int) -> None:
        if self._nameless:
            with suppress(OSError):  # no O_TMPFILE here; the next open has any other reason as well
                self._fd = os.open(self._folder, os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC, mode)
                if os.path.exists(self.temporary):
                    return
                os.close(self._fd)  # without /proc it could not get a name
                self._fd = -1
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        os.close(os.open(self._hidden, flags, mode))

    def __exit__(self, *exc: object) -> None:
        self._remove()

    def _remove(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        try:
            os.unlink(self._hidden)
        except FileNotFoundError:
            pass
        except OSError as error:  # the filesystem is gone, say
            if self.in_place is None:
                self._note(f"note: {self._hidden} could not be removed: {error.strerror}")

    def commit(self, like: os.stat_result | None, *, sync: bool) -> None:
        """Put the file in place.

        Args:
            like: the status whose permissions and times to take; by default an old target keeps
                its own.
            sync: call `sync_name`, too. The content is on the medium in any case.

        Raises:
            OSError: the content could not be flushed, or the name not be taken; the old file is as
                it was. Or what `sync_name` raises.
        """
        replaced = self.in_place is None
        if replaced and self._old is not None and self._keeps_owner:
            self._take_over(self._old)
        if like is not None:
            os.chmod(self.temporary, stat.S_IMODE(like.st_mode) & 0o1777)
            os.utime(self.temporary, ns=(like.st_atime_ns, like.st_mtime_ns))
        if not replaced:
            return
        self._flush()
        try:
            self._take_name()
        except OSError as error:
            text = f"it cannot be replaced: {error.strerror}"
            if self._old is not None:
                text = f"{text}; write it in place through a descriptor: - > FILE"
            raise os_error(error.errno or errno.EIO, text, self._asked) from None
        if sync:
            self.sync_name()

    def sync_name(self) -> None:
        """Return when the new name is on the medium. Raises OSError; the new file is in place."""
        try:
            sync_folder(self._folder)
        except OSError as error:
            text = f"it is replaced, but perhaps not after a power cut: {error.strerror}"
            raise os_error(error.errno or errno.EIO, text, self._asked) from None

    def _flush(self) -> None:
        fd = (
            os.dup(self._fd) if self._fd >= 0 else os.open(self._hidden, os.O_WRONLY | os.O_CLOEXEC)
        )
        try:
            os.fdatasync(fd)
        except OSError as error:
            text = f"flushing to the medium failed: {error.strerror}"
            raise os_error(error.errno or errno.EIO, text, self._asked) from None
        finally:
            os.close(fd)

    def _take_name(self) -> None:
        if self._fd >= 0:
            try:
                self._link(self.path)
                return
            except FileExistsError:
                self._link(self._hidden)
        os.rename(self._hidden, self.path)

    def _link(self, name: str) -> None:
        """Give the file without a name one.

        With a directory's descriptor, which the absolute path ignores, Python calls linkat(2),
        which follows the link of /proc.
        """
        os.link(self.temporary, name, src_dir_fd=self._fd, follow_symlinks=True)

    def _take_over(self, old: os.stat_result) -> None:
        """Give the new file the old one's owner, attributes and permissions, as far as allowed."""
        with suppress(OSError):
            os.chown(self.temporary, old.st_uid, old.st_gid)
        with suppress(OSError):
            for name in os.listxattr(self.path):
                if name not in _NOT_TAKEN_OVER:
                    with suppress(OSError):
                        os.setxattr(self.temporary, name, os.getxattr(self.path, name))
        os.chmod(self.temporary, stat.S_IMODE(old.st_mode) & 0o1777)


def sync_folder(folder: str) -> None:
    """Return when the names in a folder are on the medium."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        text = f"flushing its names to the medium failed: {error.strerror}"
        raise os_error(error.errno or errno.EIO, text, folder) from None


def _is_append_only(folder: str) -> bool:
    """Return whether names in a folder can be added and not changed: chattr +a."""
    flags = bytearray(8)
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, _FS_IOC_GETFLAGS, flags)
        finally:
            os.close(fd)
    except OSError:  # a filesystem without these flags, or a folder that may not be read
        return False
    return bool(int.from_bytes(flags[:4], sys.byteorder) & _FS_APPEND_FL)


def _mount_id(path: str) -> str | None:
    """Return the number of the mount that a path lies on; None without /proc."""
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        with open(f"/proc/self/fdinfo/{fd}") as lines:
            return next((line for line in lines if line.startswith("mnt_id:")), None)
    except OSError:
        return None
    finally:
        os.close(fd)
