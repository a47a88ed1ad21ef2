"""One ring of the core, with its tables of registered buffers and files."""

from __future__ import annotations

import errno
import os
import threading
import weakref
from typing import NamedTuple

from dmabuf import _log, _process
from dmabuf._ffi import failure, ffi, lib
from dmabuf.buffer import Buffer

SLOT_SIZE = 1 << 30
"""Bytes of a buffer that one registered slot covers: io_uring takes no more."""


class Ring:
    """One ring of the core with its tables of registered buffers and files.

    The ring's lock is held by whoever runs a job on it; the tables have a lock of their own,
    since a buffer may be closed, and so unregistered, from any thread at any time.
    """

    def __init__(self, backend: int, depth: int, owner: int | None, flags: int) -> None:
        flags |= lib.DMB_RING_SINGLE_ISSUER if owner is not None else 0
        handle = ffi.new("struct dmb_ring **")
        rc = lib.dmb_ring_create(backend, depth, flags, handle)
        if rc:
            raise failure(-rc, "setting up io_uring" if backend == 0 else "starting threads")
        self.handle = handle[0]
        self.pid = _process.pid
        self.lock = threading.Lock()
        self._owner = owner
        self._unpin: list[int] = []
        self._unregister: list[int] = []
        self._forgotten: list[int] = []
        self._native_refusal: str | None = ""  # not asked yet
        self._natives: weakref.WeakKeyDictionary[Buffer, dict[int, NativeRegistration]] = (
            weakref.WeakKeyDictionary()
        )
        info = ffi.new("struct dmb_ring_info *")
        lib.dmb_ring_get_info(self.handle, info)
        self.refused = os.strerror(-info.buffer_table) if info.buffer_table else ""
        # Reentrant: the collector may close a buffer, and so clear slots, at any allocation.
        self._tables = threading.RLock()
        self._free_buffers = list(range(lib.DMB_BUFFER_SLOTS - 1, -1, -1))
        self._free_files = list(range(lib.DMB_FILE_SLOTS - 1, -1, -1))
        self._buffers: weakref.WeakKeyDictionary[Buffer, Registration] = weakref.WeakKeyDictionary()
        self._files: dict[int, int] = {}

    def registration(self, buffer: Buffer) -> Registration:
        """The ring's slots for a buffer, none of them filled at first."""
        with self._tables:
            found = self._buffers.get(buffer)
            if found is None:
                found = self._buffers[buffer] = Registration(self, buffer)
        return found

    def take_buffer_slot(self, address: int, size: int) -> int:
        """Pin memory into a free slot; the slot, or -errno."""
        with self._tables:
            if not self._free_buffers:
                return -errno.ENOSPC
            slot = self._free_buffers.pop()
            rc = int(lib.dmb_ring_register_buffer(self.handle, slot, address, size))
            if rc == 0:
                return slot
            self._free_buffers.append(slot)
            return rc

    def native_refusal(self) -> str | None:
        """Why dma-bufs cannot be registered with this ring; found by doing, once."""
        if self._native_refusal == "":
            with self._tables:
                rc = int(lib.dmb_ring_probe_native(self.handle))
                self._native_refusal = no_native_kernel(-rc) if rc else None
        return self._native_refusal

    def native(self, buffer: Buffer, fd: int) -> NativeRegistration:
        """The ring's slots for a dma-buf and an open file, none of them filled at first."""
        with self._tables:
            by_file = self._natives.setdefault(buffer, {})
            if fd not in by_file:
                by_file[fd] = NativeRegistration(self, buffer, fd)
            return by_file[fd]

    @property
    def free_buffer_slots(self) -> int:
        """How many slots are neither filled nor still to be cleared by the owner."""
        return len(self._free_buffers)

    def take_dmabuf_slot(self, dmabuf: int, target: int) -> int:
        """Register a dma-buf for an open file in a free slot; the slot, or -errno."""
        with self._tables:
            if not self._free_buffers:
                return -errno.ENOSPC
            slot = self._free_buffers.pop()
            rc = int(lib.dmb_ring_register_dmabuf(self.handle, slot, dmabuf, target))
            if rc == 0:
                return slot
            self._free_buffers.append(slot)
            return rc

    def renew_dmabuf_slot(self, slot: int, dmabuf: int, target: int) -> int:
        """Register a dma-buf anew in the slot that it has; 0 or -errno.

        In one step: requests of other jobs name the slot meanwhile, and it may not become empty, or
        another's.
        """
        with self._tables:
            return int(lib.dmb_ring_register_dmabuf(self.handle, slot, dmabuf, target))

    def give_dmabuf_slot(self, slot: int) -> None:
        """Clear a dma-buf's slot; where only the ring's owner may, it does so at its next job."""
        with self._tables:
            self._unregister.append(slot)
            if self._owner in (None, threading.get_ident()):
                self.tidy()

    def give_buffer_slot(self, slot: int) -> None:
        """Unpin what a slot holds; where only the ring's owner may, it does so at its next job."""
        with self._tables:
            self._unpin.append(slot)
            if self._owner in (None, threading.get_ident()):
                self.tidy()

    def tidy(self) -> None:
        """Clear the slots that buffers and files closed since have left."""
        with self._tables:
            while self._unpin:
                slot = self._unpin.pop()
                if self.handle is not None:
                    lib.dmb_ring_register_buffer(self.handle, slot, 0, 0)
                self._free_buffers.append(slot)
            while self._unregister:
                slot = self._unregister.pop()
                if self.handle is not None:
                    lib.dmb_ring_register_dmabuf(self.handle, slot, -1, -1)
                self._free_buffers.append(slot)
            while self._forgotten:
                slot = self._forgotten.pop()
                if self.handle is not None:
                    lib.dmb_ring_register_file(self.handle, slot, -1)
                self._free_files.append(slot)

    def file_slot(self, fd: int) -> int:
        """The slot of a descriptor, registered now if there is room; -1 for none."""
        with self._tables:
            if fd in self._files:
                return self._files[fd]
            if not self._free_files:
                return -1
            slot = self._free_files.pop()
            if lib.dmb_ring_register_file(self.handle, slot, fd):
                self._free_files.append(slot)
                return -1
            self._files[fd] = slot
            return slot

    def forget_file(self, fd: int) -> None:
        """Take a descriptor out of the tables, before it is closed."""
        with self._tables:
            for buffer, by_file in list(self._natives.items()):
                if fd in by_file:
                    gone = by_file.pop(fd)
                    gone.clear()
                    buffer._not_on_close(gone.clear)
            slot = self._files.pop(fd, None)
            if slot is not None:
                self._forgotten.append(slot)
            if self._owner in (None, threading.get_ident()):
                self.tidy()
            if self._owner == threading.get_ident() and self.handle is not None:
                lib.dmb_ring_settle(self.handle)

    def close(self) -> None:
        """Tear it down; nothing may be running on it."""
        if self.pid != _process.pid:
            # A fork's copy has the ring's memory, none of its threads, and perhaps a lock that
            # one of those held: leave it be.
            self.handle = None
            return
        with self._tables:
            handle, self.handle = self.handle, None
            if handle is not None:
                lib.dmb_ring_destroy(handle)
            for buffer, registration in list(self._buffers.items()):
                buffer._not_on_close(registration.clear)
            for buffer, by_file in list(self._natives.items()):
                for native in by_file.values():
                    buffer._not_on_close(native.clear)

    def __del__(self) -> None:
        if getattr(self, "handle", None) is not None:
            self.close()


class Refusal(NamedTuple):
    """Why a dma-buf was not registered."""

    errno: int
    why: str


class NativeRegistration:
    """The slots of one dma-buf's slabs for one open file: filled when a job touches them."""

    def __init__(self, ring: Ring, buffer: Buffer, fd: int) -> None:
        self.slots = ffi.new("int32_t[]", [-1] * len(buffer.slabs))
        self.error = 0
        self._ring = ring
        self._fd = fd
        buffer._on_close(self.clear)

    def fill(self, buffer: Buffer, first: int, last: int) -> Refusal | None:
        """Register the slabs first..last; None, or the errno and why one was refused."""
        missing = [index for index in range(first, last + 1) if self.slots[index] < 0]
        free = self._ring.free_buffer_slots
        if len(missing) > free:
            return Refusal(errno.ENOSPC, _table_is_full(len(missing), free))
        for index in missing:
            slot = self._ring.take_dmabuf_slot(buffer.slabs[index].fd, self._fd)
            if slot < 0:
                return Refusal(-slot, why_not_native(-slot))
            self.slots[index] = slot
        return None

    def renew(self, buffer: Buffer) -> bool:
        """Register again what is registered; return whether none was refused."""
        renewed = True
        for slab, slot in zip(buffer.slabs, self.slots, strict=True):
            if slot >= 0:
                rc = self._ring.renew_dmabuf_slot(slot, slab.fd, self._fd)
                _log.info("registered slot %d again: %s", slot, os.strerror(-rc))
                renewed = renewed and not rc
        return renewed

    def clear(self) -> None:
        """Give the slots back."""
        for index in range(len(self.slots)):
            slot, self.slots[index] = self.slots[index], -1
            if slot >= 0:
                self._ring.give_dmabuf_slot(slot)


class Registration:
    """The slots of one buffer in one ring: one for each GiB, filled when a job touches it."""

    def __init__(self, ring: Ring, buffer: Buffer) -> None:
        count = -(-buffer.size // SLOT_SIZE)
        self.slots = ffi.new("int32_t[]", [-1] * count)
        self.seen = 0
        self.refused: str | None = None
        self._ring = ring
        buffer._on_close(self.clear)

    def fill(self, buffer: Buffer, first: int, last: int) -> None:
        """Register the slots first..last; where one is refused, remember why and try no more."""
        for index in range(first, last + 1):
            if self.slots[index] >= 0 or self.refused:
                continue
            start = index * SLOT_SIZE
            size = min(SLOT_SIZE, buffer.size - start)
            assert buffer._address is not None
            slot = self._ring.take_buffer_slot(buffer._address + start, size)
            if slot >= 0:
                self.slots[index] = slot
            else:
                self.refused = _why_not_registered(-slot)
                _log.info("not registering %r: %s", buffer, self.refused)

    def covers(self, first: int, last: int) -> bool:
        """Whether all the slots first..last are filled."""
        return all(self.slots[index] >= 0 for index in range(first, last + 1))

    def clear(self) -> None:
        """Unpin all of it: the buffer is about to be unmapped."""
        for index in range(len(self.slots)):
            slot, self.slots[index] = self.slots[index], -1
            if slot >= 0:
                self._ring.give_buffer_slot(slot)


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
    """Why io_uring_setup(2) refused, with the fix."""
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
    """Why the probe for dma-buf registered buffers failed."""
    if number == errno.EINVAL:
        return (
            "this kernel has no dma-buf registered buffers (io_uring answers EINVAL to the "
            'extended update): it takes one with the series "Add dmabuf read/write via io_uring"'
        )
    return f"dma-bufs cannot be registered with this engine: {os.strerror(number)}"


def _table_is_full(wanted: int, free: int) -> str:
    return (
        f"the transfer touches {wanted} more slabs, and {free} slots are free of the "
        f"{lib.DMB_BUFFER_SLOTS} of a ring's table: close other buffers, or have larger slabs"
    )


def why_not_native(number: int) -> str:
    """Why a dma-buf was not registered for a target, or why its first request failed."""
    if number == errno.EOPNOTSUPP:
        return (
            "the target does not move dma-bufs itself (EOPNOTSUPP): NVMe namespaces and their "
            "partitions do, opened as block devices"
        )
    if number == errno.ENOMEM:
        return "the device could not map the dma-buf (ENOMEM): slabs of at most 1 GiB are safe"
    if number == errno.EFAULT:
        return "the device could not reach the dma-buf (EFAULT)"
    return f"the dma-buf could not be registered for the target: {os.strerror(number)}"
