"""A regular file that appears whole under its name, or not at all.

The bytes go to a file with a hidden name in the same directory, which takes the target's name by
rename(2): whoever opens the target sees the old content or the new, also after a crash or kill.
(A file without any name, O_TMPFILE, cannot take the place of one: linkat(2) refuses, EEXIST.)
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from contextlib import suppress

from dmabuf.cli import _output
from dmabuf.errors import os_error

_NOT_TAKEN_OVER = frozenset({"security.capability", "security.ima", "security.evm"})
"""Attributes that vouch for the old content."""


class Replacement:
    """A context manager: write to `temporary`, then `commit`; without that nothing has happened.

    An existing target keeps its permissions, owner and attributes where that is allowed. A
    symbolic link stays one, and what it points to is replaced.
    """

    def __init__(self, path: str, *, force: bool) -> None:
        self.path = os.path.realpath(path) if os.path.islink(path) else path
        self._asked = path
        self._force = force
        name = f".dmabuf-{secrets.token_hex(6)}.tmp"
        self.temporary = os.path.join(os.path.dirname(self.path), name)
        self._old: os.stat_result | None = None

    def __enter__(self) -> Replacement:
        with suppress(FileNotFoundError):
            self._old = os.stat(self.path)
        if self._old is not None:
            self._check_replaceable(self._old)
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            os.close(os.open(self.temporary, flags, 0o600 if self._old else 0o666))
        except OSError as error:
            text = f"making a file beside it, to take its name when whole: {error.strerror}"
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                text = f"its directory: {error.strerror}"
            raise os_error(error.errno or errno.EIO, text, self._asked) from None
        except BaseException:
            self._remove()
            raise
        return self

    def _check_replaceable(self, old: os.stat_result) -> None:
        if not self._force and not os.access(self.path, os.W_OK, effective_ids=True):
            text = "may not be written (permission denied): --force replaces it all the same"
            raise os_error(errno.EACCES, text, self._asked)
        if old.st_nlink > 1:
            _output.note(
                f"note: {self.path} has {old.st_nlink} names (hard links): this one gets the new "
                "file, the others keep the old"
            )

    def __exit__(self, *exc: object) -> None:
        self._remove()

    def _remove(self) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self.temporary)

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
        os.rename(self.temporary, self.path)
        if sync:
            folder = os.open(os.path.dirname(self.path) or ".", os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

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
