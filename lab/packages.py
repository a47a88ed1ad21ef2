"""What is installed where: the one place with package lists.

A change of a list here changes the cached piece's key, so that piece is built again.
"""

SUITE = "trixie"
"""The Debian release of the guest's root filesystem."""

PYTHON = "3.13"
"""The version of that release's Python."""

NATIVE = "amd64"
"""The processor whose root filesystem has its programs run on this machine, to build in it."""

KERNELS = {"backports": f"{SUITE}-backports", "stable": SUITE}
"""The values of `--kernel` that are not a path, and the suite each takes its kernel from."""

KERNEL = "linux-image"
"""With a flavour's name, the package that depends on the newest such kernel of its suite."""

GUEST_BASE = ("bash", "busybox-static", "iproute2", "kmod", "mount", "procps", "util-linux")
"""What the guest's own start needs."""

GUEST_BUILD = (
    *("gcc", "libc6-dev", "liburing-dev", "linux-libc-dev", "make", "python3-dev"),
    "libelf1t64",  # the headers of a kernel have a tool that needs it
)
"""What building the extension and kernel modules needs, with the tools in the guest's root."""

GUEST_TESTS = (
    "btrfs-progs",
    "e2fsprogs",
    "fio",
    "fuse3",
    "glslang-tools",
    "ibverbs-providers",
    "libavutil-dev",
    "liburing2",
    "libva-dev",
    "libva-drm2",
    "libvulkan1",
    "mesa-vulkan-drivers",
    "numactl",
    "nvme-cli",
    "python3",
    "python3-cffi",
    "python3-numpy",
    "python3-pyfuse3",
    "python3-pyverbs",
    "rsync",
    "strace",
    "xfsprogs",
    "xxd",
)
"""What the tests call."""

GUEST = tuple(sorted({*GUEST_BASE, *GUEST_BUILD, *GUEST_TESTS}))
"""Every package of the guest's root filesystem, on top of Debian's minimal set."""

_TESTS = "drivers/media/test-drivers"

LICENSE = "license.c"
"""A file that modules.py writes: the licence of a module that the kernel's source has none for,
because the kernel's own build never makes it a module."""

MODULES: dict[str, tuple[str, ...]] = {
    "dma_heap": ("drivers/dma-buf/dma-heap.c", LICENSE),
    "system_heap": ("drivers/dma-buf/heaps/system_heap.c",),
    "scsi_debug": (
        *("drivers/scsi/scsi_debug.c", "drivers/scsi/sd.h", "drivers/scsi/scsi_logging.h"),
    ),
    "v4l2-mem2mem": ("drivers/media/v4l2-core/v4l2-mem2mem.c",),
    "vicodec": tuple(
        f"{_TESTS}/vicodec/{name}"
        for name in (
            *("vicodec-core.c", "codec-fwht.c", "codec-fwht.h"),
            *("codec-v4l2-fwht.c", "codec-v4l2-fwht.h"),
        )
    ),
    "vim2m": (f"{_TESTS}/vim2m.c",),
}
"""Modules that some of Debian's kernels lack, and their files in the kernel's source."""

EARLY_MODULES = ("virtio_pci", "virtio_blk", "ext4")
"""What a kernel must load, or have built in, before the root filesystem is there."""

PYTHON_TESTS = ("cffi", "hypothesis", "pytest", "pytest-timeout")
"""What pip installs for the guest, besides what pyproject.toml names."""

PYTHON_EXTRAS = ("test", "v4l2", "vulkan")
"""The groups of optional dependencies in pyproject.toml that the guest has."""

PYTHON_CROSS = "wheels"
"""The group of dependencies in pyproject.toml that tools/build-wheels needs, besides pip's own."""

HOST_TOOLS = {
    "apt-get": "apt",
    "depmod": "kmod",
    "dpkg-deb": "dpkg",
    "mke2fs": "e2fsprogs",
    "mmdebstrap": "mmdebstrap",
    "modprobe": "kmod",
    "tar": "tar",
    "unshare": "util-linux",
}
"""Commands the host needs, besides QEMU, and the package of Debian and Ubuntu that has each."""

HOST_TOOLS_CROSS = {"readelf": "binutils"}
"""The same, for another processor than this machine's: what tools/build-wheels needs."""

HOST_TOOLS_USER = {"newuidmap": "uidmap"}
"""The same, for anyone but root."""
