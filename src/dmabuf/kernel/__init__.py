"""The kernel room: what this package asks of Linux, and how it reads the answers.

Each module wraps one interface and adds no policy: `uapi` has constants and ioctls, `proc` reads
text files of /proc and /sys, `files` finds out how a file takes O_DIRECT, `extents` where it lies
on its block device, `nvme` talks to the character devices of NVMe namespaces, `pci` compares the
places of devices on the bus, `ublk` makes block devices that a process serves, `fence` waits for
and exchanges the fences of dma-bufs, and `landlock` gives up access to files.
What allocates memory belongs to `memory`; what decides how bytes move belongs to `transfer`.

The modules are the face: `from dmabuf.kernel import files`. Each is loaded when it is imported.
"""

__all__ = [
    "extents",
    "fence",
    "files",
    "landlock",
    "log",
    "nvme",
    "pci",
    "proc",
    "process",
    "uapi",
    "ublk",
]
