"""Surfaces of VA-API over a fake libva; tests/device/test_vaapi.py has libva and a driver."""

import ctypes
import errno
import os

import pytest

import dmabuf
from dmabuf.devices import drm, vaapi
from dmabuf.errors import BusyError, ClosedError
from tests import forking
from tests.support import assert_same, pattern, raises_errno

pytestmark = pytest.mark.usefixtures("leaves_nothing")

NODE = "/dev/dri/renderD128"
WIDTH, HEIGHT, PITCH = 200, 102, 256
LINEAR, UNKNOWN = 0, (1 << 56) - 1
UNIMPLEMENTED, TIMED_OUT = 0x14, 0x26
FOURCCS = {"NV12": b"NV12", "P010": b"P010", "YUYV": b"YUY2", "XR24": b"BGRX", "AR24": b"BGRA"}


class FakeLibva:
    """A driver whose surfaces are memfds. `status` has what a function returns, by its name."""

    def __init__(self) -> None:
        self.status: dict[str, int] = {}
        self.message = b""
        self.handle, self.initialized = 0x1234, False
        self.surfaces: dict[int, tuple] = {}
        self.left_busy = 0
        """How often a surface is busy yet."""
        self.fourcc: bytes | None = None
        self.modifiers = [LINEAR]
        self.composed = self.two_objects = False
        self.asked: list[object] = []

    def get_display(self, fd):
        return self.handle

    def on_error(self, handle, callback, _):
        self._callback = callback

    def on_info(self, *_):
        pass

    def initialize(self, handle, major, minor):
        if self.message:
            self._callback(None, self.message)
        major._obj.value, minor._obj.value = 1, 22
        self.initialized = not self.status.get("initialize")
        return self.status.get("initialize", 0)

    def terminate(self, handle):
        assert not self.surfaces
        self.initialized = False

    def vendor(self, handle):
        return b"a fake driver"

    def error_text(self, status):
        return b"error %d" % status

    def create(self, handle, rt_format, width, height, number, count, attributes, attribute_count):
        if self.status.get("create"):
            return self.status["create"]
        found = {one.type: one.value.value for one in attributes}
        if 7 in found:  # a descriptor
            about = ctypes.cast(found[7].p, ctypes.POINTER(vaapi._Descriptor)).contents
            content = vaapi._Descriptor.from_buffer_copy(about)
            assert found[6].i == 0x40000000
        else:
            content = found[1].i.to_bytes(4, "little")
        number._obj.value = 7 + len(self.surfaces)
        self.surfaces[number._obj.value] = (width, height, content)
        return 0

    def destroy(self, handle, number, count):
        del self.surfaces[number._obj.value]
        return 0

    def export(self, handle, number, kind, flags, found):
        self.asked.append(flags)
        if self.status.get("export") or (self.composed and flags & 4):
            return self.status.get("export", UNIMPLEMENTED)
        width, height, fourcc = self.surfaces[number]
        found.fourcc = int.from_bytes(self.fourcc or fourcc, "little")
        found.width, found.height, found.num_objects = width, height, 1 + self.two_objects
        for one in range(found.num_objects):
            fd = os.memfd_create("surface")
            os.ftruncate(fd, 2 * PITCH * HEIGHT)
            os.pwrite(fd, pattern(2 * PITCH * HEIGHT, 5 + one), 0)
            place = found.objects[one]
            place.fd, place.size, place.modifier = fd, 2 * PITCH * HEIGHT, self.modifiers[one]
        planes = [(0, 0), (self.two_objects, 0 if self.two_objects else PITCH * HEIGHT)]
        found.num_layers = 1 if self.composed else 2
        for index, (where, offset) in enumerate(planes):
            layer, at = (found.layers[0], index) if self.composed else (found.layers[index], 0)
            layer.num_planes = at + 1
            layer.object_index[at], layer.offset[at], layer.pitch[at] = where, offset, PITCH
        return 0

    def sync(self, handle, number, limit):
        assert 0 <= limit <= 100_000_000
        if self.status.get("sync"):
            return self.status["sync"]
        self.left_busy -= 1
        return TIMED_OUT if self.left_busy >= 0 else 0

    def state(self, handle, number, found):
        self.left_busy -= 1
        found._obj.value = 1 if self.left_busy >= 0 else 4
        return self.status.get("state", 0)

    def sync_forever(self, handle, number):
        assert self.left_busy < 0
        return self.status.get("sync_forever", 0)


@pytest.fixture
def fake(kernel, monkeypatch):
    made = FakeLibva()
    monkeypatch.setattr(vaapi, "_Libva", lambda: made)
    monkeypatch.setattr(
        vaapi, "open_node", lambda *_: os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    )
    yield made
    assert not made.initialized and not made.surfaces


@pytest.fixture
def display(fake):
    with vaapi.open(NODE) as made:
        yield made


@pytest.fixture
def buffer(kernel):
    with dmabuf.allocate("1MiB", exporter="udmabuf") as made:
        yield made


def test_a_display_has_its_driver(fake):
    with vaapi.open(NODE) as display:
        assert (display.version, display.vendor, display.handle) == ((1, 22), "a fake driver", 4660)
        assert fake.initialized and repr(display) == f"<dmabuf.Display {NODE} 'a fake driver'>"
    display.close()
    assert repr(display).endswith("closed>")
    with pytest.raises(ClosedError):
        display.make(64, 64)


@pytest.mark.parametrize(
    ("message", "match"), [(b"no fake_drv_video.so \n", "no fake_drv"), (b"", "error 1")]
)
def test_a_driver_that_cannot_start(fake, message, match):
    fake.message, fake.status["initialize"] = message, 1
    with raises_errno(errno.ENODEV, f"open the video driver: {match}.*install the driver"):
        vaapi.open(NODE)
    fake.handle = None
    with raises_errno(errno.ENODEV, "libva does not take this node; use a render node"):
        vaapi.open(NODE)


def test_a_machine_without_libva(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(vaapi.ctypes, "CDLL", missing)
    with raises_errno(errno.ENOENT, r"needs libva \(libva\.so\.2: cannot.*apt install libva-drm2"):
        vaapi.open(NODE)


@pytest.mark.parametrize("modifier", [None, 0, 1 << 56 | 2])
def test_a_picture_in_two_buffers_is_a_surface(fake, display, buffer, modifier):
    with dmabuf.allocate("512KiB", exporter="udmabuf") as chroma:
        planes = (drm.Plane(buffer, 64, PITCH), drm.Plane(chroma, 512, PITCH + 64))
        with display.surface(drm.Image(WIDTH, HEIGHT, "NV12", planes, modifier)) as surface:
            assert (surface.width, surface.height, surface.format) == (WIDTH, HEIGHT, "NV12")
            width, height, found = fake.surfaces[surface.number]
            layer, wanted = found.layers[0], UNKNOWN if modifier is None else modifier
            assert (width, height, found.width, found.height) == (WIDTH, HEIGHT) * 2
            assert [(one.fd, one.size, one.modifier) for one in found.objects[:2]] == [
                (buffer.fileno(), buffer.size, wanted), (chroma.fileno(), chroma.size, wanted),
            ]  # fmt: skip
            assert (found.num_objects, found.num_layers, layer.num_planes) == (2, 1, 2)
            assert layer.drm_format.to_bytes(4, "little") == b"NV12"
            assert list(layer.object_index) == [0, 1, 0, 0]
            assert list(layer.offset[:2]) == [64, 512]
            assert list(layer.pitch[:2]) == [PITCH, PITCH + 64]
            for one in (buffer, chroma):
                with pytest.raises(BusyError):
                    one.close()


@pytest.mark.parametrize("composed", [False, True])
@pytest.mark.parametrize("two", [False, True])
def test_a_surface_is_exported(fake, display, composed, two):
    fake.composed, fake.two_objects = composed, two
    fake.modifiers = [UNKNOWN] * 2 if two else [LINEAR]
    with display.make(WIDTH, HEIGHT) as surface:
        image = surface.export()
        assert len(fake.asked) == 1 + composed
    with image:  # it lasts longer
        assert (image.width, image.height, image.format) == (WIDTH, HEIGHT, "NV12")
        assert image.modifier == (None if two else 0)
        assert [one.pitch for one in image.planes] == [PITCH, PITCH]
        for number, one in enumerate(image.planes):
            expected = pattern(2 * PITCH * HEIGHT, 5 + (number if two else 0))
            got = one.buffer.pread(PITCH * HEIGHT, one.offset)
            assert_same(got, expected[one.offset : one.offset + PITCH * HEIGHT], f"plane {number}")


@pytest.mark.parametrize("name", FOURCCS)
def test_the_formats_of_a_surface(fake, display, name):
    with display.make(64, 64, name) as surface:
        assert fake.surfaces[surface.number] == (64, 64, FOURCCS[name])


def test_memory_that_has_no_description(fake, display):
    with display.make(WIDTH, HEIGHT) as surface:
        fake.fourcc = b"Y210"
        with raises_errno(errno.EINVAL, "describes it as 'Y210' with 1 modifiers"):
            surface.export()
        fake.fourcc, fake.two_objects, fake.modifiers = None, True, [1, 2]
        with raises_errno(errno.EINVAL, "describes it as 'NV12' with 2 modifiers"):
            surface.export()
        fake.status["export"] = 0x24
        with raises_errno(errno.EOPNOTSUPP, "export .* shares no memory by DRM_PRIME_2"):
            surface.export()


@pytest.mark.parametrize(
    ("status", "number", "match"),
    [
        (0x02, errno.ENOMEM, "the driver has no memory for it"),
        (
            0x12,
            errno.EINVAL,
            "the driver refuses the layout; use modifier=0 and a pitch of 256 bytes",
        ),
        (0x13, errno.EINVAL, "the driver has no surfaces of this size"),
        (0x7F, errno.EIO, "error 127"),
    ],
)
def test_a_surface_that_the_driver_refuses_leaves_the_buffer_free(
    fake, display, buffer, status, number, match
):
    fake.status["create"] = status
    with raises_errno(number, f"import 200x102 NV12: {match}", filename=NODE):
        display.surface(drm.image(buffer, WIDTH, HEIGHT, "NV12"))
    with raises_errno(number, f"make a surface of 64x32 XR24: {match}"):
        display.make(64, 32, "XR24")
    buffer.close()


def test_what_is_refused_before_the_driver(kernel, fake, display):
    kernel.limit = 64 << 20
    with dmabuf.allocate("65MiB", exporter="udmabuf") as large:
        with raises_errno(errno.EOPNOTSUPP, "it has 2 slabs, a surface needs one"):
            display.surface(drm.image(large, 64, 64))
    with dmabuf.allocate("64KiB", exporter="memfd") as plain:
        with raises_errno(errno.EOPNOTSUPP, "a memfd is not a dma-buf; allocate with"):
            display.surface(drm.image(plain, 64, 64))
        with raises_errno(errno.EINVAL, "use 'RG24' as a surface: known formats are NV12"):
            display.surface(drm.image(plain, 64, 64, "RG24"))
    for sides in ((0, 64), (64, -1), (64, 1 << 31)):
        with pytest.raises(ValueError, match="use 1 or more pixels"):
            display.make(*sides)


@pytest.mark.parametrize("old", [False, True])
def test_sync_waits_for_the_driver(fake, display, old):
    """Also where the driver can wait, but not for a time."""
    with display.make(64, 64) as surface:
        fake.status["sync"] = UNIMPLEMENTED if old else 0
        fake.left_busy = 3
        surface.sync()
        assert fake.left_busy == -1
        fake.left_busy = 1 << 40
        with pytest.raises(TimeoutError, match="the driver still works on it after 0 s"):
            surface.sync(0)
        with pytest.raises(TimeoutError, match=r"the driver still works on it after 0\.01 s"):
            surface.sync(0.01)
        fake.left_busy = 0
        failing = "sync_forever" if old else "sync"
        fake.status[failing] = 0x17
        with raises_errno(errno.EIO, "wait for .* an error in decoding"):
            surface.sync(5)
        fake.status[failing] = UNIMPLEMENTED if failing == "sync" else 0
        with pytest.raises(ValueError, match="timeout"):
            surface.sync(-1)
    with pytest.raises(ClosedError):
        surface.sync()


def test_closing_a_surface_waits_also_for_work_that_fails(fake, display, buffer):
    surface = display.surface(drm.image(buffer, 64, 64))
    fake.left_busy = 5
    surface.close()
    assert fake.left_busy == -1
    surface.close()
    surface = display.surface(drm.image(buffer, 64, 64))
    fake.status["sync"] = 0x17
    surface.close()
    buffer.close()
    assert "closed" in repr(surface)


def test_closing_a_display_closes_its_surfaces(fake, buffer):
    with vaapi.open(NODE) as display:
        surfaces = [display.surface(drm.image(buffer, 64, 64)), display.make(64, 64)]
    assert all(one.closed for one in surfaces)
    buffer.close()


def test_a_fork_leaves_the_display_to_the_parent(fake, display, buffer):
    surface = display.surface(drm.image(buffer, 64, 64))

    def child() -> None:
        surface.close()
        display.close()
        assert fake.initialized and len(fake.surfaces) == 1

    forking.in_child(child)
    surface.sync()
    surface.close()
