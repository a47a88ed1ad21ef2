"""Show that an asynchronous O_DIRECT write to a block device leaves old pages in its page cache.

    python3 bdev_stale_cache.py DEVICE [ROUNDS]    (root; overwrites 4 MiB at the device's start)

Each round writes 4 MiB with O_DIRECT while a thread reads the same range without O_DIRECT, once by
pwrite(2) and once by io_submit(2). After the write has ended, and the reader stands still, a read
through the page cache is compared with what was written. Then one byte of each 512 KiB is written
through the page cache, fsync(2) is called, and the medium is compared.
"""

import ctypes
import mmap
import os
import struct
import sys
import threading

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
SETUP, GETEVENTS, SUBMIT = (
    (206, 208, 209) if os.uname().machine == "x86_64" else (0, 4, 2)  # as on arm64
)
IOCB_CMD_PWRITE = 1
SIZE, STEP = 4 << 20, 512 << 10
context = ctypes.c_ulong(0)


def address(memory: mmap.mmap) -> int:
    """Return where the mapping begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def call(number: int, *arguments: object) -> int:
    """Make a system call; raise OSError for an errno."""
    done: int = libc.syscall(ctypes.c_long(number), *arguments)
    if done < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return done


def write_async(fd: int, memory: mmap.mmap) -> int:
    """Write the memory by io_submit(2), and wait for the end; return the number of bytes."""
    fields = (0, 0, 0, IOCB_CMD_PWRITE, 0, fd, address(memory), SIZE, 0, 0, 0, 0)
    iocb = ctypes.create_string_buffer(struct.pack("=QIiHhIQQqQII", *fields))
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(iocb))
    call(SUBMIT, context, ctypes.c_long(1), pointers)
    event = (ctypes.c_longlong * 4)()  # data, obj, res, res2
    call(GETEVENTS, context, ctypes.c_long(1), ctypes.c_long(1), event, None)
    return int(event[2])


class Reader(threading.Thread):
    """Reads the range through the page cache, all of it again and again, while it is on."""

    def __init__(self, path: str) -> None:
        super().__init__(daemon=True)
        self.fd = os.open(path, os.O_RDONLY)
        self.on, self.idle = threading.Event(), threading.Lock()

    def run(self) -> None:
        """Read for ever."""
        while self.on.wait():
            with self.idle:
                os.pread(self.fd, SIZE, 0)


def rounds(path: str, count: int, asynchronous: bool) -> None:
    """Write so many times; print how often the cache was stale, and the medium then wrong."""
    direct, plain = os.open(path, os.O_RDWR | os.O_DIRECT), os.open(path, os.O_RDWR)
    memory, medium = mmap.mmap(-1, SIZE), mmap.mmap(-1, SIZE)
    reader = Reader(path)
    reader.start()
    stale = lost = 0
    for _ in range(count):
        memory[:] = data = os.urandom(SIZE)
        reader.on.set()
        wrote = write_async(direct, memory) if asynchronous else os.pwrite(direct, memory, 0)
        reader.on.clear()
        assert wrote == SIZE
        with reader.idle:
            os.preadv(direct, [medium], 0)
            assert medium[:] == data, "the write did not reach the medium"
            stale += os.pread(plain, SIZE, 0) != data
            for at in range(0, SIZE, STEP):
                os.pwrite(plain, data[at : at + 1], at)  # the byte that is there already
            os.fsync(plain)
            os.preadv(direct, [medium], 0)
            lost += medium[:] != data
    how = "io_submit(2)" if asynchronous else "pwrite(2)"
    print(f"{how}: {stale} of {count} stale in the page cache, {lost} of {count} destroyed later")


def main() -> None:
    """Try both ways to write."""
    path, count = sys.argv[1], int((*sys.argv[2:], 60)[0])
    call(SETUP, ctypes.c_uint(8), ctypes.byref(context))
    print(f"Linux {os.uname().release}, {path}")
    for asynchronous in (False, True):
        rounds(path, count, asynchronous)


if __name__ == "__main__":
    main()
