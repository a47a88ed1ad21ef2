"""Constants of kernel interfaces that Python has no names for, and the ioctls that use them.

Every ioctl of the package goes through :func:`ioctl`, so tests have one place for a fake.
"""

import fcntl
import struct

ioctl = fcntl.ioctl  # `fcntl.ioctl` does not retry on EINTR: callers that may block do


def _ioc(direction: int, kind: str, number: int, size: int) -> int:
    return direction << 30 | size << 16 | ord(kind) << 8 | number


# <linux/dma-buf.h>
DMA_BUF_NAME_LEN = 32  # with the terminating zero
DMA_BUF_SYNC_READ = 1
DMA_BUF_SYNC_WRITE = 2
DMA_BUF_SYNC_START = 0
DMA_BUF_SYNC_END = 4
DMA_BUF_IOCTL_SYNC = _ioc(1, "b", 0, 8)  # struct dma_buf_sync { u64 flags; }
DMA_BUF_SET_NAME_B = _ioc(1, "b", 1, 8)  # the string itself, at most DMA_BUF_NAME_LEN
DMA_BUF_SYNC_FILE_STRUCT = struct.Struct("=Ii")  # flags, fd (export: returned)
DMA_BUF_IOCTL_EXPORT_SYNC_FILE = _ioc(3, "b", 2, DMA_BUF_SYNC_FILE_STRUCT.size)  # Linux 6.0
DMA_BUF_IOCTL_IMPORT_SYNC_FILE = _ioc(1, "b", 3, DMA_BUF_SYNC_FILE_STRUCT.size)  # Linux 6.0

# <linux/sync_file.h>
SYNC_MERGE_STRUCT = struct.Struct("=32siiII")  # name, fd2, fence (returned), flags, pad
SYNC_IOC_MERGE = _ioc(3, ">", 3, SYNC_MERGE_STRUCT.size)

# <linux/udmabuf.h>
UDMABUF_CREATE_STRUCT = struct.Struct("=IIQQ")  # memfd, flags, offset, size
UDMABUF_FLAGS_CLOEXEC = 1
UDMABUF_CREATE = _ioc(1, "u", 0x42, UDMABUF_CREATE_STRUCT.size)

# <linux/dma-heap.h>
DMA_HEAP_ALLOC_STRUCT = struct.Struct("=QIIQ")  # len, fd (returned), fd_flags, heap_flags
DMA_HEAP_IOCTL_ALLOC = _ioc(3, "H", 0, DMA_HEAP_ALLOC_STRUCT.size)

# <linux/memfd.h>
MFD_CLOEXEC = 1
MFD_ALLOW_SEALING = 2
MFD_HUGETLB = 4
MFD_NOEXEC_SEAL = 8  # Linux 6.3; EINVAL before
MFD_HUGE_SHIFT = 26  # log2 of the huge page's size goes here

# <linux/fcntl.h>
F_ADD_SEALS = 1033
F_GET_SEALS = 1034
F_SEAL_SEAL = 1
F_SEAL_SHRINK = 2
F_SEAL_GROW = 4
F_SEAL_WRITE = 8
F_SEAL_FUTURE_WRITE = 16

# <linux/fs.h>
BLKGETSIZE64 = _ioc(2, chr(0x12), 114, 8)

# <linux/nvme_ioctl.h>: struct nvme_passthru_cmd: opcode, flags, rsvd1, nsid, cdw2, cdw3, metadata,
# addr, metadata_len, data_len, cdw10 to cdw15, timeout_ms, result
NVME_CMD_STRUCT = struct.Struct("=BBHIIIQQIIIIIIIIII")
NVME_IOCTL_ID = _ioc(0, "N", 0x40, 0)
NVME_IOCTL_ADMIN_CMD = _ioc(3, "N", 0x41, NVME_CMD_STRUCT.size)
NVME_IOCTL_IO_CMD = _ioc(3, "N", 0x43, NVME_CMD_STRUCT.size)

# <drm/drm.h>, <drm/drm_mode.h>; a pointer in a struct is a plain 64-bit number
DRM_MAJOR = 226
DRM_VERSION_STRUCT = struct.Struct("=iiiI6Q")  # version, and (length, pointer) of three texts
DRM_GEM_CLOSE_STRUCT = struct.Struct("=II")  # handle, pad
DRM_PRIME_STRUCT = struct.Struct("=IIi")  # handle, flags, fd
DRM_RESOURCES_STRUCT = struct.Struct("=4Q8I")  # pointers to ids of fbs, crtcs, connectors, encoders
DRM_MODE_STRUCT = struct.Struct("=I10H3I32s")  # clock, timings, vrefresh, flags, type, name
DRM_CRTC_STRUCT = struct.Struct("=Q7I68s")  # connectors, their count, id, fb, x, y, gamma, valid
DRM_ENCODER_STRUCT = struct.Struct("=5I")  # id, type, crtc, possible crtcs, possible clones
DRM_CONNECTOR_STRUCT = struct.Struct("=4Q12I")  # pointers, counts, encoder, id, type, number, state
DRM_DUMB_STRUCT = struct.Struct("=6IQ")  # height, width, bpp, flags, handle, pitch, size
DRM_FB2_STRUCT = struct.Struct(
    "=5I4I4I4I4x4Q"
)  # id, size, format, flags, handles, pitches, offsets
DRM_DIRTY_STRUCT = struct.Struct("=4IQ")  # fb, flags, colour, count and pointer of clips
DRM_IOCTL_VERSION = _ioc(3, "d", 0x00, DRM_VERSION_STRUCT.size)
DRM_IOCTL_GEM_CLOSE = _ioc(1, "d", 0x09, DRM_GEM_CLOSE_STRUCT.size)
DRM_IOCTL_SET_MASTER = _ioc(0, "d", 0x1E, 0)
DRM_IOCTL_DROP_MASTER = _ioc(0, "d", 0x1F, 0)
DRM_IOCTL_PRIME_HANDLE_TO_FD = _ioc(3, "d", 0x2D, DRM_PRIME_STRUCT.size)
DRM_IOCTL_PRIME_FD_TO_HANDLE = _ioc(3, "d", 0x2E, DRM_PRIME_STRUCT.size)
DRM_IOCTL_MODE_GETRESOURCES = _ioc(3, "d", 0xA0, DRM_RESOURCES_STRUCT.size)
DRM_IOCTL_MODE_SETCRTC = _ioc(3, "d", 0xA2, DRM_CRTC_STRUCT.size)
DRM_IOCTL_MODE_GETENCODER = _ioc(3, "d", 0xA6, DRM_ENCODER_STRUCT.size)
DRM_IOCTL_MODE_GETCONNECTOR = _ioc(3, "d", 0xA7, DRM_CONNECTOR_STRUCT.size)
DRM_IOCTL_MODE_RMFB = _ioc(3, "d", 0xAF, 4)
DRM_IOCTL_MODE_DIRTYFB = _ioc(3, "d", 0xB1, DRM_DIRTY_STRUCT.size)
DRM_IOCTL_MODE_CREATE_DUMB = _ioc(3, "d", 0xB2, DRM_DUMB_STRUCT.size)
DRM_IOCTL_MODE_ADDFB2 = _ioc(3, "d", 0xB8, DRM_FB2_STRUCT.size)
DRM_MODE_FB_MODIFIERS = 2
DRM_MODE_CONNECTED = 1

# <linux/vfio.h>; its ioctls carry no size, their structs do
VFIO_TYPE1V2_IOMMU = 3
VFIO_GROUP_FLAGS_VIABLE = 1
VFIO_REGION_STRUCT = struct.Struct("=4I2Q")  # argsz, flags, index, capabilities, size, offset
VFIO_GROUP_STATUS_STRUCT = struct.Struct("=II")  # argsz, flags
# struct vfio_device_feature with a vfio_device_feature_dma_buf of one range (Linux 6.19): argsz,
# flags; region, open flags, flags, ranges; offset, length
VFIO_DMA_BUF_STRUCT = struct.Struct("=II4I2Q")
VFIO_DEVICE_FEATURE_GET = 1 << 16
VFIO_DEVICE_FEATURE_DMA_BUF = 11
VFIO_PCI_CONFIG_REGION = 7
VFIO_SET_IOMMU = _ioc(0, ";", 102, 0)
VFIO_GROUP_GET_STATUS = _ioc(0, ";", 103, 0)
VFIO_GROUP_SET_CONTAINER = _ioc(0, ";", 104, 0)
VFIO_GROUP_GET_DEVICE_FD = _ioc(0, ";", 106, 0)
VFIO_DEVICE_GET_REGION_INFO = _ioc(0, ";", 108, 0)
VFIO_DEVICE_FEATURE = _ioc(0, ";", 117, 0)

# <linux/magic.h>: filesystems whose files exist in the page cache only
MEMORY_FILESYSTEMS = {
    0x01021994: "tmpfs",
    0x858458F6: "ramfs",
    0x958458F6: "hugetlbfs",
}

EXT4 = 0xEF53
XFS = 0x58465342
HONEST_ABOUT_DIRECT_IO = {EXT4, XFS}
"""What statx(2) answers there (ext4_dio_alignment, xfs_report_dioalign) depends on the same flags
of the file as the I/O does, so O_DIRECT is honoured where it is stated."""
BTRFS = 0x9123683E
DROP_AFTER_DIRECT_WRITES = HONEST_ABOUT_DIRECT_IO | {BTRFS}  # iomap_dio_complete, in fs/iomap
FUSE = 0x65735546
OVERLAYFS = 0x794C7630

# <linux/fs.h>
FS_IOC_GETFLAGS = _ioc(2, "f", 1, struct.calcsize("l"))  # though the kernel writes an int
FS_COMPR_FL = 0x00000004
FS_ENCRYPT_FL = 0x00000800
FS_JOURNAL_DATA_FL = 0x00004000
FS_VERITY_FL = 0x00100000
FS_NOCOW_FL = 0x00800000
FSXATTR_STRUCT = struct.Struct("=5I8x")  # flags, extent size, extents, project, CoW extent size
FS_IOC_FSGETXATTR = _ioc(2, "X", 31, FSXATTR_STRUCT.size)
FS_XFLAG_REALTIME = 1

# <linux/fiemap.h>: start, length, flags, mapped extents (returned), extent count, reserved; and of
# each extent: offset in the file, place on the device, length, reserved, flags, reserved
FIEMAP_STRUCT = struct.Struct("=QQ4I")
FIEMAP_EXTENT_STRUCT = struct.Struct("=5QI12x")
FS_IOC_FIEMAP = _ioc(3, "f", 11, FIEMAP_STRUCT.size)
FIEMAP_FLAG_SYNC = 1
FIEMAP_EXTENT_LAST = 0x0001
FIEMAP_EXTENT_UNKNOWN = 0x0002
FIEMAP_EXTENT_DELALLOC = 0x0004
FIEMAP_EXTENT_ENCODED = 0x0008
FIEMAP_EXTENT_DATA_ENCRYPTED = 0x0080
FIEMAP_EXTENT_NOT_ALIGNED = 0x0100
FIEMAP_EXTENT_DATA_INLINE = 0x0200
FIEMAP_EXTENT_DATA_TAIL = 0x0400
FIEMAP_EXTENT_UNWRITTEN = 0x0800
FIEMAP_EXTENT_MERGED = 0x1000

# <linux/btrfs.h>, struct btrfs_ioctl_space_args: slots, spaces, and for each flags, bytes, used
BTRFS_SPACE_INFO_STRUCT = struct.Struct("=QQ")
BTRFS_SPACE_STRUCT = struct.Struct("=QQQ")
BTRFS_IOC_SPACE_INFO = _ioc(3, "\x94", 20, BTRFS_SPACE_INFO_STRUCT.size)
BTRFS_DATA = 1 << 0
BTRFS_MORE_THAN_ONE_COPY = 0x7F << 4  # RAID1, DUP, RAID10, RAID5, RAID6, RAID1C3, RAID1C4

_SYNC = struct.Struct("=Q")


def sync(fd: int, flags: int) -> None:
    """Issue DMA_BUF_IOCTL_SYNC; retry while a signal interrupts it."""
    argument = _SYNC.pack(flags)
    while True:
        try:
            ioctl(fd, DMA_BUF_IOCTL_SYNC, argument)
            return
        except (InterruptedError, BlockingIOError):
            continue


def set_name(fd: int, name: bytes) -> None:
    """Label a dma-buf; the label shows in fdinfo and in debugfs."""
    ioctl(fd, DMA_BUF_SET_NAME_B, name + b"\0")


def export_sync_file(fd: int, flags: int) -> int:
    """Return a sync file of a dma-buf's fences: a close-on-exec descriptor."""
    data = bytearray(DMA_BUF_SYNC_FILE_STRUCT.pack(flags, -1))
    ioctl(fd, DMA_BUF_IOCTL_EXPORT_SYNC_FILE, data)
    return int(DMA_BUF_SYNC_FILE_STRUCT.unpack(data)[1])


def import_sync_file(fd: int, flags: int, sync_file: int) -> None:
    """Add the fence of a sync file to a dma-buf."""
    ioctl(fd, DMA_BUF_IOCTL_IMPORT_SYNC_FILE, DMA_BUF_SYNC_FILE_STRUCT.pack(flags, sync_file))


def merge_sync_files(one: int, other: int) -> int:
    """Return a sync file that signals when both have: a close-on-exec descriptor."""
    data = bytearray(SYNC_MERGE_STRUCT.pack(b"dmabuf", other, -1, 0, 0))
    ioctl(one, SYNC_IOC_MERGE, data)
    return int(SYNC_MERGE_STRUCT.unpack(data)[2])


def udmabuf_create(device: int, memfd: int, offset: int, size: int) -> int:
    """Make a dma-buf over a range of a memfd; return its close-on-exec descriptor."""
    # A bytearray: with `bytes`, fcntl.ioctl returns those and not the descriptor.
    item = bytearray(UDMABUF_CREATE_STRUCT.pack(memfd, UDMABUF_FLAGS_CLOEXEC, offset, size))
    return int(ioctl(device, UDMABUF_CREATE, item))


def heap_alloc(heap: int, size: int, fd_flags: int) -> int:
    """Allocate a dma-buf from an open dma-heap; return its descriptor."""
    # A bytearray: the kernel writes the descriptor into it.
    data = bytearray(DMA_HEAP_ALLOC_STRUCT.pack(size, 0, fd_flags, 0))
    ioctl(heap, DMA_HEAP_IOCTL_ALLOC, data)
    return int(DMA_HEAP_ALLOC_STRUCT.unpack(data)[1])
