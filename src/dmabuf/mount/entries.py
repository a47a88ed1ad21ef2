"""Names and attributes, as they go to the kernel and come from it."""

from __future__ import annotations

import errno
import stat

import pyfuse3

from dmabuf.mount.node import Attributes


def name_of(name: bytes) -> str:
    """A name of the store's. Raises FUSEError for what cannot be one."""
    if len(name) > 255:
        raise pyfuse3.FUSEError(errno.ENAMETOOLONG)
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise pyfuse3.FUSEError(errno.EILSEQ) from None


def entry_of(told: Attributes) -> pyfuse3.EntryAttributes:
    """A file's attributes."""
    entry = pyfuse3.EntryAttributes()
    # Nothing is kept by the kernel: other clients of the store change it without a word.
    entry.entry_timeout = entry.attr_timeout = 0
    entry.st_ino = told.ino
    entry.st_mode = stat.S_IFREG | told.mode
    entry.st_nlink, entry.st_uid, entry.st_gid = told.links, told.uid, told.gid
    entry.st_size, entry.st_blocks, entry.st_blksize = told.size, told.memory // 512, 1 << 20
    entry.st_atime_ns, entry.st_mtime_ns = told.accessed_ns, told.modified_ns
    entry.st_ctime_ns = told.changed_ns
    return entry
