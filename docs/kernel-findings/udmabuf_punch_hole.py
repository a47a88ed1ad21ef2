"""Show that a hole punched into a memfd separates it from the udmabuf that was made of it.

    python3 udmabuf_punch_hole.py    (whoever may open /dev/udmabuf)

The memfd and the dma-buf share their pages. After FALLOC_FL_PUNCH_HOLE they do not, and nothing
reports it: what is written to one is never seen by the other.
"""

import ctypes
import fcntl
import mmap
import os
import struct

SIZE = 16 << 10
UDMABUF_CREATE = 1 << 30 | 24 << 16 | ord("u") << 8 | 0x42
KEEP_SIZE, PUNCH_HOLE = 1, 2

libc = ctypes.CDLL(None, use_errno=True)


def shared(memfd: int, view: mmap.mmap) -> list[bool]:
    """Return whether each page of the dma-buf shows what was just written to the memfd."""
    found = []
    for at in range(0, SIZE, mmap.PAGESIZE):
        word = os.urandom(8)
        os.pwrite(memfd, word, at)
        found.append(view[at : at + 8] == word)
    return found


def main() -> None:
    """Punch out the second page, and compare before and after."""
    memfd = os.memfd_create("memory", os.MFD_ALLOW_SEALING)
    os.ftruncate(memfd, SIZE)
    fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    device = os.open("/dev/udmabuf", os.O_RDWR)
    made = fcntl.ioctl(device, UDMABUF_CREATE, bytearray(struct.pack("=IIQQ", memfd, 0, 0, SIZE)))
    view = mmap.mmap(made, SIZE)
    print(f"Linux {os.uname().release}")
    print("pages shared before:", shared(memfd, view))
    at, size = ctypes.c_long(mmap.PAGESIZE), ctypes.c_long(mmap.PAGESIZE)
    if libc.fallocate(memfd, KEEP_SIZE | PUNCH_HOLE, at, size):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    print("pages shared after :", shared(memfd, view))
    try:
        fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        print("F_SEAL_WRITE, which would forbid it: accepted beside the dma-buf")
    except OSError as error:
        print("F_SEAL_WRITE, which would forbid it:", error.strerror)


if __name__ == "__main__":
    main()
