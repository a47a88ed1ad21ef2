"""Vulkan: Buffers as VkBuffers, device memory as Buffers, and fences between the two.

Uses the handles of the ``vulkan`` binding (``pip install dmabuf[vulkan]``): a program records and
submits its jobs with that binding as usual (docs/guides/gpus.md). This module adds what drivers do
not do by themselves:

- *Fences.* Vulkan adds no fence to a dma-buf: a job signals semaphores of Vulkan only.
  :meth:`Memory.add_fence` exports the sync file of such a semaphore
  (VK_KHR_external_semaphore_fd, handle type SYNC_FD) and imports it into the buffer, so that
  transfers, cameras and CPU access wait for the job. :meth:`Memory.wait_semaphore` is the
  opposite direction: the fences of a buffer as a semaphore that a job waits for.
- *Ownership.* Memory that others use belongs to a foreign queue family. :meth:`Memory.acquire` and
  :meth:`Memory.release` record the barriers at the start and end of a job
  (VK_EXT_queue_family_foreign).
"""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

from dmabuf.devices import lifetime
from dmabuf.devices.lifetime import DeviceHandle
from dmabuf.errors import os_error
from dmabuf.kernel import fence
from dmabuf.memory import Buffer, from_fd
from dmabuf.sizes import as_int, parse_size

__all__ = ["EXTENSIONS", "Device", "Memory", "Semaphore", "open"]

_MEMORY_FD, _SEMAPHORE_FD = "VK_KHR_external_memory_fd", "VK_KHR_external_semaphore_fd"
_NEEDED = (_MEMORY_FD, "VK_EXT_external_memory_dma_buf", _SEMAPHORE_FD)
_FOREIGN = "VK_EXT_queue_family_foreign"

EXTENSIONS = (*_NEEDED, _FOREIGN)
"""The device extensions to enable in a VkDevice of your own; the last if the driver supports it."""

_ERRNO = {
    "VkErrorOutOfHostMemory": (errno.ENOMEM, "not enough host memory"),
    "VkErrorOutOfDeviceMemory": (errno.ENOMEM, "not enough device memory"),
    "VkErrorInvalidExternalHandle": (errno.EINVAL, "the driver refuses the descriptor"),
    "VkErrorExtensionNotPresent": (errno.EOPNOTSUPP, "the driver lacks an extension"),
    "VkErrorFeatureNotPresent": (errno.EOPNOTSUPP, "the driver lacks a feature"),
    "VkErrorIncompatibleDriver": (errno.ENODEV, "there is no Vulkan driver"),
    "VkErrorInitializationFailed": (errno.ENODEV, "the driver could not start"),
    "VkErrorDeviceLost": (errno.ENODEV, "the device is lost"),
    "VkErrorTooManyObjects": (errno.ENFILE, "the driver has no room for another"),
}
_INVALID_EXTERNAL_HANDLE = -1000072003  # a KeyError of binding 1.3.275, which has the wrong sign
_INSTALL = "apt install mesa-vulkan-drivers, or install the driver of your GPU"


def open(name: str | None = None) -> Device:  # noqa: A001 - as in dmabuf.open
    """Open a Vulkan device with one compute queue, for programs that have no VkDevice.

    ``name`` selects a device by a part of its name, such as "llvmpipe" or "radeon"; the default is
    the first that can share memory. Closing the Device destroys the VkDevice and its VkInstance.

    Raises:
        ImportError: the module ``vulkan`` is not installed.
        OSError: ENOENT, there is no Vulkan loader; ENODEV, no driver, or no device of that name;
            EOPNOTSUPP, no device has the extensions.
    """
    vk = _binding()
    with ExitStack() as undo:
        about = vk.VkApplicationInfo(
            pApplicationName="dmabuf", apiVersion=vk.VK_MAKE_VERSION(1, 1, 0)
        )
        with _errors("make a VkInstance", _INSTALL):
            info = vk.VkInstanceCreateInfo(pApplicationInfo=about)
            instance = vk.vkCreateInstance(info, None)
        undo.callback(vk.vkDestroyInstance, instance, None)
        found = _find(instance, name)
        queue = vk.VkDeviceQueueCreateInfo(
            queueFamilyIndex=found.queue_family, queueCount=1, pQueuePriorities=[1.0]
        )
        info = vk.VkDeviceCreateInfo(
            pQueueCreateInfos=[queue], ppEnabledExtensionNames=found.extensions
        )
        with _errors(f"open {found.name}"):
            handle = vk.vkCreateDevice(found.physical_device, info, None)
        undo.callback(vk.vkDestroyDevice, handle, None)
        return _OwnDevice(found, handle, undo)


class _Context:
    """A VkDevice as Device, Memory and Semaphore share it; it ends with the last of them."""

    def __init__(self, handle: object, name: str, queue_family: int, foreign: bool) -> None:
        self.vk = vk = _binding()
        self.handle, self.name, self.queue_family = handle, name, queue_family
        self.outside = vk.VK_QUEUE_FAMILY_FOREIGN_EXT if foreign else vk.VK_QUEUE_FAMILY_EXTERNAL
        self.get_memory_fd = self._function("vkGetMemoryFdKHR", _MEMORY_FD)
        self.memory_fd_properties = self._function("vkGetMemoryFdPropertiesKHR", _MEMORY_FD)
        self.get_semaphore_fd = self._function("vkGetSemaphoreFdKHR", _SEMAPHORE_FD)
        self.import_semaphore_fd = self._function("vkImportSemaphoreFdKHR", _SEMAPHORE_FD)
        self.made: weakref.WeakSet[_Made] = weakref.WeakSet()
        self.users = 1  # the Device and what it made: the weak set forgets garbage too early
        self.undo = ExitStack()

    def _function(self, name: str, extension: str) -> Any:
        try:
            return self.vk.vkGetDeviceProcAddr(self.handle, name)
        except self.vk.ProcedureNotFoundError:
            text = f"use a VkDevice: it has no {name}; enable {extension} when you make it"
            raise os_error(errno.EOPNOTSUPP, text) from None

    def wait(self) -> None:
        """Wait for every submitted job."""
        with _errors(f"wait for {self.name}"):
            self.vk.vkDeviceWaitIdle(self.handle)

    def wait_or_lost(self) -> None:
        """Return when no job runs; a lost device runs none."""
        try:
            self.wait()
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise

    def leave(self) -> None:
        """End one use; the last one destroys the VkDevice, where it is ours."""
        self.users -= 1
        if not self.users:
            self.undo.close()


class Device(DeviceHandle):
    """A VkDevice that shares memory with Buffers: one of the caller, or one by :func:`open`.

    A VkDevice of the caller needs Vulkan 1.1 and the extensions :data:`EXTENSIONS`, and must
    outlive this object. ``queue_family`` is the family of the queues that use the memory;
    ``foreign`` is whether VK_EXT_queue_family_foreign is enabled.

    As in Vulkan, calls from several threads must not overlap, and :meth:`close` must not overlap a
    submission. The child of a fork cannot use it.

    Attributes:
        handle: the VkDevice.
        physical_device: the VkPhysicalDevice.
        queue_family: an index.
        queue: the first VkQueue of that family.
        name: the name that the driver reports.

    Raises:
        ImportError, OSError: as :func:`open`; EOPNOTSUPP where an extension is not enabled.
    """

    def __init__(
        self,
        physical_device: object,
        handle: object,
        *,
        queue_family: int = 0,
        foreign: bool = True,
    ) -> None:
        vk = _binding()
        self.physical_device = physical_device
        self.handle = handle
        self.queue_family = queue_family
        self.name = str(vk.vkGetPhysicalDeviceProperties(physical_device).deviceName)
        self._context = _Context(handle, self.name, queue_family, foreign)
        self.queue: object = vk.vkGetDeviceQueue(handle, queue_family, 0)
        self._opened()

    # -- memory

    def import_buffer(
        self, buffer: Buffer, *, size: int | str | None = None, usage: int | None = None
    ) -> Memory:
        """Import a Buffer's memory as a VkBuffer; the Buffer cannot be closed before the Memory.

        Args:
            buffer: a dma-buf of one slab.
            size: bytes of the VkBuffer, from the start of the Buffer; the default is all.
            usage: VkBufferUsageFlags; the default is storage and transfers both ways.

        Raises:
            OSError: EOPNOTSUPP, the buffer is a memfd, or the driver imports none for that usage;
                EACCES, its descriptor is read-only and the usage may write; EINVAL, it is smaller
                than ``size`` or than the driver needs, or the driver refuses it; ENOMEM.
            io.UnsupportedOperation: it has several slabs; import each, by
                ``dmabuf.from_fd(slab.fd)``.
            ClosedError: the device or the buffer is closed.
        """
        self.check_open()
        vk, usage = self._context.vk, self._usages(usage)
        fd = lifetime.check_buffer(buffer).fileno()
        if not buffer.is_dmabuf:
            text = "import a memfd: it is not a dma-buf; allocate a udmabuf"
            raise os_error(errno.EOPNOTSUPP, text)
        if usage & self._writing() and not lifetime.descriptor_writable(buffer):
            text = "import a buffer: its descriptor is read-only; give a usage= that only reads"
            raise os_error(errno.EACCES, text)
        nbytes = buffer.size if size is None else parse_size(size)
        if not 0 < nbytes <= buffer.size:
            text = f"import a buffer: it has {buffer.size} bytes, size= is {nbytes}"
            raise os_error(errno.EINVAL, text)
        with ExitStack() as undo:
            lifetime.hold(buffer)
            undo.callback(lifetime.release, buffer)
            made, needs, dedicated = self._make_buffer(undo, nbytes, usage, "import")
            if needs.size > buffer.size:
                text = f"import a buffer: it has {buffer.size} bytes, {self.name} needs "
                raise os_error(errno.EINVAL, f"{text}{needs.size}; allocate that many")
            what = f"import {buffer!r} into {self.name}"
            dma_buf = vk.VK_EXTERNAL_MEMORY_HANDLE_TYPE_DMA_BUF_BIT_EXT
            with _errors(what):
                able = self._context.memory_fd_properties(self.handle, dma_buf, fd).memoryTypeBits
            kind = _lowest(able & needs.memoryTypeBits)
            if kind is None:
                raise os_error(errno.EINVAL, f"{what}: no memory type suits both buffer and usage")
            with _given_away(os.dup(fd)) as own, _errors(what):
                source = vk.VkImportMemoryFdInfoKHR(pNext=dedicated, handleType=dma_buf, fd=own)
                memory = self._allocate(undo, source, buffer.size, kind)
            with _errors(what):
                vk.vkBindBufferMemory(self.handle, made, memory, 0)
            return Memory(self, self._context, buffer, nbytes, made, memory, undo.pop_all())

    def allocate(
        self, size: int | str, *, usage: int | None = None, name: str | None = None
    ) -> Memory:
        """Allocate memory of the device, as a VkBuffer of ``size`` bytes and as a Buffer.

        The Buffer, ``Memory.buffer``, ends with the Memory; ``dmabuf.from_fd()`` of it keeps the
        memory. It may be larger than ``size``, and the CPU may not be able to map it. ``usage`` is
        as for :meth:`import_buffer`; ``name`` labels the Buffer.

        Raises:
            OSError: EOPNOTSUPP, the driver exports none for that usage; ENOMEM.
            ValueError: ``size`` is 0, or the name does not fit.
            ClosedError: the device is closed.
        """
        self.check_open()
        nbytes = parse_size(size)
        if not nbytes:
            raise ValueError("invalid size 0: use at least one byte")
        vk = self._context.vk
        with ExitStack() as undo:
            usage = self._usages(usage)
            made, needs, dedicated = self._make_buffer(undo, nbytes, usage, "export")
            able, own = needs.memoryTypeBits, self._device_local()
            kind = _lowest(able & own or able)
            assert kind is not None  # the specification promises one
            shared = vk.VkExportMemoryAllocateInfo(
                pNext=dedicated, handleTypes=vk.VK_EXTERNAL_MEMORY_HANDLE_TYPE_DMA_BUF_BIT_EXT
            )
            with _errors(f"allocate {nbytes} bytes of {self.name}"):
                memory = self._allocate(undo, shared, needs.size, kind)
                vk.vkBindBufferMemory(self.handle, made, memory, 0)
            buffer = self.export_memory(memory, name=name)
            lifetime.hold(buffer)
            end = undo.pop_all()
            return Memory(self, self._context, buffer, nbytes, made, memory, end, owned=True)

    def export_memory(self, memory: object, *, name: str | None = None) -> Buffer:
        """Export a VkDeviceMemory of the caller as a Buffer, which may outlive it.

        The memory must have been allocated for export as a dma-buf (VkExportMemoryAllocateInfo).

        Raises:
            OSError: the driver does not export it; ENOMEM, EMFILE.
            ClosedError: the device is closed.
        """
        self.check_open()
        vk = self._context.vk
        wanted = vk.VkMemoryGetFdInfoKHR(
            memory=memory, handleType=vk.VK_EXTERNAL_MEMORY_HANDLE_TYPE_DMA_BUF_BIT_EXT
        )
        with _errors(f"export memory of {self.name}"):
            fd = self._context.get_memory_fd(self.handle, wanted)
        try:
            return from_fd(fd, name=name)
        finally:
            os.close(fd)

    def _usages(self, usage: int | None) -> int:
        """Return VkBufferUsageFlags, checked."""
        vk = self._context.vk
        if usage is None:
            both = vk.VK_BUFFER_USAGE_TRANSFER_SRC_BIT | vk.VK_BUFFER_USAGE_TRANSFER_DST_BIT
            return int(vk.VK_BUFFER_USAGE_STORAGE_BUFFER_BIT | both)
        if not 0 < as_int(usage, "usage") < 1 << 32:
            raise ValueError(f"invalid usage {usage!r}: use one or more VkBufferUsageFlags")
        return int(usage)

    def _writing(self) -> int:
        """Return the usages by which a job may write."""
        vk = self._context.vk
        storage = vk.VK_BUFFER_USAGE_STORAGE_BUFFER_BIT | vk.VK_BUFFER_USAGE_TRANSFER_DST_BIT
        return int(storage | vk.VK_BUFFER_USAGE_STORAGE_TEXEL_BUFFER_BIT)

    def _make_buffer(
        self, undo: ExitStack, nbytes: int, usage: int, direction: str
    ) -> tuple[Any, Any, Any]:
        """Return a VkBuffer, its memory requirements, and the dedicated allocation if needed."""
        vk = self._context.vk
        kind = vk.VK_EXTERNAL_MEMORY_HANDLE_TYPE_DMA_BUF_BIT_EXT
        asked = vk.VkPhysicalDeviceExternalBufferInfo(usage=usage, handleType=kind)
        features = vk.vkGetPhysicalDeviceExternalBufferProperties(
            self.physical_device, asked
        ).externalMemoryProperties.externalMemoryFeatures
        able = {
            "import": vk.VK_EXTERNAL_MEMORY_FEATURE_IMPORTABLE_BIT,
            "export": vk.VK_EXTERNAL_MEMORY_FEATURE_EXPORTABLE_BIT,
        }
        if not features & able[direction]:
            text = f"{self.name} cannot {direction} a dma-buf for buffers of usage {usage:#x}"
            raise os_error(errno.EOPNOTSUPP, text)
        shared = vk.VkExternalMemoryBufferCreateInfo(handleTypes=kind)
        about = vk.VkBufferCreateInfo(
            pNext=shared, size=nbytes, usage=usage, sharingMode=vk.VK_SHARING_MODE_EXCLUSIVE
        )
        with _errors(f"make a VkBuffer of {nbytes} bytes"):
            made = vk.vkCreateBuffer(self.handle, about, None)
        undo.callback(vk.vkDestroyBuffer, self.handle, made, None)
        needs = vk.vkGetBufferMemoryRequirements(self.handle, made)
        dedicated = None
        if features & vk.VK_EXTERNAL_MEMORY_FEATURE_DEDICATED_ONLY_BIT:
            dedicated = vk.VkMemoryDedicatedAllocateInfo(buffer=made)
        return made, needs, dedicated

    def _allocate(self, undo: ExitStack, chain: Any, nbytes: int, kind: int) -> Any:
        vk = self._context.vk
        about = vk.VkMemoryAllocateInfo(pNext=chain, allocationSize=nbytes, memoryTypeIndex=kind)
        memory = vk.vkAllocateMemory(self.handle, about, None)
        undo.callback(vk.vkFreeMemory, self.handle, memory, None)
        return memory

    def _device_local(self) -> int:
        """Return the memory types that are the device's own, as bits."""
        vk = self._context.vk
        kinds = vk.vkGetPhysicalDeviceMemoryProperties(self.physical_device)
        return sum(
            1 << index
            for index in range(kinds.memoryTypeCount)
            if kinds.memoryTypes[index].propertyFlags & vk.VK_MEMORY_PROPERTY_DEVICE_LOCAL_BIT
        )

    # -- semaphores

    def semaphore(self, sync_file: int | None = None) -> Semaphore:
        """Make a binary semaphore, for a job to signal or, with a sync file, to wait for.

        Without ``sync_file``, a job signals it and :meth:`Memory.add_fence` exports its fence.
        With one, one job waits for it; the descriptor is duplicated and still the caller's.

        Raises:
            OSError: EINVAL, ``sync_file`` is not a sync file; or the driver refuses.
            ClosedError: the device is closed.
        """
        self.check_open()
        vk, what = self._context.vk, f"make a semaphore of {self.name}"
        kind = vk.VK_EXTERNAL_SEMAPHORE_HANDLE_TYPE_SYNC_FD_BIT
        chain = None
        if sync_file is None:
            chain = vk.VkExportSemaphoreCreateInfo(handleTypes=kind)
        with ExitStack() as undo:
            with _errors(what):
                about = vk.VkSemaphoreCreateInfo(pNext=chain)
                handle = vk.vkCreateSemaphore(self.handle, about, None)
            undo.callback(vk.vkDestroySemaphore, self.handle, handle, None)
            if sync_file is not None:
                with _given_away(fence.duplicate(sync_file)) as own, _errors(what):
                    source = vk.VkImportSemaphoreFdInfoKHR(
                        semaphore=handle,
                        flags=vk.VK_SEMAPHORE_IMPORT_TEMPORARY_BIT,
                        handleType=kind,
                        fd=own,
                    )
                    self._context.import_semaphore_fd(self.handle, source)
            return Semaphore(self, self._context, handle, undo.pop_all())

    # -- the end

    def wait_idle(self) -> None:
        """Wait without limit until every job submitted to the device has ended.

        Raises:
            OSError: ENODEV, the device is lost.
        """
        self.check_open()
        self._context.wait()

    def close(self) -> None:
        """Wait for the jobs, then close all that was made of the device. Again does nothing.

        Raises:
            BufferError: a view of a buffer by :meth:`allocate` exists; that buffer stays open, all
                else is closed.
            OSError: the driver cannot wait for the jobs; the device stays open.
        """
        if self._closed or self.forked:
            return
        self._context.wait_or_lost()
        first: BufferError | None = None
        for one in list(self._context.made):
            try:
                one.close()
            except BufferError as error:
                first = first or error
        self._closed = True
        self._context.leave()
        if first is not None:
            raise first

    def __repr__(self) -> str:
        return f"<dmabuf.devices.vulkan.Device {self.name!r}{' closed' * self._closed}>"


class _OwnDevice(Device):
    """A Device by :func:`open`, which destroys its VkDevice and VkInstance."""

    def __init__(self, found: _Found, handle: object, undo: ExitStack) -> None:
        foreign = _FOREIGN in found.extensions
        family = found.queue_family
        super().__init__(found.physical_device, handle, queue_family=family, foreign=foreign)
        self._context.undo = undo.pop_all()


class _Made(DeviceHandle):
    """What a Device makes, with Vulkan handles to destroy."""

    def __init__(self, device: Device, context: _Context, undo: ExitStack) -> None:
        self.device = device
        self._context = context
        self._undo = undo
        context.made.add(self)
        context.users += 1
        self._opened()

    def check_open(self) -> None:
        """Raise ClosedError if it or its device is closed, or was opened before a fork."""
        super().check_open()
        self.device.check_open()

    def close(self) -> None:
        """Wait for the device's jobs, then destroy the Vulkan handles. Again does nothing.

        Raises:
            OSError: the driver cannot wait for the jobs; it stays open.
        """
        if self._closed or self.forked:
            return
        self._context.wait_or_lost()
        self._closed = True
        try:
            self._undo.close()
        finally:
            self._context.leave()


class Memory(_Made):
    """Memory that is a Buffer and a VkBuffer at once; made by a :class:`Device`.

    Attributes:
        device: the Device that made it.
        buffer: the Buffer. It cannot be closed while this is open.
        size: the bytes of the VkBuffer.
        vk_buffer: the VkBuffer.
        vk_memory: the VkDeviceMemory, to which the VkBuffer is bound at offset 0.
    """

    def __init__(
        self,
        device: Device,
        context: _Context,
        buffer: Buffer,
        size: int,
        vk_buffer: object,
        vk_memory: object,
        undo: ExitStack,
        *,
        owned: bool = False,
    ) -> None:
        self.buffer = buffer
        self.size = size
        self.vk_buffer = vk_buffer
        self.vk_memory = vk_memory
        self._owned = owned
        super().__init__(device, context, undo)

    def acquire(self, command_buffer: object) -> None:
        """Record the barrier by which a job acquires the memory, at the start of the job.

        Raises:
            ClosedError: this or the device is closed.
        """
        self._barrier(command_buffer, self._context.outside, self._context.queue_family, "dst")

    def release(self, command_buffer: object) -> None:
        """Record the barrier by which a job releases the memory to others, at its end.

        Raises:
            ClosedError: this or the device is closed.
        """
        self._barrier(command_buffer, self._context.queue_family, self._context.outside, "src")

    def _barrier(self, command_buffer: object, source: int, target: int, ours: str) -> None:
        self.check_open()
        vk = self._context.vk
        access = vk.VK_ACCESS_MEMORY_READ_BIT | vk.VK_ACCESS_MEMORY_WRITE_BIT
        barrier = vk.VkBufferMemoryBarrier(
            srcQueueFamilyIndex=source,
            dstQueueFamilyIndex=target,
            buffer=self.vk_buffer,
            size=self.size,
            **{f"{ours}AccessMask": access},
        )
        every = vk.VK_PIPELINE_STAGE_ALL_COMMANDS_BIT
        vk.vkCmdPipelineBarrier(command_buffer, every, every, 0, 0, None, 1, [barrier], 0, None)

    def wait_semaphore(self, access: fence.Access) -> Semaphore:
        """Make a semaphore that signals when a job may "read", or "write", the memory.

        A "read" waits for the jobs that write the buffer now, a "write" for all that use it
        (:meth:`dmabuf.Buffer.export_fence`). One job waits for the semaphore; close it after.

        Raises:
            OSError: the kernel or the driver refuses.
            ClosedError: this or the device is closed.
        """
        self.check_open()
        fd = self.buffer.export_fence(access)
        try:
            return self.device.semaphore(fd)
        finally:
            os.close(fd)

    def add_fence(self, semaphore: Semaphore, access: fence.Access) -> None:
        """Make other users of the buffer wait for the job that signals the semaphore.

        The job must have been submitted. After a job that writes (``access`` is "write") all wait:
        transfers, :meth:`dmabuf.Buffer.wait`, CPU access and drivers with implicit
        synchronization. After a "read" only those that write wait. The semaphore is unsignalled
        after this call and can serve the next job.

        Raises:
            OSError: the driver or the kernel refuses.
            ClosedError: this, the semaphore or the device is closed.
        """
        fence.check_direction(access)
        self.check_open()
        fd = semaphore.sync_file()
        if fd is None:
            return
        try:
            self.buffer.import_fence(fd, access)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Wait for the device's jobs, then free the memory. Again does nothing.

        An imported Buffer stays open; a Buffer by :meth:`Device.allocate` is closed.

        Raises:
            BufferError: a view of such a buffer exists; it stays open, all else is closed.
            OSError: the driver cannot wait for the jobs; all stays open.
        """
        ended = self._closed or self.forked
        super().close()
        if self._owned and not ended:
            lifetime.release(self.buffer)
            self.buffer.close()

    def __repr__(self) -> str:
        state = " closed" * self._closed
        return f"<dmabuf.devices.vulkan.Memory {self.size} bytes of {self.buffer!r}{state}>"


class Semaphore(_Made):
    """A binary semaphore; made by a :class:`Device` or a :class:`Memory`.

    Attributes:
        device: the Device that made it.
        handle: the VkSemaphore.
    """

    def __init__(self, device: Device, context: _Context, handle: object, undo: ExitStack) -> None:
        self.handle = handle
        super().__init__(device, context, undo)

    def sync_file(self) -> int | None:
        """Export the fence of the job that signals it; None if the job has already ended.

        The job must have been submitted. The sync file is close-on-exec, and the caller closes it.
        The semaphore is then unsignalled.

        Raises:
            OSError: the driver does not export it.
            ClosedError: this or the device is closed.
        """
        self.check_open()
        vk = self._context.vk
        wanted = vk.VkSemaphoreGetFdInfoKHR(
            semaphore=self.handle, handleType=vk.VK_EXTERNAL_SEMAPHORE_HANDLE_TYPE_SYNC_FD_BIT
        )
        with _errors(f"export the fence of a semaphore of {self._context.name}"):
            fd = int(self._context.get_semaphore_fd(self._context.handle, wanted))
        if fd < 0:
            return None
        os.set_inheritable(fd, False)
        return fd

    def __repr__(self) -> str:
        return (
            f"<dmabuf.devices.vulkan.Semaphore of {self._context.name!r}{' closed' * self._closed}>"
        )


# -- the binding


def _binding() -> Any:
    """Return the module `vulkan`; raise ImportError, or OSError(ENOENT) without a loader."""
    try:
        import vulkan
    except ImportError as error:
        text = f"dmabuf.devices.vulkan needs vulkan ({error}): pip install dmabuf[vulkan]"
        raise ImportError(text, name="vulkan") from error
    except OSError:  # the binding's own, without an errno
        text = "there is no Vulkan loader: apt install libvulkan1"
        raise os_error(errno.ENOENT, text, "libvulkan.so.1") from None
    return vulkan


@contextmanager
def _errors(what: str, fix: str = "") -> Iterator[None]:
    """Turn an error of the binding into an OSError; ``what`` was attempted."""
    vk = _binding()
    try:
        yield
        return
    except (vk.VkError, vk.VkException) as error:
        kind = type(error).__name__
    except KeyError as error:
        (code,) = error.args
        known = code == _INVALID_EXTERNAL_HANDLE
        kind = "VkErrorInvalidExternalHandle" if known else f"VkResult {code}"
    number, text = _ERRNO.get(kind, (errno.EIO, "the driver failed"))
    raise os_error(number, f"{what}: {text} ({kind})" + (f"; {fix}" if fix else ""))


class _Found(NamedTuple):
    """A physical device that can share memory, with a queue family that computes."""

    physical_device: Any
    name: str
    queue_family: int
    extensions: tuple[str, ...]


def _find(instance: Any, wanted: str | None) -> _Found:
    """Return the first device that can share memory, of those with ``wanted`` in their name."""
    vk = _binding()
    with _errors("list the Vulkan devices"):
        present = list(vk.vkEnumeratePhysicalDevices(instance))
    names = [str(vk.vkGetPhysicalDeviceProperties(one).deviceName) for one in present]
    lacking = []
    for device, name in zip(present, names, strict=True):
        if wanted is None or wanted.lower() in name.lower():
            found = _examine(device, name)
            if isinstance(found, _Found):
                return found
            lacking.append(f"{name} {found}")
    if lacking:
        text = f"no Vulkan device can share memory: {'; '.join(lacking)}"
        raise os_error(errno.EOPNOTSUPP, text)
    if not present:
        raise os_error(errno.ENODEV, f"there is no Vulkan device: {_INSTALL}")
    text = f"no Vulkan device is named {wanted!r}: there is {', '.join(names)}"
    raise os_error(errno.ENODEV, text)


def _examine(device: Any, name: str) -> _Found | str:
    """Return the device as a _Found, or why it cannot be used."""
    vk = _binding()
    if vk.vkGetPhysicalDeviceProperties(device).apiVersion < vk.VK_MAKE_VERSION(1, 1, 0):
        return "is older than Vulkan 1.1"
    with _errors(f"list the extensions of {name}"):
        offered = vk.vkEnumerateDeviceExtensionProperties(device, None)
    has = {str(one.extensionName) for one in offered}
    if missing := [one for one in _NEEDED if one not in has]:
        return f"has no {', '.join(missing)}"
    families = vk.vkGetPhysicalDeviceQueueFamilyProperties(device)
    for number, family in enumerate(families):
        if family.queueFlags & vk.VK_QUEUE_COMPUTE_BIT:
            return _Found(device, name, number, (*_NEEDED, *({_FOREIGN} & has)))
    return "has no compute queue"


@contextmanager
def _given_away(fd: int) -> Iterator[int]:
    """Give a descriptor to a driver, which owns it if it succeeds; else close it.

    Mesa 25.0's lavapipe also closes a descriptor that it refuses to import as memory.
    """
    file = os.fstat(fd)
    try:
        yield fd
    except BaseException:
        with suppress(OSError):
            if os.path.samestat(os.fstat(fd), file):
                os.close(fd)
        raise


def _lowest(bits: int) -> int | None:
    """Return the number of the lowest bit that is set."""
    return (bits & -bits).bit_length() - 1 if bits else None
