"""Vulkan: Buffers as VkDeviceMemory and VkBuffer, device memory as Buffers, and their fences.

Built on the ``vulkan`` binding (``pip install dmabuf[vulkan]``), whose handles these are: a job is
recorded and submitted with it, as ever. See docs/gpus.md.

What the driver does not do, and so is done here:

- *Vulkan leaves no fence in a dma-buf.* Its jobs on buffers signal semaphores and fences of its
  own, and nobody else sees them. :meth:`Memory.add_fence` takes the sync file of the semaphore
  that the job signals (VK_KHR_external_semaphore_fd, handle type SYNC_FD) and adds it to the
  buffer: transfers, cameras and CPU access then wait for the job. :meth:`Memory.wait_semaphore` is
  the other way: what others have queued on the buffer, as a semaphore for a job to wait for.
- *Memory that others use belongs to a foreign queue family.* A job begins by acquiring it from
  there and ends by releasing it to there: :meth:`Memory.acquire` and :meth:`Memory.release` record
  both barriers (VK_EXT_queue_family_foreign).
"""

from __future__ import annotations

import errno
import os
import weakref
from contextlib import ExitStack
from typing import Any

from dmabuf import _process, fence
from dmabuf.buffer import Buffer
from dmabuf.devices import _vulkan
from dmabuf.devices._vulkan import FOREIGN, NEEDED, given_away, lowest, told, usages, writing
from dmabuf.devices._vulkan_memory import Made, Memory, Semaphore, warn_and_close
from dmabuf.errors import ClosedError, Uncopyable, os_error
from dmabuf.exporters import from_fd
from dmabuf.sizes import parse_size

__all__ = ["EXTENSIONS", "Device", "Memory", "Semaphore", "open"]

EXTENSIONS = (*NEEDED, FOREIGN)
"""Device extensions to enable in a VkDevice of your own; the last where the driver has it."""


def open(name: str | None = None) -> Device:  # noqa: A001 - as in dmabuf.open
    """A Vulkan device of our own, for those who have none: with one queue, which computes.

    ``name`` picks one by a part of its name, such as "llvmpipe" or "radeon"; by default it is the
    first that can share memory. Closing it destroys the VkDevice and its VkInstance.

    Raises:
        ImportError: the module ``vulkan`` is not installed.
        OSError: ENOENT, there is no Vulkan loader; ENODEV, no driver, or no device of that name;
            EOPNOTSUPP, no device has the extensions, and which each lacks.
    """
    vk = _vulkan.binding()
    with ExitStack() as undo:
        instance = _vulkan.make_instance()
        undo.callback(vk.vkDestroyInstance, instance, None)
        found = _vulkan.find(instance, name)
        queue = vk.VkDeviceQueueCreateInfo(
            queueFamilyIndex=found.queue_family, queueCount=1, pQueuePriorities=[1.0]
        )
        about = vk.VkDeviceCreateInfo(
            pQueueCreateInfos=[queue], ppEnabledExtensionNames=found.extensions
        )
        with told(f"opening {found.name}"):
            handle = vk.vkCreateDevice(found.physical_device, about, None)
        undo.callback(vk.vkDestroyDevice, handle, None)
        device = Device(
            found.physical_device,
            handle,
            queue_family=found.queue_family,
            foreign=FOREIGN in found.extensions,
        )
        device._destroy = undo.pop_all()
    return device


class Device(Uncopyable, instead="open it again where it is needed"):
    """A VkDevice whose memory is shared with Buffers: your own, or one by :func:`open`.

    Yours needs the extensions of :data:`EXTENSIONS` enabled and Vulkan 1.1, and stays yours: it is
    to outlive this. ``queue_family`` is that of the queues which use the memory; ``foreign``
    whether VK_EXT_queue_family_foreign is enabled.

    As Vulkan has it, calls from several threads must not overlap, nor :meth:`close` with a
    submission. A fork's child can use none of it.

    Attributes:
        handle: the VkDevice.
        physical_device: the VkPhysicalDevice.
        queue_family: an index.
        queue: the first VkQueue of that family.
        name: what the driver calls the device.

    Raises:
        ImportError, OSError: as :func:`open`; EOPNOTSUPP, an extension is not enabled.
    """

    _closed = True

    def __init__(
        self, physical_device: Any, handle: Any, *, queue_family: int = 0, foreign: bool = True
    ) -> None:
        self._vk = vk = _vulkan.binding()
        self.physical_device = physical_device
        self.handle = handle
        self.queue_family = queue_family
        self._outside = vk.VK_QUEUE_FAMILY_FOREIGN_EXT if foreign else vk.VK_QUEUE_FAMILY_EXTERNAL
        memory, _, semaphore = NEEDED
        self._get_memory_fd = _vulkan.function(handle, "vkGetMemoryFdKHR", memory)
        self._memory_fd_properties = _vulkan.function(handle, "vkGetMemoryFdPropertiesKHR", memory)
        self._get_semaphore_fd = _vulkan.function(handle, "vkGetSemaphoreFdKHR", semaphore)
        self._import_semaphore_fd = _vulkan.function(handle, "vkImportSemaphoreFdKHR", semaphore)
        self.name = str(vk.vkGetPhysicalDeviceProperties(physical_device).deviceName)
        self.queue = vk.vkGetDeviceQueue(handle, queue_family, 0)
        self._pid = _process.pid
        self._made: weakref.WeakSet[Made] = weakref.WeakSet()
        self._left = 0  # of what was made: the set forgets what the garbage collector has found
        self._destroy = ExitStack()
        self._closed = False

    # -- memory

    def import_buffer(
        self, buffer: Buffer, *, size: int | str | None = None, usage: int | None = None
    ) -> Memory:
        """A Buffer's memory as a VkBuffer of ``size`` bytes from its start, by default all of it.

        ``usage`` are VkBufferUsageFlags, by default storage and transfers both ways. Until the
        Memory is closed the Buffer cannot be.

        Raises:
            OSError: EOPNOTSUPP, the buffer is a memfd, or the driver imports none for that usage;
                EACCES, its descriptor is read-only and the usage may write; EINVAL, it is smaller
                than ``size`` or than the driver needs, or the driver refuses it; ENOMEM.
            io.UnsupportedOperation: it has several slabs. Import each: ``dmabuf.from_fd(slab.fd)``.
            ClosedError: the device or the buffer is closed.
        """
        self._check_open()
        if not isinstance(buffer, Buffer):
            raise TypeError(f"a dmabuf.Buffer is needed, not {type(buffer).__name__}")
        vk, usage = self._vk, usages(usage)
        fd = buffer.fileno()
        if not buffer.is_dmabuf:
            text = "a memfd is no dma-buf and no device can import it: allocate a udmabuf"
            raise os_error(errno.EOPNOTSUPP, text)
        if usage & writing() and not buffer._descriptor_writable:
            text = "the buffer's descriptor is read-only: give a usage= that only reads"
            raise os_error(errno.EACCES, text)
        nbytes = buffer.size if size is None else parse_size(size)
        if not 0 < nbytes <= buffer.size:
            text = f"a VkBuffer of {nbytes} bytes needs as many, and the buffer has {buffer.size}"
            raise os_error(errno.EINVAL, text)
        with ExitStack() as undo:
            buffer._acquire()
            undo.callback(buffer._release)
            made, needs, dedicated = self._make_buffer(undo, nbytes, usage, "import")
            if needs.size > buffer.size:
                text = (
                    f"{self.name} needs {needs.size} bytes for a VkBuffer of {nbytes}, and the "
                    f"buffer has {buffer.size}: allocate as many"
                )
                raise os_error(errno.EINVAL, text)
            what = f"importing {buffer!r} into {self.name}"
            with told(what):
                able = self._memory_fd_properties(
                    self.handle, vk.VK_EXTERNAL_MEMORY_HANDLE_TYPE_DMA_BUF_BIT_EXT, fd
                ).memoryTypeBits
            kind = lowest(able & needs.memoryTypeBits)
            if kind is None:
                text = f"{what}: no kind of its memory is both this buffer's and the usage's"
                raise os_error(errno.EINVAL, text)
            with given_away(os.dup(fd)) as own, told(what):
                source = vk.VkImportMemoryFdInfoKHR(
                    pNext=dedicated,
                    handleType=vk.VK_EXTERNAL_MEMORY_HANDLE_TYPE_DMA_BUF_BIT_EXT,
                    fd=own,
                )
                memory = self._allocate(undo, source, buffer.size, kind)
            with told(what):
                vk.vkBindBufferMemory(self.handle, made, memory, 0)
            return Memory(self, buffer, nbytes, made, memory, undo.pop_all())

    def allocate(
        self, size: int | str, *, usage: int | None = None, name: str | None = None
    ) -> Memory:
        """Memory of the device's own, as a VkBuffer of ``size`` bytes and as a Buffer.

        The Buffer, ``Memory.buffer``, goes with the Memory; ``dmabuf.from_fd()`` of it stays. It
        may be larger than ``size``, and the CPU may not be able to map it. ``name`` labels it.

        Raises:
            OSError: EOPNOTSUPP, the driver exports none for that usage; ENOMEM.
            ValueError: ``size`` is 0, or the name does not fit.
            ClosedError: the device is closed.
        """
        self._check_open()
        nbytes = parse_size(size)
        if not nbytes:
            raise ValueError("size is 0: a buffer holds at least one byte")
        vk, what = self._vk, f"allocating {nbytes} bytes of {self.name}"
        with ExitStack() as undo:
            made, needs, dedicated = self._make_buffer(undo, nbytes, usages(usage), "export")
            kind = self._pick(needs.memoryTypeBits)
            shared = vk.VkExportMemoryAllocateInfo(
                pNext=dedicated, handleTypes=vk.VK_EXTERNAL_MEMORY_HANDLE_TYPE_DMA_BUF_BIT_EXT
            )
            with told(what):
                memory = self._allocate(undo, shared, needs.size, kind)
                vk.vkBindBufferMemory(self.handle, made, memory, 0)
            buffer = self.export_memory(memory, name=name)
            buffer._acquire()
            return Memory(self, buffer, nbytes, made, memory, undo.pop_all(), owned=True)

    def export_memory(self, memory: Any, *, name: str | None = None) -> Buffer:
        """A VkDeviceMemory of yours as a Buffer, which may outlive it and is yours to close.

        It must have been allocated for export as a dma-buf (VkExportMemoryAllocateInfo).

        Raises:
            OSError: the driver exports none; ENOMEM, EMFILE.
            ClosedError: the device is closed.
        """
        self._check_open()
        vk = self._vk
        wanted = vk.VkMemoryGetFdInfoKHR(
            memory=memory, handleType=vk.VK_EXTERNAL_MEMORY_HANDLE_TYPE_DMA_BUF_BIT_EXT
        )
        with told(f"exporting memory of {self.name}"):
            fd = self._get_memory_fd(self.handle, wanted)
        try:
            return from_fd(fd, name=name)
        finally:
            os.close(fd)

    def _make_buffer(
        self, undo: ExitStack, nbytes: int, usage: int, direction: str
    ) -> tuple[Any, Any, Any]:
        """A VkBuffer, what memory it needs, and what says that this is its own, if it must be."""
        vk = self._vk
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
            text = f"{self.name} can {direction} no dma-buf for buffers of usage {usage:#x}"
            raise os_error(errno.EOPNOTSUPP, text)
        shared = vk.VkExternalMemoryBufferCreateInfo(handleTypes=kind)
        about = vk.VkBufferCreateInfo(
            pNext=shared, size=nbytes, usage=usage, sharingMode=vk.VK_SHARING_MODE_EXCLUSIVE
        )
        with told(f"making a VkBuffer of {nbytes} bytes"):
            made = vk.vkCreateBuffer(self.handle, about, None)
        undo.callback(vk.vkDestroyBuffer, self.handle, made, None)
        needs = vk.vkGetBufferMemoryRequirements(self.handle, made)
        dedicated = None
        if features & vk.VK_EXTERNAL_MEMORY_FEATURE_DEDICATED_ONLY_BIT:
            dedicated = vk.VkMemoryDedicatedAllocateInfo(buffer=made)
        return made, needs, dedicated

    def _allocate(self, undo: ExitStack, chain: Any, nbytes: int, kind: int) -> Any:
        vk = self._vk
        about = vk.VkMemoryAllocateInfo(pNext=chain, allocationSize=nbytes, memoryTypeIndex=kind)
        memory = vk.vkAllocateMemory(self.handle, about, None)
        undo.callback(vk.vkFreeMemory, self.handle, memory, None)
        return memory

    def _pick(self, able: int) -> int:
        """The device's own memory if it may be, else the first kind that may."""
        vk = self._vk
        kinds = vk.vkGetPhysicalDeviceMemoryProperties(self.physical_device)
        own = sum(
            1 << index
            for index in range(kinds.memoryTypeCount)
            if kinds.memoryTypes[index].propertyFlags & vk.VK_MEMORY_PROPERTY_DEVICE_LOCAL_BIT
        )
        kind = lowest(able & own or able)
        assert kind is not None  # the specification promises one
        return kind

    # -- semaphores

    def semaphore(self, sync_file: int | None = None) -> Semaphore:
        """A binary semaphore whose fence can leave Vulkan; or one that has a sync file's fence.

        Without ``sync_file`` it is for a job to signal, and then for :meth:`Memory.add_fence`. With
        one it is for one job to wait for. The descriptor is duplicated, and yours stays yours.

        Raises:
            OSError: EINVAL, ``sync_file`` is none; what the driver refuses.
            ClosedError: the device is closed.
        """
        self._check_open()
        vk = self._vk
        kind = vk.VK_EXTERNAL_SEMAPHORE_HANDLE_TYPE_SYNC_FD_BIT
        chain = None
        if sync_file is None:
            chain = vk.VkExportSemaphoreCreateInfo(handleTypes=kind)
        what = f"making a semaphore of {self.name}"
        with ExitStack() as undo:
            with told(what):
                about = vk.VkSemaphoreCreateInfo(pNext=chain)
                handle = vk.vkCreateSemaphore(self.handle, about, None)
            undo.callback(vk.vkDestroySemaphore, self.handle, handle, None)
            if sync_file is not None:
                with given_away(fence.duplicate(sync_file)) as own, told(what):
                    source = vk.VkImportSemaphoreFdInfoKHR(
                        semaphore=handle,
                        flags=vk.VK_SEMAPHORE_IMPORT_TEMPORARY_BIT,
                        handleType=kind,
                        fd=own,
                    )
                    self._import_semaphore_fd(self.handle, source)
            return Semaphore(self, handle, undo.pop_all())

    # -- the end

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this Vulkan device is closed")
        if self._pid != _process.pid:
            raise ClosedError("this Vulkan device is that of the process which forked this one")

    def wait_idle(self) -> None:
        """Wait until every job submitted to the device has ended, without bound.

        Raises:
            OSError: ENODEV, the device is lost.
        """
        self._check_open()
        self._wait()

    def _wait(self) -> None:
        with told(f"waiting for {self.name}"):
            self._vk.vkDeviceWaitIdle(self.handle)

    def _settle(self) -> None:
        """Return when no job of its runs; of a device that is lost, none does."""
        try:
            self._wait()
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise

    def _enter(self, made: Made) -> None:
        self._made.add(made)
        self._left += 1

    def _leave(self) -> None:
        self._left -= 1
        self._end()

    def _end(self) -> None:
        """Destroy the VkDevice, if it is ours, once it is closed and all that was made of it."""
        if self._closed and not self._left:
            self._destroy.close()

    def close(self) -> None:
        """Wait for its jobs, then close what was made of it; again does nothing.

        Raises:
            BufferError: a view of a buffer by :meth:`allocate` exists; that stays open, all else
                is closed.
            OSError: the driver cannot wait for the jobs; it stays open.
        """
        if self._closed or self._pid != _process.pid:
            return
        self._settle()
        first: BufferError | None = None
        for one in list(self._made):
            try:
                one.close()
            except BufferError as error:
                first = first or error
        self._closed = True
        self._end()
        if first is not None:
            raise first

    def __enter__(self) -> Device:
        self._check_open()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        warn_and_close(self)

    def __repr__(self) -> str:
        return f"<dmabuf.devices.vulkan.Device {self.name!r}{' closed' * self._closed}>"
