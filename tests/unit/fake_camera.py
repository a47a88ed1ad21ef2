"""A V4L2 driver that imports dma-bufs, behind the one function for ioctls and `os.open`.

Its node is an eventfd that is readable while frames are ready, and its dma-bufs are memfds, as
those of FakeKernel. A test decides when a frame is taken.
"""

import ctypes
import errno
import os
import stat
import types
from collections.abc import Callable

from linuxpy.video import raw

from dmabuf.kernel import uapi
from dmabuf.memory import exporters
from tests.unit.fake_kernel import FakeKernel

FORMATS = {
    "YUYV": 2, "GREY": 1, "NM12": 1, "NV12": 1, "YU12": 1, "RGB3": 3, "XR24": 4, "Y16": 2,
    "RGGB": 1, "pRAA": 5 / 4, "MJPG": 0,
}  # fmt: skip
"""The bytes of a pixel in the first plane."""
SIZES = [(64, 32), (128, 64)]


def _number(name: str) -> int:
    return int.from_bytes(name.ljust(4).encode(), "little")


def fail(number: int) -> None:
    raise OSError(number, os.strerror(number))


class FakeCamera(FakeKernel):
    """A camera at the path `node`; `asked` lists its ioctls by name, `errors` makes them fail."""

    def __init__(self, node: str, multi: bool = False) -> None:
        super().__init__()
        self.node, self.multi = node, multi
        self.caps = raw.Capability.STREAMING | raw.Capability.READWRITE
        self.caps |= raw.Capability.VIDEO_CAPTURE_MPLANE if multi else raw.Capability.VIDEO_CAPTURE
        self.fd = -1
        self.form = ("NM12" if multi else "YUYV", *SIZES[0])
        self.fps = (1, 30)
        self.padding = 0  # bytes after each row of the first plane
        self.color = (8, 0, 0, 0)  # V4L2_COLORSPACE_SRGB, and the defaults
        self.least = 2
        self.errors: dict[str, int] = {}
        self.fail_queue_of = -1
        self.count = 0
        self.streaming = False
        self.queued: list[tuple[int, list[int]]] = []
        self.done: list[tuple[int, int, int, list[int]]] = []
        self.sequence = 0
        self.asked: list[str] = []
        self.on_frame: Callable[[int], object] | None = None
        """If set, a frame comes whenever one is asked for, and this is told its number before."""

    def install(self, monkeypatch) -> "FakeCamera":
        """Have the package find this camera, and udmabufs."""
        real_open, real_stat = os.open, os.stat

        def open_node(path, flags, *more, **how):
            if path != self.node:
                return real_open(path, flags, *more, **how)
            assert flags & os.O_NONBLOCK and flags & os.O_CLOEXEC
            self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            return self.fd

        def stat_node(path, *more, **how):
            if path != self.node:
                return real_stat(path, *more, **how)
            return types.SimpleNamespace(st_mode=stat.S_IFCHR, st_rdev=os.makedev(81, 7))

        monkeypatch.setattr(os, "open", open_node)
        monkeypatch.setattr(os, "stat", stat_node)
        monkeypatch.setattr(uapi, "ioctl", self.ioctl)
        monkeypatch.setattr(exporters, "UDMABUF", os.devnull)
        return self

    # What the world does.

    def expose(self, content: bytes | None = None, flags: int = 0) -> None:
        """Take a frame into the next buffer, or lose it where none is queued."""
        assert self.streaming
        number, self.sequence = self.sequence, self.sequence + 1
        if not self.queued:
            return
        index, fds = self.queued.pop(0)
        sizes = self.sizes()
        for plane, (fd, size) in enumerate(zip(fds, sizes, strict=True)):
            data = bytes([(number + plane) % 256]) * size if content is None else content
            os.pwrite(fd, data, 0)
            sizes[plane] = len(data)
        self.done.append((index, number, flags, sizes))
        os.eventfd_write(self.fd, 1)

    def sizes(self) -> list[int]:
        name, _, height = self.form
        first = self.stride() * height
        if name == "NM12":
            return [first, first // 2]
        return [{"NV12": first * 3 // 2, "YU12": first * 3 // 2, "MJPG": 8192}.get(name, first)]

    def stride(self) -> int:
        name, width, _ = self.form
        return int(width * FORMATS[name]) + self.padding * (name != "MJPG")

    # What the driver answers.

    def ioctl(self, fd: int, request: int, argument: object) -> object:
        if fd != self.fd or isinstance(argument, bytes | bytearray):
            return super().ioctl(fd, request, argument)
        name = raw.IOC(request).name
        self.asked.append(name)
        if number := self.errors.get(name):
            fail(number)
        getattr(self, name.lower())(argument)
        return 0

    def querycap(self, caps: raw.v4l2_capability) -> None:
        caps.card, caps.driver = b"a fake", b"fake"
        caps.capabilities = raw.Capability.DEVICE_CAPS | raw.Capability.VIDEO_OUTPUT
        caps.device_caps = self.caps

    def enum_fmt(self, item: raw.v4l2_fmtdesc) -> None:
        if item.index >= len(FORMATS):
            fail(errno.EINVAL)
        item.pixelformat = _number(list(FORMATS)[item.index])

    def g_fmt(self, what: raw.v4l2_format) -> None:
        self._tell(what, self.form)

    def try_fmt(self, what: raw.v4l2_format) -> tuple[str, int, int]:
        pix = what.fmt.pix_mp if self.multi else what.fmt.pix
        name = pix.pixelformat.to_bytes(4, "little").decode().rstrip()
        near = min(SIZES, key=lambda size: abs(size[0] - pix.width) + abs(size[1] - pix.height))
        self._tell(what, (name, *near))
        return (name, *near)

    def s_fmt(self, what: raw.v4l2_format) -> None:
        if self.count:
            fail(errno.EBUSY)
        self.form, self.fps = self.try_fmt(what), (1, 30)

    def _tell(self, what: raw.v4l2_format, form: tuple[str, int, int]) -> None:
        pix = what.fmt.pix_mp if self.multi else what.fmt.pix
        before, self.form = self.form, form
        sizes, stride, self.form = self.sizes(), self.stride(), before
        pix.pixelformat = _number(form[0])
        pix.colorspace, pix.ycbcr_enc, pix.quantization, pix.xfer_func = self.color
        pix.width, pix.height = form[1:]
        planes = pix.plane_fmt if self.multi else [pix]
        if self.multi:
            pix.num_planes = len(sizes)
        for plane, size in zip(planes, sizes, strict=False):
            plane.sizeimage, plane.bytesperline = size, stride

    def g_parm(self, what: raw.v4l2_streamparm) -> None:
        per_frame = what.parm.capture.timeperframe
        per_frame.numerator, per_frame.denominator = self.fps

    def s_parm(self, what: raw.v4l2_streamparm) -> None:
        per_frame = what.parm.capture.timeperframe
        if per_frame.denominator <= 60 * per_frame.numerator:
            self.fps = (per_frame.numerator, per_frame.denominator)
        self.g_parm(what)

    def reqbufs(self, what: raw.v4l2_requestbuffers) -> None:
        assert what.memory == raw.Memory.DMABUF
        self.count = what.count = what.count and max(what.count, self.least)
        self.queued.clear()

    def qbuf(self, item: raw.v4l2_buffer) -> None:
        if item.index == self.fail_queue_of:
            fail(errno.EFAULT)
        assert item.index < self.count
        planes = [item.m.planes[i] for i in range(len(self.sizes()))] if self.multi else [item]
        for plane, size in zip(planes, self.sizes(), strict=True):
            assert stat.S_ISREG(os.fstat(plane.m.fd).st_mode) and plane.length >= size
        self.queued.append((item.index, [plane.m.fd for plane in planes]))

    def dqbuf(self, item: raw.v4l2_buffer) -> None:
        if not self.done and self.on_frame is not None:
            self.on_frame(self.sequence)
            self.expose()
        if not self.done:
            fail(errno.EAGAIN)
        item.index, item.sequence, flags, sizes = self.done.pop(0)
        item.flags = flags | raw.BufferFlag.TIMESTAMP_MONOTONIC
        item.timestamp.secs, item.timestamp.usecs = 7, item.sequence
        planes = [item.m.planes[i] for i in range(len(sizes))] if self.multi else [item]
        for plane, size in zip(planes, sizes, strict=True):
            plane.bytesused = size
        if self.multi:
            item.length = len(sizes)
        if not self.done:
            os.eventfd_read(self.fd)

    def streamon(self, kind: ctypes.c_int) -> None:
        self.streaming, self.sequence = True, 0

    def streamoff(self, kind: ctypes.c_int) -> None:
        self.streaming = False
        self.queued.clear()
        self.done.clear()
