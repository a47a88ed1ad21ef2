"""A regular file that appears whole under its name, or not at all.

The bytes go to a file without a name (O_TMPFILE), which gets its own by linkat(2) when it is whole;
where there is one of that name, it gets a hidden name beside it first and then takes the place by
rename(2). Whoever opens the target sees the old content or the new, also after a crash or kill, and
a killed copy leaves nothing but, between those two calls, a file with a hidden name. Filesystems
without O_TMPFILE (NFS, FUSE) have it with its hidden name from the start.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Callable
from contextlib import suppress

from dmabuf.errors import os_error

_NOT_TAKEN_OVER = frozenset({"security.capability", "security.ima", "security.evm"})
"""Attributes that vouch for the old content."""


class Replacement:
    """A context manager: write to `temporary`, then `commit`; without that nothing has happened.

    An existing target keeps its permissions, owner and attributes where that is allowed. A
    symbolic link stays one, and what it points to is replaced.
    """

    def __init__(self, path: str, *, force: bool, note: Callable[[str], object]) -> None:
        self.path = os.path.realpath(path) if os.path.islink(path) else path
        self._asked = path
        self._force = force
        self._note = note
        self._folder = os.path.dirname(self.path) or "."
        self._hidden = os.path.join(self._folder, f".dmabuf-{secrets.token_hex(6)}.tmp")
        self._fd = -1
        self._old: os.stat_result | None = None

    @property
    def temporary(self) -> str:
        """The path to write to; it is followed to the file while this is open."""
        return self._hidden if self._fd < 0 else f"/proc/self/fd/{self._fd}"

    def __enter__(self) -> Replacement:
        with suppress(FileNotFoundError):
            self._old = os.stat(self.path)
        if self._old is not None:
            self._check_replaceable(self._old)
        try:
            self._make(0o600 if self._old else 0o666)
        except OSError as error:
            text = f"making a file beside it, to take its name when whole: {error.strerror}"
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                text = f"its directory: {error.strerror}"
            raise os_error(error.errno or errno.EIO, text, self._asked) from None
        except BaseException:
            self._remove()
            raise
        return self

    def _make(self, mode: int) -> None:
        with suppress(OSError):  # no O_TMPFILE here; any other reason the next open has as well
            self._fd = os.open(self._folder, os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC, mode)
            if os.path.exists(self.temporary):
                return
            os.close(self._fd)  # /proc is not mounted: nobody could give it a name
            self._fd = -1
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        os.close(os.open(self._hidden, flags, mode))

    def _check_replaceable(self, old: os.stat_result) -> None:
        if not self._force and not os.access(self.path, os.W_OK, effective_ids=True):
            text = "may not be written (permission denied): pass force=True to replace it"
            raise os_error(errno.EACCES, text, self._asked)
        if old.st_nlink > 1:
            self._note(
                f"note: {self.path} has {old.st_nlink} names (hard links): this one gets the new "
                "file, the others keep the old"
            )

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
        except OSError as error:  # a filesystem that is gone; why is being told already
            self._note(f"note: {self._hidden} could not be removed: {error.strerror}")

    def commit(self, like: os.stat_result | None, *, sync: bool) -> None:
        """Put the file in place.

        Args:
            like: whose permissions and times to take; by default the old target's permissions.
            sync: return when the new name is on the medium.
        """
        if self._old is not None:
            self._take_over(self._old)
        if like is not None:
            os.chmod(self.temporary, stat.S_IMODE(like.st_mode) & 0o1777)
            os.utime(self.temporary, ns=(like.st_atime_ns, like.st_mtime_ns))
        self._take_name()
        if sync:
            folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def _take_name(self) -> None:
        if self._fd >= 0:
            try:
                self._link(self.path)
                return
            except FileExistsError:
                self._link(self._hidden)
        os.rename(self._hidden, self.path)

    def _link(self, name: str) -> None:
        """Give the file without a name one."""
        # With a directory given, which the absolute path has no use for, Python calls linkat(2),
        # and that follows /proc's link.
        os.link(self.temporary, name, src_dir_fd=self._fd, follow_symlinks=True)

    def _take_over(self, old: os.stat_result) -> None:
        """What the old target has beside its bytes; as far as this user may."""
        with suppress(OSError):
            os.chown(self.temporary, old.st_uid, old.st_gid)
        with suppress(OSError):
            for name in os.listxattr(self.path):
                if name not in _NOT_TAKEN_OVER:
                    with suppress(OSError):
                        os.setxattr(self.temporary, name, os.getxattr(self.path, name))
        os.chmod(self.temporary, stat.S_IMODE(old.st_mode) & 0o1777)
