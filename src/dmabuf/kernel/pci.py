"""The topology of PCI devices, for peer-to-peer transfers.

A device reaches the memory of another one without the host if both are behind the same PCIe switch,
and the switch does not send such requests up (ACS). Otherwise the host bridge must be one that the
kernel lists as able to do it (Documentation/driver-api/pci/p2pdma.rst, drivers/pci/p2pdma.c).
"""

import os
import re

SYSFS = "/sys"

_ADDRESS = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")


def is_address(text: str) -> bool:
    """Return whether a text is the address of a PCI device, such as 0000:65:00.0."""
    return _ADDRESS.fullmatch(text) is not None


def why_not_peers(memory: str, device: str) -> str:
    """Return why a device cannot access memory of a PCI device, after the kernel refused it.

    Args:
        memory: the PCI address of the device with the memory.
        device: the path in sysfs of the other one, a block device or its controller.
    """
    name = os.path.basename(device)
    path = _addresses(device)
    if not path:
        return f"sysfs has no PCI device behind {name}, which could access memory of {memory}"
    shared = set(path) & set(_addresses(os.path.realpath(f"{SYSFS}/bus/pci/devices/{memory}")))
    if not shared:
        return (
            f"{name} ({path[-1]}) and the memory of {memory} share no PCIe switch; "
            "use a drive behind the same one"
        )
    return (
        f"{name} ({path[-1]}) cannot access memory of {memory}: its driver cannot, "
        "or ACS of their switch forbids it"
    )


def _addresses(device: str) -> list[str]:
    """Return the PCI devices on the way to a device, the last one nearest to it."""
    return [part for part in device.split("/") if is_address(part)]
