# ruff: noqa: N802 - the names are those of the binding
"""A `vulkan` binding without a GPU, whose answers a test chooses."""

import itertools
import os
from types import ModuleType, SimpleNamespace

from dmabuf.devices import vulkan

DMA_BUF = 0x200


class FakeVulkan(ModuleType):
    """Every VK_ name is a number, every Vk name a record; the functions are those below.

    `alive` lists what was made and not destroyed, `taken` the descriptors that it owns. While a job
    is `running` nothing may be destroyed; vkDeviceWaitIdle ends it. A test sets: `devices`, the
    names; `extensions` and `version` of each; `features` for dma-bufs; `needs`, the bytes beyond
    those of a VkBuffer; `fails`, the error of a function by name; `exported`, which returns a
    descriptor.
    """

    VK_QUEUE_COMPUTE_BIT = 2
    VK_EXTERNAL_MEMORY_FEATURE_DEDICATED_ONLY_BIT = 1
    VK_EXTERNAL_MEMORY_FEATURE_EXPORTABLE_BIT = 2
    VK_EXTERNAL_MEMORY_FEATURE_IMPORTABLE_BIT = 4
    VK_EXTERNAL_MEMORY_HANDLE_TYPE_DMA_BUF_BIT_EXT = DMA_BUF
    VK_EXTERNAL_SEMAPHORE_HANDLE_TYPE_SYNC_FD_BIT = 16
    VK_SEMAPHORE_IMPORT_TEMPORARY_BIT = 1
    VK_MEMORY_PROPERTY_DEVICE_LOCAL_BIT = 1
    VK_ACCESS_MEMORY_READ_BIT = 1 << 15
    VK_ACCESS_MEMORY_WRITE_BIT = 1 << 16
    VK_BUFFER_USAGE_TRANSFER_SRC_BIT = 1
    VK_BUFFER_USAGE_TRANSFER_DST_BIT = 2
    VK_BUFFER_USAGE_STORAGE_TEXEL_BUFFER_BIT = 8
    VK_BUFFER_USAGE_STORAGE_BUFFER_BIT = 32

    class VkError(Exception):
        pass

    class VkException(Exception):
        pass

    class ProcedureNotFoundError(Exception):
        pass

    class VkErrorIncompatibleDriver(VkError):
        pass

    class VkErrorOutOfDeviceMemory(VkError):
        pass

    class VkErrorDeviceLost(VkError):
        pass

    class VkErrorUnknown(VkError):
        pass

    def __init__(self) -> None:
        super().__init__("vulkan")
        self.devices = ["fake GPU"]
        self.extensions = set(vulkan.EXTENSIONS[:-1])
        self.version = (1, 3, 0)
        self.features = 6
        self.needs = 0
        self.memory_types = 0b11
        self.own_memory = 0b100  # the kinds of memory that are the device's
        self.exported = lambda: -1
        self.running = False
        self.fails: dict[str, str] = {}
        self.alive: list[tuple[str, int]] = []
        self.taken: dict[tuple[str, int], int] = {}
        self.calls: list[tuple[str, tuple[object, ...]]] = []
        self._numbers = itertools.count(1)

    def __getattr__(self, name: str):
        if name.startswith("VK_"):
            return 1
        if name.startswith("Vk"):
            return lambda **fields: SimpleNamespace(kind=name, **fields)
        if not name.startswith("vk"):
            raise AttributeError(name)

        def call(*arguments):
            self.calls.append((name, arguments))
            if name in self.fails:
                raise self.error(self.fails[name])
            if name.startswith("vkCreate") or name == "vkAllocateMemory":
                kind = name.removeprefix("vkCreate").removeprefix("vkAllocate")
                self.alive.append((kind, next(self._numbers)))
                self._take(self.alive[-1], getattr(arguments[1], "pNext", None))
                return self.alive[-1]
            if name.startswith("vkDestroy") or name == "vkFreeMemory":
                self._destroy(name, arguments[-2])
                return None
            return getattr(self, f"_{name}", lambda *_: None)(*arguments)

        return call

    def _take(self, owner: tuple[str, int], source: object) -> None:
        if hasattr(source, "fd"):
            os.fstat(source.fd)  # it is open
            self.taken[owner] = source.fd

    def _destroy(self, name: str, what: tuple[str, int]) -> None:
        assert not self.running, f"{name} under a job"
        if what[0] == "Device":
            assert [kind for kind, _ in self.alive] == ["Instance", "Device"]
        self.alive.remove(what)
        if what in self.taken:
            os.close(self.taken.pop(what))

    def error(self, kind: str) -> Exception:
        """As the binding has it, which knows no exception for this result."""
        if kind == "VkErrorInvalidExternalHandle":
            return KeyError(-1000072003)
        return getattr(self, kind)()

    def VK_MAKE_VERSION(self, *parts: int) -> tuple[int, ...]:
        return parts

    def _vkEnumeratePhysicalDevices(self, instance):
        return self.devices

    def _vkGetPhysicalDeviceProperties(self, device):
        return SimpleNamespace(deviceName=device, apiVersion=self.version)

    def _vkEnumerateDeviceExtensionProperties(self, device, layer):
        return [SimpleNamespace(extensionName=name) for name in self.extensions]

    def _vkGetPhysicalDeviceQueueFamilyProperties(self, device):
        return [SimpleNamespace(queueFlags=1), SimpleNamespace(queueFlags=2)]

    def _vkGetPhysicalDeviceExternalBufferProperties(self, device, asked):
        features = SimpleNamespace(externalMemoryFeatures=self.features)
        return SimpleNamespace(externalMemoryProperties=features)

    def _vkGetBufferMemoryRequirements(self, device, made):
        (about,) = [call[1][1] for call in self.calls if call[0] == "vkCreateBuffer"][-1:]
        return SimpleNamespace(size=about.size + self.needs, memoryTypeBits=0b110)

    def _vkGetDeviceProcAddr(self, device, name):
        return getattr(self, name)

    def _vkGetMemoryFdPropertiesKHR(self, device, kind, fd):
        return SimpleNamespace(memoryTypeBits=self.memory_types)

    def _vkGetPhysicalDeviceMemoryProperties(self, device):
        kinds = [SimpleNamespace(propertyFlags=self.own_memory >> kind & 1) for kind in range(4)]
        return SimpleNamespace(memoryTypeCount=len(kinds), memoryTypes=kinds)

    def _vkGetMemoryFdKHR(self, device, wanted):
        return self.exported()

    def _vkGetSemaphoreFdKHR(self, device, wanted):
        return self.exported()

    def _vkImportSemaphoreFdKHR(self, device, source):
        self._take(source.semaphore, source)

    def _vkDeviceWaitIdle(self, device):
        self.running = False
