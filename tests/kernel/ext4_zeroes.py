"""Shows, without dmabuf, that ext4 of Linux 7.3 may zero what O_DIRECT has written.

    modprobe loop; python3 tests/kernel/ext4_zeroes.py [SECONDS]    (root; in the lab or not)

A file has one extent of 2 MiB that is allocated and not yet written, and three more: as many as its
inode holds. The disk has no free block; those of a file cut short are not to be had before the
journal commits. Two threads write the extent with O_DIRECT, one its first 64 KiB, one the rest.
When the first write ends, ext4 splits the extent, has no block for the fifth, zeroes the rest
instead (ext4_issue_zeroout) and calls all of it written; the other write is still under way, and
its bytes may reach the disk before the zeroes do. Both pwrite(2)s tell that they wrote everything.
"""

import ctypes
import mmap
import os
import subprocess
import sys
import tempfile
import threading
import time

libc = ctypes.CDLL(None, use_errno=True)

MIB = 1 << 20
PARTS = (0, 65536), (65536, 2 * MIB)
BLOCK = 1024


def run(*command: object) -> str:
    done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
    return done.stdout.strip()


def allocated(fd: int, start: int, size: int) -> bool:
    return libc.fallocate(fd, 0, ctypes.c_long(start), ctypes.c_long(size)) == 0


def free(folder: str) -> int:
    status = os.statvfs(folder)
    return status.f_bfree * status.f_frsize


def exhaust(folder: str, kept: int) -> int:
    """Leave no free block but those that wait for the journal; the filler's descriptor."""
    filler = os.open(f"{folder}/filler", os.O_RDWR | os.O_CREAT)
    end, step = 0, 4 * MIB
    while step >= BLOCK:
        if allocated(filler, end, step):
            end += step
        else:  # it may have grown all the same
            os.ftruncate(filler, end)
            os.sync()
            step //= 2
    os.sync()
    reserve = free(folder)
    end -= 3 * MIB
    os.ftruncate(filler, end)
    assert allocated(filler, end, reserve - kept)
    return filler


def attempt(folder: str, memory: list[mmap.mmap], kept: int) -> list[int]:
    """Which of the two writes, of those that told that all was written, were lost."""
    path = f"{folder}/file"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    assert all(allocated(fd, at * MIB, size) for at, size in
               ((0, 2 * MIB), (4, 16384), (6, 16384), (8, 16384)))  # fmt: skip
    filler = exhaust(folder, kept)
    together, whole = threading.Barrier(2), [False, False]

    def write(number: int) -> None:
        start, end = PARTS[number]
        together.wait()
        whole[number] = os.pwrite(fd, memory[number], start) == end - start

    threads = [threading.Thread(target=write, args=[number]) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(fd)
    os.close(filler)
    with open(path, "rb") as file:
        got = file.read(2 * MIB)
    return [
        number
        for number, (start, end) in enumerate(PARTS)
        if whole[number] and got[start:end] != memory[number][:]
    ]


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 30
    memory = [mmap.mmap(-1, end - start) for start, end in PARTS]
    for number, one in enumerate(memory):
        one[:] = bytes([0x41 + number]) * len(one)
    tries = lost = 0
    until = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        image, mount = f"{folder}/image", f"{folder}/mount"
        with open(image, "wb") as file:
            file.truncate(64 * MIB)
        os.mkdir(mount)
        device = run("losetup", "--find", "--show", image)
        try:
            while time.monotonic() < until:
                run("mkfs.ext4", "-q", "-F", "-b", BLOCK, device)
                run("mount", device, mount)
                try:
                    lost += bool(attempt(mount, memory, BLOCK * (tries % 6)))
                    tries += 1
                finally:
                    run("umount", mount)
        finally:
            run("losetup", "--detach", device)
    print(f"Linux {os.uname().release}: {lost} of {tries} pairs of writes lost bytes")


if __name__ == "__main__":
    main()
