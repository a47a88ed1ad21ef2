"""Layouts: where the bytes of a file lie on its block device, for the native reads of files.

The kernel registers dma-bufs for block devices and not for files. So a file is read natively
through its block device: the core gets the file's extents and reads the file's ranges there. The
filesystem does not notice, and may move or free the blocks meanwhile. So the file's dirty pages are
written out first, and after the read the extents, the size and the timestamps must be those of
before. Otherwise the range is read again.
"""

from __future__ import annotations

import errno
import mmap
import os
import time
import weakref
from bisect import bisect_right
from typing import Any

from dmabuf._core import ffi
from dmabuf.errors import os_error
from dmabuf.kernel import extents, files, process
from dmabuf.memory import Buffer
from dmabuf.transfer.engine import Engine, Job
from dmabuf.transfer.ring import Refusal
from dmabuf.transfer.run import Segments

READS = 3
"""How often a range is read natively while other programs change the file."""
UNSTEADY = f"the file changed while it was read natively, {READS} times in a row"
ONLY_READS = (
    "files do not move dma-bufs themselves (EOPNOTSUPP), and only reads go through the block device"
)
SMALL_IS_DIRECT = (
    "up to 1 MiB is read directly by one system call, without looking its place on the device up"
)

_SETTLING = 0.1
"""Seconds to wait for the clock of timestamps to go on: it ticks at least every 10 ms."""


class Disk:
    """A block device that is open for native reads of the files on it."""

    def __init__(self, engine: Engine, file: int) -> None:
        self._engine = engine
        self.fd, self.path = extents.open_device(file)

    def native_refusal(self, buffer: Buffer, start: int, end: int) -> Refusal | None:
        """Register a part of a dma-buf for the device, or return why that is refused."""
        refusal = self._engine.native_refusal(buffer, self.fd, start, end)
        if refusal is not None and refusal.errno == errno.EOPNOTSUPP:
            why = (
                f"the file's device {self.path} does not move dma-bufs itself (EOPNOTSUPP): the "
                "filesystem has to be on an NVMe namespace or a partition of one"
            )
            return refusal._replace(why=why)
        return refusal

    @process.finalizer
    def __del__(self) -> None:
        fd = getattr(self, "fd", -1)
        if fd >= 0:
            self._engine.forget_files((fd,))
            os.close(fd)


_disks: weakref.WeakValueDictionary[tuple[int, int], Disk] = weakref.WeakValueDictionary()
"""The open devices by engine and number. Files share them, and so what is registered for them."""


def disk_of(engine: Engine, file: int) -> Disk:
    """Return the block device of an open file, opened once for all files of an engine.

    Raises:
        OSError: with the reason, as `extents.open_device`.
    """
    key = id(engine), os.fstat(file).st_dev
    disk = _disks.get(key)
    if disk is None:
        disk = _disks[key] = Disk(engine, file)
    return disk


class Layout:
    """Where a range of a file lay on its device before a read."""

    def __init__(self, file: files.Direct, disk: Disk, segments: Segments, measure: Any) -> None:
        """Write the file's dirty pages out, and look its extents up.

        Args:
            file: the file, opened with O_DIRECT for longer than this.
            disk: its block device.
            segments: what is to be read of it; a part of it is before the end of the file.
            measure: the core's struct dmb_measure of the segments.

        Raises:
            OSError: with the reason why the device cannot be read in the file's place.
        """
        size = measure.file_size
        self._file, self._disk, self.path = file.fd, disk, disk.path
        self._range = measure.file_start, min(measure.file_end, size)
        self._state = _stable_state(file.fd)._replace(size=size)
        self._extents = _stable_extents(file, *self._range)
        self._written = _joined(self._extents)
        self._array: Any = ffi.new("struct dmb_extent[]", [part[:3] for part in self._written])
        self._nbytes = self._holes = 0
        for offset, _, length in segments:
            end = max(offset, min(offset + length, size))
            written = self._written_in(offset, end)
            self._nbytes += written
            self._holes += end - offset - written

    def changed(self) -> bool:
        """Return whether the file is another one than before, by all that can be seen of it."""
        try:
            now = extents.extents_of(self._file, *self._range, flush=False)
        except OSError:
            return True
        return now != self._extents or extents.state_of(self._file) != self._state

    def objection(self, no_cpu: str | None) -> str | None:
        """Return why the segments cannot be read; `no_cpu` is why the CPU writes no zeros."""
        if not self._nbytes:
            return "nothing of the range is written: it reads as zeros, which no device moves"
        if self._holes and no_cpu:
            return f"part of it is a hole of the file, for the CPU to fill with zeros, and {no_cpu}"
        return None

    def apply(self, job: Job) -> None:
        """Have a job of reading the segments natively read the device in place of the file."""
        job.core.fd = self._disk.fd
        job.core.extents, job.core.extent_count = self._array, len(self._written)
        job.by_cpu = job.by_cpu or self._holes > 0
        job.changed = self.changed

    def _written_in(self, start: int, end: int) -> int:
        found = 0
        index = bisect_right(self._written, start, key=lambda part: part.offset + part.size)
        while index < len(self._written) and (part := self._written[index]).offset < end:
            found += min(end, part.offset + part.size) - max(start, part.offset)
            index += 1
        return found


def _stable_state(file: int) -> extents.State:
    """Return a file's state once any later change makes another one.

    Raises:
        OSError: EBUSY, the file changed less than a clock tick ago, again and again.
    """
    deadline = time.monotonic() + _SETTLING
    while True:
        state = extents.state_of(file)
        if state.shows_changes():
            return state
        if time.monotonic() > deadline:
            text = "the file changed a moment ago: another change might not show in its ctime"
            raise os_error(errno.EBUSY, text, None)
        time.sleep(0.001)


def _stable_extents(file: files.Direct, start: int, end: int) -> list[extents.Extent]:
    """Return the extents of a range once the device has the bytes of each.

    e4defrag (EXT4_IOC_MOVE_EXT) gives a page other blocks, and marks it dirty afterwards. It holds
    the inode's lock meanwhile, which a read with O_DIRECT takes, too. So what moved before the
    first lookup is dirty after that read, and the second lookup writes it out. What moved later
    makes the two lookups differ.

    Raises:
        OSError: EBUSY, they differed again and again; another errno, as `extents.extents_of`.
    """
    align = file.alignment.offset
    with mmap.mmap(-1, align) as memory:
        for _ in range(READS):
            before = extents.extents_of(file.fd, start, end, flush=True)
            os.preadv(file.fd, [memory], start // align * align)
            found = extents.extents_of(file.fd, start, end, flush=True)
            if found == before:
                return found
    raise os_error(errno.EBUSY, "another program moves the blocks of the file", None)


def _joined(found: list[extents.Extent]) -> list[extents.Extent]:
    """Return the written extents; those that are adjacent in the file and on the device as one."""
    joined: list[extents.Extent] = []
    for one in found:
        if not one.written:
            continue
        last = joined[-1] if joined else None
        if last and (last.offset + last.size, last.place + last.size) == (one.offset, one.place):
            joined[-1] = last._replace(size=last.size + one.size)
        else:
            joined.append(one)
    return joined
