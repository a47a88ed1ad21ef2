"""Show that ext4 of Linux 7.3 may zero blocks to which another O_DIRECT write has finished.

    modprobe loop; python3 ext4_zeroes.py [SECONDS]    (root)

A file has one extent of 2 MiB that is allocated and not yet written, and three more: as many as its
inode holds. The disk has no free block; those of a file that was cut are free only when the journal
has committed. Two threads write the extent with O_DIRECT, one its first 64 KiB, one the rest. When
the first write ends, ext4 splits the extent, has no block for the fifth one, zeroes the rest of the
extent instead (ext4_issue_zeroout) and marks all of it written. The other write is in flight, and
its bytes may reach the disk before the zeroes do. Both pwrite(2) calls return the full length.
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
    """Return what a command prints; raise CalledProcessError where it fails."""
    done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
    return done.stdout.strip()


def allocated(fd: int, start: int, size: int) -> bool:
    """Return whether fallocate(2) succeeds."""
    return libc.fallocate(fd, 0, ctypes.c_long(start), ctypes.c_long(size)) == 0


def free(folder: str) -> int:
    """Return the free bytes of a filesystem."""
    status = os.statvfs(folder)
    return status.f_bfree * status.f_frsize


def exhaust(folder: str, kept: int) -> int:
    """Leave no free block but those that wait for the journal; return the filler's descriptor."""
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
    """Return which of the two writes lost bytes, of those that returned the full length."""
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
    """Repeat for so many seconds, each time on a new filesystem."""
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
