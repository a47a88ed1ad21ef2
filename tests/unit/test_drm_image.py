"""Pictures in Buffers: where the planes are, and what is refused before a device sees it."""

import errno
import itertools

import pytest

import dmabuf
from dmabuf.devices import drm
from dmabuf.devices._drm_formats import FORMATS, number, text


@pytest.fixture
def buffer():
    with dmabuf.allocate("64KiB", exporter="memfd") as made:
        yield made


@pytest.mark.parametrize(
    ("name", "width", "height", "pitch", "expected"),
    [
        ("XR24", 100, 50, None, [(0, 400)]),
        ("XR24", 100, 50, 512, [(0, 512)]),
        ("RG24", 33, 3, None, [(0, 99)]),
        ("RG16", 33, 3, None, [(0, 66)]),
        ("YUYV", 33, 3, None, [(0, 68)]),
        ("NV12", 100, 50, None, [(0, 100), (5000, 100)]),
        ("NV12", 101, 51, None, [(0, 101), (5151, 102)]),
        ("NV12", 100, 50, 128, [(0, 128), (6400, 128)]),
        ("NV16", 100, 50, None, [(0, 100), (5000, 100)]),
        ("NV24", 100, 50, None, [(0, 100), (5000, 200)]),
        ("P010", 100, 50, None, [(0, 200), (10000, 200)]),
        ("YU12", 100, 50, None, [(0, 100), (5000, 50), (6250, 50)]),
        ("YU24", 10, 10, 16, [(0, 16), (160, 16), (320, 16)]),
    ],
)
def test_where_the_planes_are(buffer, name, width, height, pitch, expected):
    picture = drm.image(buffer, width, height, name, pitch=pitch, offset=64, modifier=0)
    assert [(p.offset - 64, p.pitch) for p in picture.planes] == expected
    assert (picture.pitch, picture.buffer, picture.modifier) == (expected[0][1], buffer, 0)
    assert str(picture) == f"{width}x{height} {name}"


@pytest.mark.parametrize("name", FORMATS)
def test_size_is_what_an_image_takes(name):
    """A buffer of that size will do, and one byte less than is touched will not."""
    for width, height in itertools.product((1, 2, 7), repeat=2):
        size = drm.size(width, height, name)
        picture = drm.image(Sized(size), width, height, name)
        last, rule = picture.planes[-1], FORMATS[name][-1]
        end = last.offset + last.pitch * (rule.rows(height) - 1) + rule.least_pitch(width)
        assert end <= size
        with pytest.raises(OSError, match="allocate a larger") as caught:
            drm.image(Sized(end - 1), width, height, name)
        assert caught.value.errno == errno.EINVAL


class Sized:
    """A buffer of any size, as far as layouts are concerned."""

    def __init__(self, size):
        self.size = size


def test_formats_have_numbers():
    assert number("XR24") == 0x34325258
    assert number("R8") == 0x20203852
    for name in FORMATS:
        assert text(number(name)) == name
    assert text(number("XR24") | 1 << 31) == "XR24 big-endian"
    assert text(7) == "0x7"


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ({"format": "ABCD"}, "unknown pixel format 'ABCD': known are AB12?"),
        ({"format": ""}, "unknown pixel format ''"),
        ({"pitch": 399}, "a row of 100 pixels takes 400 bytes, and the pitch is 399"),
        ({"offset": 60_000}, "its 50 rows of 400 bytes from offset 60000 end at 80000, and the b"),
        ({"width": 1 << 20}, "the buffer holds 65536 bytes: allocate a larger"),
        ({"height": 1 << 20}, "allocate a larger"),
    ],
)
def test_what_does_not_fit(buffer, how, match):
    sides = {"width": 100, "height": 50} | how
    with pytest.raises(OSError, match=match) as caught:
        drm.image(buffer, **sides)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize(
    "how",
    [
        {"width": 0},
        {"height": -1},
        {"width": 1 << 32},
        {"offset": -1},
        {"offset": 1 << 32},
        {"pitch": 0},
        {"pitch": -400},
        {"modifier": -1},
        {"modifier": 1 << 64},
    ],
)
def test_numbers_out_of_bounds(buffer, how):
    with pytest.raises(ValueError, match=next(iter(how))):
        drm.image(buffer, **({"width": 100, "height": 50} | how))


def test_numbers_that_are_none(buffer):
    for how in ({"width": 1.5}, {"height": "1"}, {"pitch": 512.0}, {"width": True}):
        with pytest.raises(TypeError, match=next(iter(how))):
            drm.image(buffer, **({"width": 100, "height": 50} | how))


def test_tiles_are_for_the_driver_to_check(buffer):
    assert drm.image(buffer, 500, 500, pitch=512, modifier=1 << 56 | 1).modifier == 1 << 56 | 1


def test_planes_in_buffers_of_their_own(buffer):
    with dmabuf.allocate(4096, exporter="memfd") as other:
        planes = (drm.Plane(buffer, 0, 64), drm.Plane(other, 0, 64))
        picture = drm.Image(64, 64, "NV12", planes)
        assert picture.buffer is buffer
        for wrong in (planes[:1], planes + planes):
            with pytest.raises(OSError, match=f"NV12 has 2 planes, and {len(wrong)} were given"):
                drm.Image(64, 64, "NV12", wrong)
        with pytest.raises(OSError, match="64x128 NV12, plane 1: its 64 rows of 128 bytes"):
            drm.Image(64, 128, "NV12", (planes[0], drm.Plane(other, 0, 128)))


def test_an_image_closes_its_buffers():
    buffer = dmabuf.allocate(4096, exporter="memfd")
    with drm.image(buffer, 32, 32) as picture:
        assert picture.buffer is buffer
    assert buffer.closed


@pytest.mark.parametrize(
    ("path", "code", "match"),
    [
        ("/dev/dri/card-of-nobody", errno.ENOENT, "those that are there are in /dev/dri"),
        ("/dev/null", errno.ENODEV, "is no DRM device"),
        ("/", errno.ENODEV, "is no DRM device"),
    ],
)
def test_nodes_that_are_none(path, code, match):
    with pytest.raises(OSError, match=match) as caught:
        drm.Card(path)
    assert (caught.value.errno, caught.value.filename) == (code, path)
