"""A FUSE file system of one file, whose bytes are an image's and go through the page cache.

Run as a program it serves the image, its first argument, in the folder that is its second.
"""

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def cached_fuse(image: Path, folder: Path) -> Iterator[str]:
    """Mount the file system; its file's path."""
    folder.mkdir()
    command = [sys.executable, __file__, image, folder]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None and server.stdout.readline() == b"ready\n"
            yield str(folder / "file")
        finally:
            subprocess.run(["fusermount3", "-u", "-z", folder], check=False)
            server.kill()


def serve(image: str, folder: str) -> None:
    """Answer requests until the file system is unmounted."""
    import pyfuse3
    import trio

    class OneFile(pyfuse3.Operations):
        fd = os.open(image, os.O_RDWR)

        async def getattr(self, inode, ctx=None):
            entry = pyfuse3.EntryAttributes()
            entry.st_ino = inode
            entry.st_mode = 0o40755 if inode == pyfuse3.ROOT_INODE else 0o100644
            entry.st_size = os.fstat(self.fd).st_size
            return entry

        async def lookup(self, parent, name, ctx=None):
            if name != b"file":
                raise pyfuse3.FUSEError(errno.ENOENT)
            return await self.getattr(2)

        async def open(self, inode, flags, ctx):
            return pyfuse3.FileInfo(fh=inode, keep_cache=True)

        async def setattr(self, inode, attr, fields, fh, ctx):
            return await self.getattr(inode)

        async def read(self, fh, offset, size):
            return os.pread(self.fd, size, offset)

        async def write(self, fh, offset, data):
            return os.pwrite(self.fd, data, offset)

    pyfuse3.init(OneFile(), folder, set(pyfuse3.default_options))
    print("ready", flush=True)
    trio.run(pyfuse3.main)


if __name__ == "__main__":
    serve(*sys.argv[1:])
