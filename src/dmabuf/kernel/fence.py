"""Fences: waiting for devices that still use a dma-buf, and exchanging fences with drivers.

What a fence is. Every dma-buf has a reservation object (struct dma_resv), a list of dma_fences:
one for each job that a driver has queued on the memory, with its access, read or write. The driver
adds it when the job is submitted and signals it, once and for ever, when the job has ended; the
kernel requires this to happen in finite time (Documentation/driver-api/dma-buf.rst, "DMA
Fences"). These are the *implicit* fences: they belong to the buffer, and nobody has to pass
them on.

- poll(2) for POLLIN waits for the writers' fences: after it the memory may be read. POLLOUT waits
  for everyone's: after it the memory may be written (dma_buf_poll in drivers/dma-buf/dma-buf.c).
  The kernel's own moves of the memory count as writers. A poll that found a fence leaves a
  callback, which keeps the dma-buf alive until the fence signals, even if it is closed meanwhile.
- DMA_BUF_IOCTL_SYNC START waits for the same fences (READ for the writers', WRITE for
  everyone's), without bound, whatever the exporter. Hence the order here: poll with the timeout,
  then START. A job submitted between the two is waited for without one. END waits for nothing.
- EXPORT_SYNC_FILE (Linux 6.0) makes a descriptor of the fences there are now: jobs that come
  later are not in it. IMPORT_SYNC_FILE adds a sync file's fence to the dma-buf, as a reader's or
  a writer's. That is the bridge between implicit and explicit synchronization: Vulkan, and
  everything else that holds its fences in sync files. SYNC_IOC_MERGE makes one of two.

What is coherent, and when:

- *x86.* A device's DMA snoops the processor's caches, so whatever either wrote before the job was
  submitted, or the fence signalled, the other sees, and SYNC costs a system call. Not so where
  DMA goes through bounce buffers (swiotlb: encrypted guests, devices with narrow addresses),
  since SYNC is what copies then; nor for write-combined mappings of device memory, and the
  exporters' SYNC flushes what they gave out uncached.
- *ARM*, and every machine with devices that do not snoop. The processor's cached copies are stale
  after a device wrote, and the device does not see what is still in a cache. START invalidates,
  END cleans, over the whole dma-buf: 0.3 ms for a udmabuf of 4 MiB in an emulated machine.
  Without the bracket nothing is promised, whatever has signalled. A cache line that is partly
  written is cleaned whole, so a bracket around a partial write reads too.
- *What SYNC works on is the exporter's choice.* A dma-heap maintains each attached device's
  mapping, and none where nobody is attached; a udmabuf keeps one mapping of its own, made by the
  first START, and maintains that for all.
- *Native and direct transfers* need no bracket: the target device's DMA mapping of the memory,
  made by the kernel, does the cache work for that device. The edges are copied by the CPU, so a
  transfer that has any is bracketed like every other copy. Where the target device snoops and
  another, which does not, is to read what it brought, an empty bracket (map("r+")) writes back
  what the caches may hold.
- *PCIe.* A device's posted writes to host memory arrive in order, and its completion after them,
  so a completion the CPU sees is after the data. That holds for one destination: with
  peer-to-peer the data goes to another device's memory and the completion to the host's, by
  different ways, and only a read from the peer (or a job on it, ordered behind such a read)
  pushes the data ahead. With relaxed ordering, or a broken bridge, a full-length completion has
  been seen for bytes that never arrived. No fence shows this; comparing the bytes does.

What no fence promises:

- *Storage adds none.* io_uring, pread and the page cache know nothing of reservation objects, and
  a process cannot make a fence (it could not guarantee the end in finite time). A GPU job
  submitted during a transfer does not wait for it. So: storage waits for the GPU, here, by poll;
  the GPU's job is submitted after the transfer has returned, or waits on a timeline semaphore
  that the host signals then.
- *Bookkeeping fences are never shown* (DMA_RESV_USAGE_BOOKKEEP). Drivers with explicit
  synchronization (xe and nouveau with VM_BIND, amdgpu's user queues) put only those into the
  reservation object, if any: poll, SYNC and EXPORT_SYNC_FILE then answer "idle" while a job runs.
  Take the job's own sync file and import it, or wait for it with the API that submitted the job.
- *No exclusion.* Between the wait and the transfer, or during it, anyone may submit another job.
- *No success.* A job that failed signals its fence too, and then the fence is gone from the list;
  an exported sync file still reports it (SYNC_IOC_FILE_INFO's status is negative).
- *Not for a memfd*: it is not a dma-buf and has no reservation object, so there is nothing to wait
  for.

Signals interrupt a wait as PEP 475 describes: the handler runs, an exception that it raises ends
the wait, and otherwise the wait continues for the rest of its timeout.
"""

from __future__ import annotations

import errno
import math
import operator
import os
import select
import time
from collections.abc import Callable, Sequence
from typing import Literal, SupportsIndex

from dmabuf.errors import os_error
from dmabuf.kernel import uapi

Access = Literal["read", "write"]

_EVENTS: dict[str, int] = {"read": select.POLLIN, "write": select.POLLOUT}
_FLAGS: dict[str, int] = {"read": uapi.DMA_BUF_SYNC_READ, "write": uapi.DMA_BUF_SYNC_WRITE}
_LONGEST = 1 << 30
"""Milliseconds of one poll at most: it takes a C int, and this is twelve days."""
_TICK_MS = 100


def check_direction(direction: object) -> None:
    """Raise ValueError unless it is "read" or "write"."""
    if direction not in ("read", "write"):
        raise ValueError(f"invalid direction {direction!r}: use 'read' or 'write'")


def check_timeout(timeout: float | None) -> None:
    """Raise ValueError for a negative timeout, TypeError if it is not a number."""
    try:
        valid = timeout is None or timeout >= 0
    except TypeError:
        text = f"timeout must be a number of seconds, not {type(timeout).__name__}"
        raise TypeError(text) from None
    if not valid:
        raise ValueError(f"invalid timeout {timeout!r}: use 0 or more seconds, None for ever")


def pending(fds: Sequence[int], direction: Access) -> Sequence[int]:
    """Return the dma-bufs whose fences do not allow to read (write) them yet, without a wait."""
    event = _EVENTS[direction]
    poll = _register(fds, event)
    return _remaining(poll.poll(0), poll, fds, event)


def wait(
    fds: Sequence[int],
    direction: Access,
    timeout: float | None = None,
    *,
    spent: float = 0.0,
    path: str | None = None,
    tick: Callable[[], object] | None = None,
) -> None:
    """Wait until all of the dma-bufs may be read (or written).

    Args:
        fds: the descriptors of the dma-bufs.
        direction: "read" waits for writers, "write" for everyone.
        timeout: seconds for all of them together; None waits without limit.
        spent: seconds of the timeout that have passed.
        path: the file's name in the error.
        tick: called ten times a second while it waits; an exception from it ends the wait.

    Raises:
        TimeoutError: devices still use one of them.
    """
    left = pending(fds, direction) if fds else fds
    if not left:
        return
    deadline = math.inf if timeout is None else time.monotonic() + timeout - spent
    event = _EVENTS[direction]
    poll = _register(left, event)
    while left:
        seconds = deadline - time.monotonic()
        if seconds <= 0:
            raise os_error(errno.ETIMEDOUT, _still(direction, timeout, len(left), len(fds)), path)
        ms = None if seconds == math.inf else min(seconds * 1000, _LONGEST)
        if tick is not None:
            tick()
            ms = _TICK_MS if ms is None else min(ms, _TICK_MS)
        left = _remaining(poll.poll(ms), poll, left, event)


def _register(fds: Sequence[int], event: int) -> select.poll:
    poll = select.poll()
    for fd in fds:
        poll.register(fd, event)
    return poll


def _remaining(
    answers: list[tuple[int, int]], poll: select.poll, fds: Sequence[int], event: int
) -> Sequence[int]:
    """Return the dma-bufs that are still in use after a poll; remove the others from it."""
    if answers == [(fd, event) for fd in fds]:
        return ()
    done = dict(answers)
    for fd, events in done.items():
        if not events & event:
            what = "is closed" if events & select.POLLNVAL else "has no fences that could be polled"
            raise os_error(errno.EBADF, f"descriptor {fd}, a dma-buf of this buffer, {what}")
        poll.unregister(fd)
    return [fd for fd in fds if fd not in done]


def _still(direction: Access, timeout: float | None, left: int, total: int) -> str:
    what = "writes" if direction == "read" else "uses"
    where = "this buffer" if total == 1 else f"{left} of the {total} slabs needed"
    return (
        f"a device still {what} {where} after {timeout:.3g} s: its job has not signalled its "
        "fence; give timeout= more, or look at what the job waits for"
    )


def export_sync_file(fds: Sequence[int], direction: Access) -> int:
    """Return one sync file of the fences that `wait` would wait for now; the caller closes it."""
    merged = -1
    try:
        for fd in fds:
            try:
                one = uapi.export_sync_file(fd, _FLAGS[direction])
            except OSError as error:
                raise _explained(error, "taking a sync file of the buffer's fences") from None
            if merged < 0:
                merged = one
                continue
            try:
                both = uapi.merge_sync_files(merged, one)
            finally:
                os.close(one)
            merged, one = both, merged
            os.close(one)
    except BaseException:
        if merged >= 0:
            os.close(merged)
        raise
    return merged


def import_sync_file(fds: Sequence[int], sync_file: SupportsIndex, direction: Access) -> None:
    """Add a sync file's fence to each of the dma-bufs, as a writer's or a reader's."""
    number = _number(sync_file)
    for fd in fds:
        try:
            uapi.import_sync_file(fd, _FLAGS[direction], number)
        except OSError as error:
            raise _explained(error, f"descriptor {number}", "not a sync file") from None


def duplicate(sync_file: SupportsIndex) -> int:
    """Return another descriptor of a sync file, checked to be one; the caller closes it."""
    number = _number(sync_file)
    try:
        return uapi.merge_sync_files(number, number)
    except OSError as error:
        number_of, text = error.errno or errno.EIO, error.strerror
        if number_of in (errno.ENOTTY, errno.EINVAL):  # another kind of file has no such ioctl
            number_of, text = errno.EINVAL, "not a sync file"
        raise os_error(number_of, f"descriptor {number}: {text}") from None


def _number(sync_file: SupportsIndex) -> int:
    """Return a descriptor as an int; raise EBADF if it cannot be one."""
    number = operator.index(sync_file)
    if not 0 <= number < 1 << 31:
        raise os_error(errno.EBADF, f"descriptor {number}: {os.strerror(errno.EBADF)}")
    return number


def _explained(error: OSError, what: str, invalid: str | None = None) -> OSError:
    number = error.errno or errno.EIO
    text = error.strerror
    if number == errno.ENOTTY:
        text = "this kernel exchanges no fences of dma-bufs: Linux 6.0 with CONFIG_SYNC_FILE does"
    elif number == errno.EINVAL and invalid:
        text = invalid
    return os_error(number, f"{what}: {text}")
