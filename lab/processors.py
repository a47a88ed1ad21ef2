"""The processors that the guest can have: what each needs of Debian, of QEMU and of the kernel."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Processor:
    """One value of `--arch`."""

    name: str
    """Debian's name of the architecture."""
    machine: str
    """The name that uname and Python's wheels use."""
    package: str
    """The package with its QEMU."""
    qemu: tuple[str, ...]
    """QEMU's program and the words for the machine."""
    iommu: tuple[str, ...]
    """QEMU's words for an IOMMU."""
    kernel: tuple[str, ...]
    """Words of the kernel's command line."""
    kernel_iommu: tuple[str, ...]
    """The same, where there is an IOMMU."""
    flavours: Mapping[str, str]
    """The values of `--page-size`, and the flavour of Debian's kernel with such pages."""
    built: tuple[str, ...] = ()
    """Modules that Debian's kernels for it lack: names in packages.py."""
    modules: tuple[str, ...] = ()
    """Those of them that are loaded before COMMAND."""
    lacks: tuple[str, ...] = ()
    """The values of `--devices` that it lacks. Tests that need these guards are skipped."""


PROCESSORS = {
    "amd64": Processor(
        "amd64",
        "x86_64",
        "qemu-system-x86",
        ("qemu-system-x86_64", "-machine", "q35", "-cpu", "max"),
        ("-device", "intel-iommu,intremap=on"),
        ("console=ttyS0", "tsc=reliable", "no_timer_check"),
        ("intel_iommu=on", "iommu=pt"),
        {"4k": "amd64"},
    ),
    "arm64": Processor(
        "arm64",
        "aarch64",
        "qemu-system-arm",
        # This processor has pages of 4, 16 and 64 KiB, and no pointer authentication, which
        # QEMU emulates slowly.
        ("qemu-system-aarch64", "-machine", "virt,gic-version=3", "-cpu", "neoverse-n1"),
        ("-machine", "iommu=smmuv3"),
        ("console=ttyAMA0", "kpti=off", "default_hugepagesz=2M"),
        ("iommu.passthrough=1",),
        {"4k": "arm64", "16k": "arm64-16k"},
        built=("dma_heap", "system_heap", "scsi_debug"),
        modules=("system_heap",),
        # Memory in slots needs ACPI, which QEMU offers with a firmware only.
        lacks=("numa", "dax", "cxl"),
    ),
}
