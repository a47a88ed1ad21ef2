"""What a directory of buffers has not, each with the errno that says so."""

from __future__ import annotations

import errno

import pyfuse3


class Absent(pyfuse3.Operations):
    """The requests that are refused."""

    async def setxattr(
        self, inode: int, name: bytes, value: bytes, ctx: pyfuse3.RequestContext
    ) -> None:
        """None can be set."""
        raise pyfuse3.FUSEError(errno.EOPNOTSUPP)

    async def removexattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        """None can be removed."""
        raise pyfuse3.FUSEError(errno.EOPNOTSUPP)

    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """There is one directory."""
        raise pyfuse3.FUSEError(errno.EPERM)

    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """There are files, and nothing else."""
        raise pyfuse3.FUSEError(errno.EPERM)

    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """There are files, and nothing else."""
        raise pyfuse3.FUSEError(errno.EPERM)

    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """A buffer has one name."""
        raise pyfuse3.FUSEError(errno.EPERM)
