"""One ring of the core, with its tables of registered buffers and files."""

from __future__ import annotations

import errno
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from dmabuf._core import failure, ffi, lib
from dmabuf.kernel import log, process
from dmabuf.memory import Buffer

SLOT_SIZE = 1 << 30
"""Bytes of a buffer that one registered slot covers: the maximum of io_uring."""


class Ring:
    """One ring of the core with its tables of registered buffers and files.

    The thread that runs a job on the ring holds its lock. The tables have another lock, because any
    thread may close a buffer, and so unregister it, at any time.

    A signal handler may raise at the start and end of any call. So a slot goes from one list or
    table to another without a call between the two steps.
    """

    def __init__(self, backend: int, depth: int, owner: int | None, flags: int = 0) -> None:
        flags |= lib.DMB_RING_SINGLE_ISSUER if owner is not None else 0
        handle = ffi.new("struct dmb_ring **")
        rc = lib.dmb_ring_create(backend, depth, flags, handle)
        if rc:
            raise failure(-rc, "setting up io_uring" if backend == 0 else "starting threads")
        self.handle = handle[0]
        self.pid = process.pid
        self.lock = threading.Lock()
        self._owner = owner
        self.untidy = False
        """Whether slots of closed buffers and files remain to be cleared."""
        self.unpin: list[int] = []
        """Slots of closed buffers that `tidy` is to clear."""
        self.unregister: list[int] = []
        """Slots of closed dma-bufs that `tidy` is to clear."""
        self.unregister_elsewhere: Callable[[Ring], object] | None = None
        """What makes another thread call `unregister_all`. None if `tidy` may wait for the kernel,
        which takes about 18 ms to let go of a dma-buf."""
        self._forgotten: list[int] = []
        self._native_refusal: str | None = ""  # not probed yet
        self._natives: weakref.WeakKeyDictionary[Buffer, dict[int, NativeRegistration]] = (
            weakref.WeakKeyDictionary()
        )
        self.has_natives = False
        """Whether a dma-buf was ever entered."""
        info = ffi.new("struct dmb_ring_info *")
        lib.dmb_ring_get_info(self.handle, info)
        self.refused = os.strerror(-info.buffer_table) if info.buffer_table else ""
        # Reentrant: the collector may close a buffer, and so clear slots, at any allocation.
        self._tables = threading.RLock()
        self._free_buffers = list(range(lib.DMB_BUFFER_SLOTS - 1, -1, -1))
        self._free_files = list(range(lib.DMB_FILE_SLOTS - 1, -1, -1))
        self._buffers: dict[int, Registration] = {}  # by id(); each goes with its buffer
        self.files: dict[int, int] = {}
        """The slot of each registered descriptor."""

    def registration(self, buffer: Buffer) -> Registration:
        """Return the ring's slots for a buffer, all of them empty at first."""
        found = self._buffers.get(id(buffer))
        if found is None or found.buffer() is not buffer:
            with self._tables:
                if found is not None:  # of a buffer that is gone, whose id this one has now
                    found.clear()
                found = self._buffers.setdefault(id(buffer), Registration(self, buffer))
        return found

    def forget_buffer(self, key: int) -> None:
        """Drop the registration of a buffer that is being closed."""
        self._buffers.pop(key, None)

    def pin(self, slots: Any, index: int, address: int, size: int) -> int:
        """Pin memory in a free slot, which becomes `slots[index]`; return 0 or -errno."""
        return self._fill(slots, index, self.unpin, lib.dmb_ring_register_buffer, address, size)

    def register(self, slots: Any, index: int, dmabuf: int, target: int) -> int:
        """Register a dma-buf for an open file in a free slot, which becomes `slots[index]`.

        Returns 0 or -errno.
        """
        clear = self.unregister
        return self._fill(slots, index, clear, lib.dmb_ring_register_dmabuf, dmabuf, target)

    def _fill(
        self,
        slots: Any,
        index: int,
        clear: list[int],
        function: Callable[[Any, int, int, int], int],
        first: int,
        second: int,
    ) -> int:
        with self._tables:
            if not self._free_buffers:
                return -errno.ENOSPC
            slot = self._free_buffers[-1]
            del self._free_buffers[-1]
            try:
                rc = function(self.handle, slot, first, second)
            except BaseException:  # an interrupt, perhaps after the slot was filled
                clear.append(slot)
                self.untidy = True
                raise
            if rc == 0:
                slots[index] = slot
            else:
                self._free_buffers.append(slot)
            return rc

    def native_refusal(self) -> str | None:
        """Return why dma-bufs cannot be registered; probed once. None if they can."""
        if self._native_refusal == "":
            with self._tables:
                rc = int(lib.dmb_ring_probe_native(self.handle))
                self._native_refusal = no_native_kernel(-rc) if rc else None
        return self._native_refusal

    def native(self, buffer: Buffer, fd: int) -> NativeRegistration:
        """Return the ring's slots for a dma-buf and an open file, all of them empty at first."""
        with self._tables:
            self.has_natives = True
            by_file = self._natives.setdefault(buffer, {})
            if fd not in by_file:
                by_file[fd] = NativeRegistration(self, buffer, fd)
            return by_file[fd]

    @property
    def free_buffer_slots(self) -> int:
        """The number of slots that are empty and need no clearing."""
        return len(self._free_buffers)

    def renew_dmabuf_slot(self, slot: int, dmabuf: int, target: int) -> int:
        """Register a dma-buf again in its slot, and return 0 or -errno.

        The kernel replaces the registration in one step, so requests of other jobs never find the
        slot empty or with another buffer.
        """
        with self._tables:
            return int(lib.dmb_ring_register_dmabuf(self.handle, slot, dmabuf, target))

    def give(self, slots: Any, given: list[int]) -> None:
        """Take back the filled slots; `given` is `unpin` or `unregister`.

        They are cleared now, or at the next job if only the ring's owner may.
        """
        with self._tables:
            for index in range(len(slots)):
                slot = slots[index]
                slots[index] = -1
                if slot >= 0:
                    given.append(slot)
            self._tidy_soon()

    def _tidy_soon(self) -> None:
        with self._tables:
            self.untidy = True
            if self._owner in (None, threading.get_ident()):
                self.tidy()

    def tidy(self) -> None:
        """Clear the slots of closed buffers and files, or make another thread do so."""
        with self._tables:
            self.untidy = False
            try:
                self._clear(self.unpin, self._free_buffers, lib.dmb_ring_register_buffer, 0, 0)
                if self.unregister_elsewhere is None:
                    dmabuf = lib.dmb_ring_register_dmabuf
                    self._clear(self.unregister, self._free_buffers, dmabuf, -1, -1)
                elif self.unregister:
                    self.unregister_elsewhere(self)
                self._clear(self._forgotten, self._free_files, lib.dmb_ring_register_file, -1)
            except BaseException:  # an interrupt
                self.untidy = True
                raise

    def unregister_all(self) -> None:
        """Clear the slots of closed dma-bufs; for one thread, which no signal interrupts."""
        while self.unregister:
            slot = self.unregister.pop()
            if self.handle is not None:
                lib.dmb_ring_register_dmabuf(self.handle, slot, -1, -1)
            with self._tables:
                self._free_buffers.append(slot)

    def _clear(
        self, given: list[int], free: list[int], function: Callable[..., int], *nothing: int
    ) -> None:
        while given:
            slot = given[-1]
            del given[-1]
            try:
                if self.handle is not None:
                    function(self.handle, slot, *nothing)
            finally:
                free.append(slot)

    def file_slot(self, fd: int) -> int:
        """Register a descriptor that is not in `files`, and return its slot; -1 if none is free."""
        with self._tables:
            if not self._free_files:
                return -1
            slot = self._free_files[-1]
            del self._free_files[-1]
            try:
                rc = lib.dmb_ring_register_file(self.handle, slot, fd)
            except BaseException:  # an interrupt, perhaps after the slot was filled
                self._forgotten.append(slot)
                self.untidy = True
                raise
            if rc:
                self._free_files.append(slot)
                return -1
            self.files[fd] = slot
            return slot

    def forget_file(self, fd: int) -> None:
        """Remove a descriptor from the tables, before it is closed."""
        with self._tables:
            for buffer, by_file in list(self._natives.items()):
                if fd in by_file:
                    gone = by_file[fd]
                    gone.clear()
                    buffer.not_on_close(gone.clear)
                    by_file.pop(fd, None)  # last: an interrupted call is repeated
            slot = self.files.get(fd)
            if slot is not None:
                del self.files[fd]
                self._forgotten.append(slot)
            self._tidy_soon()
            if self._owner == threading.get_ident() and self.handle is not None:
                lib.dmb_ring_run_deferred(self.handle)

    def close(self) -> None:
        """Destroy the ring, on which no job may be running."""
        if self.pid != process.pid:
            # A forked child has the ring's memory but none of its threads, and perhaps a lock that
            # one of them held, so it must not destroy the ring.
            self.handle = None
            return
        with self._tables:
            handle, self.handle = self.handle, None
            if handle is not None:
                lib.dmb_ring_destroy(handle)
            for registration in list(self._buffers.values()):
                registration.detach()
            for buffer, by_file in list(self._natives.items()):
                for native in by_file.values():
                    buffer.not_on_close(native.clear)

    @process.finalizer
    def __del__(self) -> None:
        if getattr(self, "handle", None) is not None:
            self.close()


class Refusal(NamedTuple):
    """Why a dma-buf was not registered."""

    errno: int
    why: str


class NativeRegistration:
    """The slots of a dma-buf's slabs for one open file, each filled when a job first needs it."""

    def __init__(self, ring: Ring, buffer: Buffer, fd: int) -> None:
        self.slots = ffi.new("int32_t[]", [-1] * len(buffer.slabs))
        self.error = 0
        self._ring = ring
        self._fd = fd
        buffer.on_close(self.clear)

    def fill(self, buffer: Buffer, first: int, last: int) -> Refusal | None:
        """Register the slabs first..last; return None, or the first refusal."""
        missing = [index for index in range(first, last + 1) if self.slots[index] < 0]
        free = self._ring.free_buffer_slots
        if len(missing) > free:
            return Refusal(errno.ENOSPC, _table_is_full(len(missing), free))
        for index in missing:
            rc = self._ring.register(self.slots, index, buffer.slabs[index].fd, self._fd)
            if rc:
                return Refusal(-rc, why_not_native(-rc))
        return None

    def renew(self, buffer: Buffer) -> bool:
        """Register the filled slots again; return whether all were accepted."""
        renewed = True
        for slab, slot in zip(buffer.slabs, self.slots, strict=True):
            if slot >= 0:
                rc = self._ring.renew_dmabuf_slot(slot, slab.fd, self._fd)
                log.info("registered slot %d again: %s", slot, os.strerror(-rc))
                renewed = renewed and not rc
        return renewed

    def clear(self) -> None:
        """Return all slots to the ring."""
        self._ring.give(self.slots, self._ring.unregister)


class Registration:
    """The slots of a buffer in one ring, one for each GiB, filled when a job first needs it."""

    def __init__(self, ring: Ring, buffer: Buffer) -> None:
        count = -(-buffer.size // SLOT_SIZE)
        self.slots = ffi.new("int32_t[]", [-1] * count)
        self.seen = 0
        """Bytes that jobs have moved."""
        self.refused = buffer.registration_refusal
        self._ring = ring
        self._key = id(buffer)
        self.buffer = weakref.ref(buffer)
        """The buffer, if it still exists."""
        buffer.on_close(self.clear)

    def detach(self) -> None:
        """Cancel the callback on the buffer, because the ring is closed."""
        buffer = self.buffer()
        if buffer is not None:
            buffer.not_on_close(self.clear)

    def fill(self, buffer: Buffer, first: int, last: int) -> bool:
        """Register the slots first..last; return whether all of them are registered.

        After a refusal the reason is kept in `refused` and no other slot is tried.
        """
        for index in range(first, last + 1):
            if self.slots[index] >= 0:
                continue
            if self.refused:
                return False
            start = index * SLOT_SIZE
            size = min(SLOT_SIZE, buffer.size - start)
            rc = self._ring.pin(self.slots, index, (buffer.address or 0) + start, size)
            if rc:
                self.refused = _why_not_registered(-rc)
                log.info("not registering %r: %s", buffer, self.refused)
                return False
        return True

    def clear(self) -> None:
        """Unpin all slots, because the buffer is about to be unmapped."""
        self._ring.give(self.slots, self._ring.unpin)
        self._ring.forget_buffer(self._key)


def _why_not_registered(number: int) -> str:
    if number == errno.ENOMEM:
        return (
            "RLIMIT_MEMLOCK does not allow pinning it (ENOMEM): raise it with `ulimit -l`, or run "
            "with CAP_IPC_LOCK"
        )
    if number == errno.EFAULT:
        return "its mapping has no pages to pin, or is read-only (EFAULT)"
    return f"registering it failed: {os.strerror(number)}"


def why_no_uring(number: int) -> str:
    """Return why io_uring_setup(2) failed, with the fix."""
    if number == errno.EPERM:
        return (
            "io_uring is refused (EPERM): kernel.io_uring_disabled forbids it, or a seccomp "
            "filter such as a container's default one does: allow io_uring_setup there"
        )
    if number == errno.ENOSYS:
        return (
            "io_uring is missing (ENOSYS): the kernel is older than 5.11 or built without "
            "CONFIG_IO_URING, or a seccomp filter hides it"
        )
    if number == errno.ENOMEM:
        return "io_uring is refused (ENOMEM): raise RLIMIT_MEMLOCK with `ulimit -l`"
    return f"io_uring is refused: {os.strerror(number)}"


def no_native_kernel(number: int) -> str:
    """Return why the probe for dma-buf registered buffers failed."""
    if number == errno.EINVAL:
        return (
            "this kernel has no dma-buf registered buffers (EINVAL): it needs the series "
            '"Add dmabuf read/write via io_uring"'
        )
    return f"dma-bufs cannot be registered with this engine: {os.strerror(number)}"


def _table_is_full(wanted: int, free: int) -> str:
    return (
        f"the transfer touches {wanted} more slabs, and {free} slots are free of the "
        f"{lib.DMB_BUFFER_SLOTS} of a ring's table: close other buffers, or use larger slabs"
    )


def why_not_native(number: int) -> str:
    """Return why a dma-buf was not registered for a target, or its first request failed."""
    if number == errno.EOPNOTSUPP:
        return (
            "the target does not move dma-bufs itself (EOPNOTSUPP); open an NVMe namespace or its "
            "partition as a block device"
        )
    if number == errno.ENOMEM:
        return "the device could not map the dma-buf (ENOMEM): slabs of at most 1 GiB are safe"
    if number == errno.EFAULT:
        return "the device could not reach the dma-buf (EFAULT)"
    return f"the dma-buf could not be registered for the target: {os.strerror(number)}"
