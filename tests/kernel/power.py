"""Power cuts: the writes of a filesystem recorded by dm-log-writes, and its disk after each cut.

The log has the writes in the order in which they became durable: those of a volatile cache follow
when a flush has ended, those with FUA when they have (Documentation/admin-guide/device-mapper/
log-writes.rst). Each beginning of it is what a cut may leave. A cache also writes back what it
likes: so is each beginning up to a flush, with the FUA writes and any of the others up to the next.
"""

import contextlib
import ctypes
import fcntl
import itertools
import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.support import let_go, run

FLUSH, FUA, DISCARD, MARK = 1, 2, 4, 8
_MAGIC, _SECTOR = 0x6A736677736872, 512  # of <linux/drivers/md/dm-log-writes.c>
_DM_IOCTL = struct.Struct("=3I2I2iIIIQ128s129s7x")  # struct dm_ioctl of <linux/dm-ioctl.h>
_CREATE, _REMOVE, _SUSPEND, _LOAD, _MESSAGE = 3, 4, 6, 9, 14
_LOOP_SET_FD, _LOOP_CLR_FD = 0x4C00, 0x4C01


class Entry(NamedTuple):
    """A write of the log."""

    at: int
    """Where on the disk, in bytes."""
    size: int
    flags: int
    data: int
    """Where in the log its bytes are."""
    name: str
    """Of a mark."""


class Recorder:
    """A disk whose writes are logged, made of the devices for its content and for the log."""

    def __init__(self, disk: str, log: str) -> None:
        self._control = os.open("/dev/mapper/control", os.O_RDWR)
        self._name = f"dmabuf-log-{os.getpid()}".encode()
        size = int(run("blockdev", "--getsz", disk))
        minor = os.minor(self._call(_CREATE)[10])
        parameters = f"{disk} {log}".encode().ljust(256, b"\0")
        self._call(_LOAD, struct.pack("=QQiI16s", 0, size, 0, 0, b"log-writes") + parameters, 1)
        self._call(_SUSPEND)  # without the flag, it resumes
        self.path = f"/dev/dm-{minor}"

    def _call(self, command: int, data: bytes = b"", targets: int = 0) -> tuple[int, ...]:
        size = _DM_IOCTL.size
        head = (4, 0, 0, size + len(data), size, targets, 0, 0, 0, 0, 0, self._name, b"")
        message = bytearray(_DM_IOCTL.pack(*head) + data)
        fcntl.ioctl(self._control, 3 << 30 | size << 16 | 0xFD << 8 | command, message)
        return _DM_IOCTL.unpack(message[:size])

    def mark(self, name: str) -> None:
        """Write a mark, a word, to the log."""
        self._call(_MESSAGE, struct.pack("=Q", 0) + f"mark {name}".encode() + b"\0")

    def close(self) -> None:
        """Remove the disk. The log is complete."""
        let_go(lambda: self._call(_REMOVE))
        os.close(self._control)


@contextlib.contextmanager
def loop(image: Path) -> Iterator[str]:
    """A loop device over an image; its path."""
    device = run("losetup", "--find", "--show", image)
    try:
        yield device
    finally:
        run("losetup", "--detach", device)


class Mounter:
    """Mounts images, one after the other, at a folder."""

    def __init__(self, filesystem: str, folder: Path, device: str) -> None:
        self._filesystem, self.folder, self._device = filesystem, folder, device
        self._libc = ctypes.CDLL(None, use_errno=True)

    def mount(self, device: str) -> None:
        """Mount a device; the filesystem recovers by its journal."""
        kind = self._filesystem.encode()
        rc = self._libc.mount(device.encode(), os.fsencode(self.folder), kind, 0, None)
        assert rc == 0, os.strerror(ctypes.get_errno())

    def unmount(self) -> None:
        """Unmount it."""
        let_go(lambda: self._checked(self._libc.umount2(os.fsencode(self.folder), 0)))

    @staticmethod
    def _checked(rc: int) -> None:
        if rc:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    @contextlib.contextmanager
    def mounted(self, image: Path) -> Iterator[Path]:
        """Mount an image."""
        with open(self._device, "r+b", buffering=0) as device, image.open("r+b") as file:
            fcntl.ioctl(device, _LOOP_SET_FD, file.fileno())
            try:
                self.mount(self._device)
                try:
                    yield self.folder
                finally:
                    self.unmount()
            finally:
                let_go(lambda: fcntl.ioctl(device, _LOOP_CLR_FD))


def read_log(log: Path) -> list[Entry]:
    """Return the writes of a log."""
    entries: list[Entry] = []
    with log.open("rb") as file:
        magic, version, count, sector = struct.unpack("<QQQI", file.read(28))
        assert (magic, version) == (_MAGIC, 1)
        at = sector
        for _ in range(count):
            file.seek(at)
            where, size, flags, length = struct.unpack("<4Q", file.read(32))
            name = file.read(length).decode() if flags & MARK else ""
            at += sector
            entries.append(Entry(where * sector, size * sector, flags, at, name))
            at += 0 if flags & DISCARD else size * sector
    return entries


class Cut(NamedTuple):
    """What one power cut leaves."""

    position: int
    """The entry of the log up to which marks have passed."""
    image: Path
    how: str


def cuts(start: Path, log: Path, scratch: Path, seed: int, most: int) -> Iterator[Cut]:
    """Yield the disk after at most `most` power cuts, which a seed chooses.

    At each write with FLUSH or FUA and each mark, at as many other writes, and with a random part
    of what a cache held. `start` is the disk at the start of the log, and is changed.
    """
    entries, dice = read_log(log), random.Random(seed)
    kept = [at for at, one in enumerate(entries) if one.flags & (FLUSH | FUA | MARK)]
    others = sorted(set(range(len(entries))) - set(kept))
    whole = kept + dice.sample(others, min(len(others), len(kept)))
    flushes = [-1] + [at for at, one in enumerate(entries) if one.flags & FLUSH]
    groups = [pair for pair in itertools.pairwise(flushes) if pair[1] - pair[0] > 2]
    plans = [(at, at) for at in whole] + groups * 3
    plans = sorted(dice.sample(plans, min(len(plans), most)))
    applied = 0
    with log.open("rb") as source, start.open("r+b") as disk:
        for number, (first, last) in enumerate(plans):
            for entry in entries[applied : first + 1]:
                _apply(entry, source.fileno(), disk.fileno())
            applied = max(applied, first + 1)
            _copy(start, scratch)
            how = f"cut {number} of seed {seed}, after write {first} of {len(entries)}"
            if last > first:
                part = [one for one in entries[first + 1 : last] if _survives(one, dice)]
                with scratch.open("r+b") as copy:
                    for entry in part:
                        _apply(entry, source.fileno(), copy.fileno())
                how += f" and {len(part)} of {last - first - 1} before the next flush"
            yield Cut(max(first, last - 1), scratch, how)


def _survives(entry: Entry, dice: random.Random) -> bool:
    return bool(entry.flags & (FUA | MARK)) or dice.random() < 0.5


def _apply(entry: Entry, log: int, disk: int) -> None:
    if entry.flags & MARK:
        return
    zeros = entry.flags & DISCARD
    data = bytes(entry.size) if zeros else os.pread(log, entry.size, entry.data)
    assert os.pwrite(disk, data, entry.at) == entry.size


def _copy(source: Path, target: Path) -> None:
    """Copy a sparse file."""
    with source.open("rb") as one, target.open("wb") as other:
        end = os.fstat(one.fileno()).st_size
        at = 0
        with contextlib.suppress(OSError):  # ENXIO: there is no data behind
            while at < end:
                at = os.lseek(one.fileno(), at, os.SEEK_DATA)
                hole = os.lseek(one.fileno(), at, os.SEEK_HOLE)
                os.lseek(other.fileno(), at, os.SEEK_SET)
                while at < hole:
                    at += os.sendfile(other.fileno(), one.fileno(), at, hole - at)
        other.truncate(end)


def positions(log: Path) -> dict[str, int]:
    """Return the entry of each mark."""
    return {one.name: at for at, one in enumerate(read_log(log)) if one.flags & MARK}


@contextlib.contextmanager
def recording(
    filesystem: str, folder: Path, mountpoint: Path
) -> Iterator[tuple[Recorder, Path, Path]]:
    """Make a filesystem, and mount it with its writes recorded.

    Yields the recorder, and the paths of the disk at the start and of the log.
    """
    run("modprobe", "dm-log-writes")
    run("modprobe", "loop")
    start, disk, log = (folder / name for name in ("start", "disk", "log"))
    size = {"ext4": 64, "xfs": 320, "btrfs": 128}[filesystem] << 20
    for image, nbytes in ((start, size), (log, 256 << 20)):
        with image.open("wb") as file:
            file.truncate(nbytes)
    quiet = {"ext4": ["-F", "-q"], "xfs": ["-f", "-q"], "btrfs": ["-f", "-q"]}[filesystem]
    run(f"mkfs.{filesystem}", *quiet, start)
    _copy(start, disk)
    mountpoint.mkdir(exist_ok=True)
    with loop(disk) as one, loop(log) as other:
        mounter = Mounter(filesystem, mountpoint, "")
        recorder = Recorder(one, other)
        try:
            mounter.mount(recorder.path)
            try:
                yield recorder, start, log
            finally:
                mounter.unmount()
        finally:
            recorder.close()


__all__ = ["Cut", "Entry", "Mounter", "Recorder", "cuts", "loop", "positions", "recording"]
