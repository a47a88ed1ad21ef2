"""Show that udmabuf of Linux 6.11 and 6.12 maps the wrong pages of large folios into the kernel.

    modprobe vivid; echo 8 >/proc/sys/vm/nr_hugepages; python3 udmabuf_vmap.py    (root)

A udmabuf of one frame is made over a memfd of huge pages, at several offsets, and the camera vivid
captures into it. vivid writes frames through the dma-buf's vmap. All bytes of the memfd are 0xa5
before, so a page that still has only such bytes was not written.
"""

import fcntl
import mmap
import os
import struct
from pathlib import Path

HUGE, PAGE = 2 << 20, 4096
WIDTH, HEIGHT = 640, 360
FRAME = WIDTH * HEIGHT * 3
SIZE = -(-FRAME // PAGE) * PAGE
MEMORY = 2 * HUGE
CAPTURE, DMABUF = 1, 4  # V4L2_BUF_TYPE_VIDEO_CAPTURE, V4L2_MEMORY_DMABUF
UDMABUF_CREATE = 1 << 30 | 24 << 16 | ord("u") << 8 | 0x42


def v4l2(fd: int, direction: int, number: int, layout: str, *fields: object) -> None:
    """Issue an ioctl of V4L2; `layout` is the whole structure, `fields` what is not padding."""
    data = bytearray(struct.pack(layout, *fields))
    fcntl.ioctl(fd, direction << 30 | len(data) << 16 | ord("V") << 8 | number, data)


def capture(node: str, dmabuf: int) -> None:
    """Have the camera write one frame into the dma-buf."""
    camera = os.open(node, os.O_RDWR)
    buffer = "=IIIII40xIi4xI12x"  # struct v4l2_buffer
    v4l2(camera, 3, 39, "=i", 0)  # VIDIOC_S_INPUT
    v4l2(camera, 3, 5, "=I4xII4sI184x", CAPTURE, WIDTH, HEIGHT, b"RGB3", 1)  # VIDIOC_S_FMT
    v4l2(camera, 3, 8, "=III8x", 1, CAPTURE, DMABUF)  # VIDIOC_REQBUFS
    v4l2(camera, 3, 15, buffer, 0, CAPTURE, 0, 0, 1, DMABUF, dmabuf, SIZE)  # VIDIOC_QBUF
    v4l2(camera, 1, 18, "=i", CAPTURE)  # VIDIOC_STREAMON
    v4l2(camera, 3, 17, buffer, 0, CAPTURE, 0, 0, 0, DMABUF, 0, 0)  # VIDIOC_DQBUF
    os.close(camera)


def attempt(node: str, offset: int) -> None:
    """Capture a frame into a udmabuf at an offset of the memfd, and print which pages changed."""
    memfd = os.memfd_create("frame", os.MFD_ALLOW_SEALING | os.MFD_HUGETLB | os.MFD_HUGE_2MB)
    os.ftruncate(memfd, MEMORY)
    fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    memory = mmap.mmap(memfd, MEMORY)
    before = memory[:] = b"\xa5" * MEMORY
    device = os.open("/dev/udmabuf", os.O_RDWR)
    made = fcntl.ioctl(
        device, UDMABUF_CREATE, bytearray(struct.pack("=IIQQ", memfd, 0, offset, SIZE))
    )
    capture(node, made)
    changed = {at for at in range(0, MEMORY, PAGE) if memory[at : at + PAGE] != before[:PAGE]}
    inside = changed & set(range(offset, offset + SIZE, PAGE))
    print(
        f"udmabuf at {offset >> 10:4} KiB: {len(inside)} of {SIZE // PAGE} of its pages written, "
        f"{len(changed - inside)} pages outside of it written"
    )
    for fd in (made, device, memfd):
        os.close(fd)


def main() -> None:
    """Try each offset on the first camera of vivid."""
    names = Path("/sys/class/video4linux").glob("*/name")
    cameras = {one.read_text().strip(): f"/dev/{one.parent.name}" for one in names}
    print(f"Linux {os.uname().release}")
    for offset in (0, 64 << 10, HUGE - (8 << 10)):
        attempt(cameras["vivid-000-vid-cap"], offset)


if __name__ == "__main__":
    main()
