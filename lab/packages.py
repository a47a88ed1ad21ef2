"""What is installed where: the one place with package lists.

A change of a list here changes the cached piece's key, so that piece is built again.
"""

SUITE = "trixie"
"""The Debian release of the guest's root filesystem."""

PYTHON = "3.13"
"""The version of that release's Python."""

KERNELS = {"backports": f"{SUITE}-backports", "stable": SUITE}
"""The values of `--kernel` that are not a path, and the suite each takes its kernel from."""

KERNEL = "linux-image-amd64"
"""The package that depends on the newest kernel of its suite."""

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
    "rsync",
    "strace",
    "xfsprogs",
    "xxd",
)
"""What the tests call."""

GUEST = tuple(sorted({*GUEST_BASE, *GUEST_BUILD, *GUEST_TESTS}))
"""Every package of the guest's root filesystem, on top of Debian's minimal set."""

_TESTS = "drivers/media/test-drivers"

MODULES: dict[str, tuple[str, ...]] = {
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
"""Modules that Debian's kernels lack, and their files in the kernel's source."""

EARLY_MODULES = ("virtio_pci", "virtio_blk", "ext4")
"""What a kernel must load, or have built in, before the root filesystem is there."""

PYTHON_TESTS = ("cffi", "hypothesis", "pytest", "pytest-timeout")
"""What pip installs for the guest, besides what pyproject.toml names."""

PYTHON_EXTRAS = ("test", "v4l2", "vulkan")
"""The groups of optional dependencies in pyproject.toml that the guest has."""

HOST_TOOLS = {
    "apt-get": "apt",
    "depmod": "kmod",
    "dpkg-deb": "dpkg",
    "mke2fs": "e2fsprogs",
    "mmdebstrap": "mmdebstrap",
    "modprobe": "kmod",
    "qemu-system-x86_64": "qemu-system-x86",
    "tar": "tar",
    "unshare": "util-linux",
}
"""Commands the host needs, and the package of Debian and Ubuntu that has each."""

HOST_TOOLS_USER = {"newuidmap": "uidmap"}
"""The same, for anyone but root."""
