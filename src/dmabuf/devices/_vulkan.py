"""The `vulkan` binding: how it is loaded, what its errors mean, and finding a device that shares.

Facts are from the Vulkan specification, chapters Devices and Queues, Memory Allocation and
Synchronization, and the extensions named in NEEDED.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from dmabuf.errors import os_error
from dmabuf.sizes import as_int

NEEDED = (
    "VK_KHR_external_memory_fd",
    "VK_EXT_external_memory_dma_buf",
    "VK_KHR_external_semaphore_fd",
)
"""What a VkDevice must have enabled."""

FOREIGN = "VK_EXT_queue_family_foreign"
"""Enabled where there is: barriers then name a foreign queue family, as what is no Vulkan is."""

_ERRNO = {
    "VkErrorOutOfHostMemory": (errno.ENOMEM, "no host memory is left for it"),
    "VkErrorOutOfDeviceMemory": (errno.ENOMEM, "no device memory is left for it"),
    "VkErrorInvalidExternalHandle": (errno.EINVAL, "the driver refuses the descriptor"),
    "VkErrorExtensionNotPresent": (errno.EOPNOTSUPP, "the driver lacks an extension"),
    "VkErrorFeatureNotPresent": (errno.EOPNOTSUPP, "the driver lacks a feature"),
    "VkErrorIncompatibleDriver": (errno.ENODEV, "there is no Vulkan driver"),
    "VkErrorInitializationFailed": (errno.ENODEV, "the driver could not start"),
    "VkErrorDeviceLost": (errno.ENODEV, "the device is lost"),
    "VkErrorTooManyObjects": (errno.ENFILE, "the driver has no room for another"),
}

_LATER = {-1000072003: "VkErrorInvalidExternalHandle"}

_INSTALL = "apt install mesa-vulkan-drivers, or the driver of your GPU"


def binding() -> Any:
    """The module `vulkan`.

    Raises:
        ImportError: it is not installed.
        OSError: ENOENT, there is no Vulkan loader.
    """
    try:
        import vulkan
    except ImportError as error:
        text = f"dmabuf.devices.vulkan needs vulkan ({error}): pip install dmabuf[vulkan]"
        raise ImportError(text, name="vulkan") from error
    except OSError:  # its own, without an errno
        text = "there is no Vulkan loader: apt install libvulkan1"
        raise os_error(errno.ENOENT, text, "libvulkan.so.1") from None
    return vulkan


@contextmanager
def told(what: str) -> Iterator[None]:
    """Turn an error of the binding's into an OSError: `what` was attempted."""
    vk = binding()
    try:
        yield
    except (vk.VkError, vk.VkException) as error:
        kind = type(error).__name__
    except KeyError as error:  # 1.3.275 has it with the wrong sign
        kind = _LATER.get(error.args[0], f"VkResult {error.args[0]}")
    else:
        return
    number, text = _ERRNO.get(kind, (errno.EIO, "the driver failed"))
    raise os_error(number, f"{what}: {text} ({kind})")


def function(device: Any, name: str, extension: str) -> Any:
    """A function of an extension.

    Raises:
        OSError: EOPNOTSUPP, the VkDevice was made without the extension.
    """
    vk = binding()
    try:
        return vk.vkGetDeviceProcAddr(device, name)
    except vk.ProcedureNotFoundError:
        text = f"the VkDevice has no {name}: enable {extension} when you make it"
        raise os_error(errno.EOPNOTSUPP, text) from None


class Found(NamedTuple):
    """A physical device that shares memory, with a queue family that computes."""

    physical_device: Any
    name: str
    queue_family: int
    extensions: tuple[str, ...]


def make_instance() -> Any:
    """A VkInstance of Vulkan 1.1."""
    vk = binding()
    about = vk.VkApplicationInfo(pApplicationName="dmabuf", apiVersion=vk.VK_MAKE_VERSION(1, 1, 0))
    try:
        return vk.vkCreateInstance(vk.VkInstanceCreateInfo(pApplicationInfo=about), None)
    except vk.VkErrorIncompatibleDriver:
        raise os_error(errno.ENODEV, f"there is no Vulkan driver: {_INSTALL}") from None
    except (vk.VkError, vk.VkException) as error:
        text = f"making a Vulkan instance failed ({type(error).__name__})"
        raise os_error(errno.EIO, text) from None


def find(instance: Any, wanted: str | None) -> Found:
    """The first physical device that can share, of those with `wanted` in their name.

    Raises:
        OSError: ENODEV, there is none; EOPNOTSUPP, none of them can, and what each lacks.
    """
    vk = binding()
    with told("asking for the Vulkan devices"):
        present = list(vk.vkEnumeratePhysicalDevices(instance))
    if not present:
        raise os_error(errno.ENODEV, f"there is no Vulkan device: {_INSTALL}")
    names = [str(vk.vkGetPhysicalDeviceProperties(one).deviceName) for one in present]
    lacking = []
    for device, name in zip(present, names, strict=True):
        if wanted is not None and wanted.lower() not in name.lower():
            continue
        found = _look(device, name)
        if isinstance(found, Found):
            return found
        lacking.append(f"{name}: {found}")
    if not lacking:
        text = f"no Vulkan device is named {wanted!r}: there is {', '.join(names)}"
        raise os_error(errno.ENODEV, text)
    text = "no Vulkan device here shares memory with what is no Vulkan; "
    raise os_error(errno.EOPNOTSUPP, text + "; ".join(lacking))


def _look(device: Any, name: str) -> Found | str:
    """What the device offers, or what it lacks."""
    vk = binding()
    version = vk.vkGetPhysicalDeviceProperties(device).apiVersion
    if version < vk.VK_MAKE_VERSION(1, 1, 0):
        return "it is older than Vulkan 1.1"
    with told(f"asking {name} for its extensions"):
        offered = vk.vkEnumerateDeviceExtensionProperties(device, None)
    has = {str(one.extensionName) for one in offered}
    missing = [one for one in NEEDED if one not in has]
    if missing:
        return f"it has no {', '.join(missing)}"
    families = vk.vkGetPhysicalDeviceQueueFamilyProperties(device)
    able = [
        number for number, one in enumerate(families) if one.queueFlags & vk.VK_QUEUE_COMPUTE_BIT
    ]
    if not able:
        return "it has no queue that computes"
    return Found(device, name, able[0], (*NEEDED, *({FOREIGN} & has)))


@contextmanager
def given_away(fd: int) -> Iterator[int]:
    """A descriptor that a driver takes over if it succeeds, and leaves to us if it does not.

    Mesa 25.0's lavapipe closes one that it refuses to import as memory all the same.
    """
    file = os.fstat(fd)
    try:
        yield fd
    except BaseException:
        with suppress(OSError):
            if os.path.samestat(os.fstat(fd), file):
                os.close(fd)
        raise


def lowest(bits: int) -> int | None:
    """The number of the lowest bit that is set."""
    return (bits & -bits).bit_length() - 1 if bits else None


def usages(usage: int | None) -> int:
    """VkBufferUsageFlags that were given, checked; by default storage and transfers both ways."""
    if usage is not None:
        number = as_int(usage, "usage")
        if not 0 < number < 1 << 32:
            raise ValueError(f"usage={usage!r}: VkBufferUsageFlags, at least one")
        return number
    vk = binding()
    return int(
        vk.VK_BUFFER_USAGE_STORAGE_BUFFER_BIT
        | vk.VK_BUFFER_USAGE_TRANSFER_SRC_BIT
        | vk.VK_BUFFER_USAGE_TRANSFER_DST_BIT
    )


def writing() -> int:
    """The usages by which a job may write."""
    vk = binding()
    return int(
        vk.VK_BUFFER_USAGE_STORAGE_BUFFER_BIT
        | vk.VK_BUFFER_USAGE_STORAGE_TEXEL_BUFFER_BIT
        | vk.VK_BUFFER_USAGE_TRANSFER_DST_BIT
    )
