"""What a Vulkan device and a Buffer share: memory, and semaphores that carry fences."""

from __future__ import annotations

import os
import warnings
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

from dmabuf import _process, fence
from dmabuf.buffer import Buffer
from dmabuf.devices._vulkan import told
from dmabuf.errors import ClosedError, Uncopyable

if TYPE_CHECKING:
    from dmabuf.devices.vulkan import Device


class Made(Uncopyable, instead="send the descriptors of its Buffer"):
    """Something of a Device's, with handles to destroy."""

    _closed = True

    def __init__(self, device: Device, undo: ExitStack) -> None:
        self.device = device
        self._pid = device._pid
        self._undo = undo
        self._closed = False
        device._enter(self)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"{self!r} is closed")
        self.device._check_open()

    def close(self) -> None:
        """Wait for the device's jobs, then give up what it holds; again does nothing.

        Raises:
            OSError: the driver cannot wait for the jobs; it stays open.
        """
        if self._closed or self._pid != _process.pid:
            return
        self.device._settle()
        self._closed = True
        try:
            self._undo.close()
        finally:
            self.device._leave()

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        warn_and_close(self)


class Memory(Made):
    """Memory that is a Buffer and a VkBuffer at once; made by a :class:`Device`, not by hand.

    Attributes:
        device: whose it is.
        buffer: the Buffer. It cannot be closed while this is open.
        size: bytes of the VkBuffer.
        vk_buffer: the VkBuffer.
        vk_memory: the VkDeviceMemory, which the VkBuffer has from offset 0.
    """

    def __init__(
        self,
        device: Device,
        buffer: Buffer,
        size: int,
        vk_buffer: Any,
        vk_memory: Any,
        undo: ExitStack,
        *,
        owned: bool = False,
    ) -> None:
        self.buffer = buffer
        self.size = size
        self.vk_buffer = vk_buffer
        self.vk_memory = vk_memory
        self._owned = owned
        super().__init__(device, undo)

    def acquire(self, command_buffer: Any) -> None:
        """Record the barrier by which a job takes the memory over from everyone else: at its start.

        Raises:
            ClosedError: this or the device is closed.
        """
        vk, device = self.device._vk, self.device
        barrier = vk.VkBufferMemoryBarrier(
            srcQueueFamilyIndex=device._outside,
            dstQueueFamilyIndex=device.queue_family,
            dstAccessMask=vk.VK_ACCESS_MEMORY_READ_BIT | vk.VK_ACCESS_MEMORY_WRITE_BIT,
            buffer=self.vk_buffer,
            size=self.size,
        )
        self._barrier(command_buffer, barrier)

    def release(self, command_buffer: Any) -> None:
        """Record the barrier by which a job hands the memory to everyone else: at its end.

        Raises:
            ClosedError: this or the device is closed.
        """
        vk, device = self.device._vk, self.device
        barrier = vk.VkBufferMemoryBarrier(
            srcQueueFamilyIndex=device.queue_family,
            srcAccessMask=vk.VK_ACCESS_MEMORY_READ_BIT | vk.VK_ACCESS_MEMORY_WRITE_BIT,
            dstQueueFamilyIndex=device._outside,
            buffer=self.vk_buffer,
            size=self.size,
        )
        self._barrier(command_buffer, barrier)

    def _barrier(self, command_buffer: Any, barrier: Any) -> None:
        self._check_open()
        vk = self.device._vk
        everything = vk.VK_PIPELINE_STAGE_ALL_COMMANDS_BIT
        vk.vkCmdPipelineBarrier(
            command_buffer, everything, everything, 0, 0, None, 1, [barrier], 0, None
        )

    def wait_semaphore(self, access: fence.Access) -> Semaphore:
        """A semaphore for a job that reads, or writes, the memory: it signals when that may be.

        Before a "read" the jobs must end that write the buffer now, before a "write" all that use
        it (:meth:`dmabuf.Buffer.export_fence`). One job waits for it, and it is closed after.

        Raises:
            OSError: what the kernel or the driver refuses.
            ClosedError: this or the device is closed.
        """
        self._check_open()
        fd = self.buffer.export_fence(access)
        try:
            return self.device.semaphore(fd)
        finally:
            os.close(fd)

    def add_fence(self, semaphore: Semaphore, access: fence.Access) -> None:
        """Have everyone wait for the job that signals the semaphore and reads, or writes, this.

        The job must have been submitted. After it transfers, :meth:`dmabuf.Buffer.wait` and CPU
        access wait for the job ("read": only those who write), as do drivers with implicit
        synchronization. The semaphore is unsignalled again, and can serve the next job.

        Raises:
            OSError: what the driver or the kernel refuses; EOPNOTSUPP, no export of sync files.
            ClosedError: this, the semaphore or the device is closed.
        """
        fence.check_direction(access)
        self._check_open()
        fd = semaphore.sync_file()
        if fd is None:
            return
        try:
            self.buffer.import_fence(fd, access)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Wait for the device's jobs, then free the memory; again does nothing.

        An imported Buffer stays open, and can be closed then; one by :meth:`Device.allocate` is
        closed.

        Raises:
            BufferError: a view of such a buffer exists; it stays open, all else is closed.
            OSError: the driver cannot wait for the jobs; all stays open.
        """
        ended = self._closed or self._pid != _process.pid
        super().close()
        if self._owned and not ended:
            self.buffer._release()
            self.buffer.close()

    def __enter__(self) -> Memory:
        self._check_open()
        return self

    def __repr__(self) -> str:
        state = " closed" * self._closed
        return f"<dmabuf.devices.vulkan.Memory {self.size} bytes of {self.buffer!r}{state}>"


class Semaphore(Made):
    """A binary semaphore; made by a :class:`Device` or :class:`Memory`, not by hand.

    Attributes:
        device: whose it is.
        handle: the VkSemaphore.
    """

    def __init__(self, device: Device, handle: Any, undo: ExitStack) -> None:
        self.handle = handle
        super().__init__(device, undo)

    def sync_file(self) -> int | None:
        """The fence of the job that signals it: a sync file, or None if it has ended already.

        The job must have been submitted. The descriptor is close-on-exec and the caller's. The
        semaphore is as if it had been waited for.

        Raises:
            OSError: the driver exports none.
            ClosedError: this or the device is closed.
        """
        self._check_open()
        vk = self.device._vk
        wanted = vk.VkSemaphoreGetFdInfoKHR(
            semaphore=self.handle, handleType=vk.VK_EXTERNAL_SEMAPHORE_HANDLE_TYPE_SYNC_FD_BIT
        )
        with told(f"taking a sync file of a semaphore of {self.device.name}"):
            fd = int(self.device._get_semaphore_fd(self.device.handle, wanted))
        if fd < 0:
            return None
        os.set_inheritable(fd, False)
        return fd

    def __enter__(self) -> Semaphore:
        self._check_open()
        return self

    def __repr__(self) -> str:
        state = " closed" * self._closed
        return f"<dmabuf.devices.vulkan.Semaphore of {self.device.name!r}{state}>"


def warn_and_close(what: Any) -> None:
    """For `__del__`: what was not closed says so, and is."""
    if what._closed or what._pid != _process.pid:
        return
    try:
        warnings.warn(f"unclosed {what!r}", ResourceWarning, source=what, stacklevel=3)
    finally:
        with suppress(BufferError):
            what.close()
