"""Shows, without dmabuf, that Linux waits for itself where a dma-buf has a fanotify mark.

    python3 tests/kernel/fanotify_waits.py system|memfd [SECONDS]    (root, in the lab alone)

An evictable mark (fanotify_mark(2), Linux 5.19) goes with its inode, and the group's fdinfo has
each that is left. To list them the kernel locks the group and takes a reference to each inode. If
that is the last one by then, the inode goes, and to take its mark away the group is locked once
more. Two threads list the marks, one makes dma-bufs of the system heap, marks and closes them: they
come to a stop that nothing ends, SIGKILL neither. A memfd has no links (st_nlink), and so its mark
goes before its last reference.
"""

import ctypes
import fcntl
import os
import struct
import sys
import threading
import time

libc = ctypes.CDLL(None, use_errno=True)

FAN_UNLIMITED_MARKS = 0x20
MARK = 0x1 | 0x20 | 0x40 | 0x200  # FAN_MARK_ADD, _IGNORED_MASK, _IGNORED_SURV_MODIFY, _EVICTABLE
FAN_OPEN = 0x20
DMA_HEAP_IOCTL_ALLOC = 0xC0184800
PAGE = 4096


def make(kind: str) -> int:
    if kind == "memfd":
        return os.memfd_create("marked")
    heap = os.open("/dev/dma_heap/system", os.O_RDWR)
    asked = bytearray(struct.pack("QIIQ", PAGE, 0, os.O_RDWR | os.O_CLOEXEC, 0))
    fcntl.ioctl(heap, DMA_HEAP_IOCTL_ALLOC, asked)
    os.close(heap)
    return struct.unpack("QIIQ", asked)[1]


def main(kind: str, seconds: float) -> int:
    group = libc.fanotify_init(FAN_UNLIMITED_MARKS, 0)
    assert group >= 0, os.strerror(ctypes.get_errno())
    counts = {"listed": 0, "closed": 0}

    def list_them() -> None:
        while True:
            with open(f"/proc/self/fdinfo/{group}", "rb") as file:
                file.read()
            counts["listed"] += 1

    def mark_and_close() -> None:
        while True:
            fd = make(kind)
            marked = libc.fanotify_mark(group, MARK, ctypes.c_uint64(FAN_OPEN), fd, None)
            assert marked == 0, os.strerror(ctypes.get_errno())
            os.close(fd)
            counts["closed"] += 1

    for work in (list_them, list_them, mark_and_close):
        threading.Thread(target=work, daemon=True).start()
    last, since, end = -1, time.monotonic(), time.monotonic() + seconds
    while time.monotonic() < end and time.monotonic() - since < 5:
        if counts["listed"] != last:
            last, since = counts["listed"], time.monotonic()
        time.sleep(0.1)
    stands = time.monotonic() - since >= 5
    print(f"{os.uname().release}: {counts['closed']} closed, {last} times listed", flush=True)
    for task in os.listdir("/proc/self/task") if stands else ():
        with open(f"/proc/self/task/{task}/stack") as file:
            stack = file.read()
        if "destroy_inode" in stack:
            print("waits for ever:", stack, sep="\n", flush=True)
    os._exit(stands)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]) if sys.argv[2:] else 20)
