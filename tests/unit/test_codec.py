"""Codecs on a fake driver: what the kernel's own test drivers do not do, and refusals."""

import errno
import os

import pytest
from linuxpy.video import raw

from dmabuf.devices import v4l2
from dmabuf.errors import BusyError
from tests.resources import held
from tests.unit.fake_camera import FakeCamera, fail

NODE = "/dev/video7"
OUTPUT = raw.BufType.VIDEO_OUTPUT


class FakeEncoder(FakeCamera):
    """An encoder: pictures in YUYV, packets in MJPG. A test ends an input by `encode`."""

    def __init__(self) -> None:
        super().__init__(NODE)
        self.caps = raw.Capability.STREAMING | raw.Capability.VIDEO_M2M
        self.least = 1
        self.inputs: list[tuple[int, int, int]] = []  # number, descriptor, bytes
        self.read: list[tuple[int, int]] = []  # number, flags
        self.stopped = False

    def _side(self, what: object) -> None:
        """Answer for the pictures or for the packets."""
        self.form = ("YUYV" if what.type == OUTPUT else "MJPG", 64, 32)

    def enum_fmt(self, item: raw.v4l2_fmtdesc) -> None:
        if item.index:
            fail(errno.EINVAL)
        coded = item.type != OUTPUT
        item.pixelformat = int.from_bytes(b"MJPG" if coded else b"YUYV", "little")
        item.flags = raw.ImageFormatFlag.COMPRESSED if coded else 0

    def g_fmt(self, what: raw.v4l2_format) -> None:
        self._side(what)
        super().g_fmt(what)

    def s_fmt(self, what: raw.v4l2_format) -> None:
        self._side(what)
        self._tell(what, self.form)

    try_fmt = s_fmt

    def g_parm(self, what: object) -> None:
        fail(errno.ENOTTY)

    def g_ctrl(self, what: object) -> None:
        fail(errno.EINVAL)

    def encoder_cmd(self, what: raw.v4l2_encoder_cmd) -> None:
        self.stopped = True

    def qbuf(self, item: raw.v4l2_buffer) -> None:
        self._side(item)
        if item.type != OUTPUT:
            super().qbuf(item)
        elif self.fail_queue_of == "input":
            fail(errno.EINVAL)
        else:
            self.inputs.append((item.index, item.m.fd, item.bytesused))

    def dqbuf(self, item: raw.v4l2_buffer) -> None:
        self._side(item)
        if item.type != OUTPUT:
            super().dqbuf(item)
        elif not self.read:
            fail(errno.EAGAIN)
        else:
            item.index, item.flags = self.read.pop(0)

    def streamoff(self, kind: object) -> None:
        if kind.value == OUTPUT:
            self.inputs.clear()
            self.read.clear()
        else:
            super().streamoff(kind)

    def encode(self, flags: int = 0) -> None:
        """Make a packet of the oldest input: how many bytes it had."""
        index, fd, nbytes = self.inputs.pop(0)
        self.read.append((index, flags))
        self._side(raw.v4l2_buffer())
        self.expose(os.pread(fd, 16, 0) + nbytes.to_bytes(4, "little"), flags)


@pytest.fixture(autouse=True)
def nothing_left_behind():
    before = held()
    yield
    assert held() == before


@pytest.fixture
def fake(monkeypatch):
    return FakeEncoder().install(monkeypatch)


def codec(**how):
    return v4l2.codec(NODE, **{"timeout": 0} | how)


def send(mine, fill=b"\1"):
    room = mine.input()
    room.buffer.pwrite(fill * 16, 0)
    mine.send(room)


def test_the_fake_encodes(fake):
    with codec() as mine:
        assert (mine.kind, mine.format.fourcc) == ("encoder", "MJPG")
        send(mine)
        fake.encode()
        with next(mine) as packet:
            assert packet.buffer.pread(20, 0) == b"\1" * 16 + (64 * 32 * 2).to_bytes(4, "little")
        mine.drain()
        assert fake.stopped


def test_a_codec_that_stops_in_the_middle(fake):
    """The driver reports EIO, as after an error of its hardware; a flush begins again."""
    with codec() as mine:
        send(mine)
        fake.errors["DQBUF"] = errno.EIO
        with pytest.raises(OSError, match="the driver ended the stream") as caught:
            next(mine)
        assert (caught.value.errno, caught.value.filename) == (errno.EIO, NODE)
        del fake.errors["DQBUF"]
        mine.flush()
        assert not fake.inputs
        send(mine, b"\2")
        fake.encode()
        with next(mine) as packet:
            assert packet.buffer.pread(16, 0) == b"\2" * 16


def test_a_packet_with_an_error(fake):
    with codec() as mine:
        send(mine)
        fake.encode(raw.BufferFlag.ERROR)
        with next(mine) as packet:
            assert packet.error
        assert mine.damaged == 1


@pytest.mark.parametrize(
    ("which", "number", "match"),
    [
        ("outputs", errno.EFAULT, "import buffer 1 .* into fake: it needs contiguous memory"),
        ("REQBUFS", errno.EINVAL, "it does not import dma-bufs; use a heap of contiguous memory"),
        ("STREAMON", errno.ENOSPC, "start the stream"),
    ],
)
def test_a_driver_that_refuses(which, number, match, fake):
    if which == "outputs":
        fake.fail_queue_of = 1
    else:
        fake.errors[which] = number
    with pytest.raises(OSError, match=match) as caught:
        codec()
    assert (caught.value.errno, caught.value.filename) == (number, NODE)


def test_an_input_that_the_driver_refuses(fake):
    """It stays the program's, to be sent again or given back."""
    with codec(inputs=1) as mine:
        room = mine.input()
        fake.fail_queue_of = "input"
        with pytest.raises(OSError, match=r"import buffer 0 .* into fake: it refuses such memory"):
            mine.send(room)
        fake.fail_queue_of = -1
        assert not room.sent
        with pytest.raises(TimeoutError, match="take the outputs"):
            mine.input()
        mine.send(room)
        with pytest.raises(BusyError):
            room.buffer.close()


def test_an_input_that_is_forgotten_comes_back(fake):
    with codec(inputs=1) as mine:
        mine.input()
        with mine.input() as room:
            assert not room.sent
        send(mine)
        assert len(fake.inputs) == 1


@pytest.mark.parametrize("name", ["outputs", "inputs", "width", "height"])
def test_invalid_numbers(name, fake):
    for value in (0, -1, 1 << 32):
        with pytest.raises(ValueError, match="a positive number"):
            codec(**{name: value})
    assert not fake.asked
