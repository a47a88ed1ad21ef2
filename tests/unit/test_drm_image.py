"""Pictures in Buffers: where the planes are, and what is refused before a device sees it."""

import errno
import itertools

import pytest

import dmabuf
from dmabuf.devices import drm
from tests.support import raises_errno


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


FORMATS = [
    *("R8", "RG16", "RG24", "XR24", "AYUV", "AB48", "YUYV", "NV12", "NV16", "NV24", "P010"),
    *("YU12", "YU16", "YU24"),
]


@pytest.mark.parametrize("name", FORMATS)
def test_size_is_what_an_image_takes(buffer, name):
    """So many bytes are enough, and one pixel less than the last row has is not."""
    for width, height in itertools.product((1, 2, 7), repeat=2):
        size = drm.size(width, height, name)
        picture = drm.image(buffer, width, height, name, offset=buffer.size - size)
        last = picture.planes[-1]
        assert last.offset + last.pitch <= buffer.size
        with raises_errno(errno.EINVAL, "allocate a larger"):
            drm.image(buffer, width, height, name, offset=buffer.size - size + last.pitch)


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ({"format": "ABCD"}, "unknown pixel format 'ABCD': known are AB12?"),
        ({"format": ""}, "unknown pixel format ''"),
        ({"pitch": 399}, "pitch 399 is less than the 400 bytes of a row"),
        ({"offset": 60_000}, "it ends at byte 80000, the buffer has 65536"),
        ({"width": 1 << 20}, "the buffer has 65536; allocate a larger"),
        ({"height": 1 << 20}, "allocate a larger"),
    ],
)
def test_what_does_not_fit(buffer, how, match):
    sides = {"width": 100, "height": 50} | how
    with raises_errno(errno.EINVAL, match):
        drm.image(buffer, **sides)


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


def test_arguments_that_are_not_numbers(buffer):
    with pytest.raises(TypeError, match=r"a dmabuf\.Buffer is needed"):
        drm.image(bytearray(40_000), 100, 50)
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
            with pytest.raises(OSError, match=f"NV12 has 2 planes, {len(wrong)} were given"):
                drm.Image(64, 64, "NV12", wrong)
        with pytest.raises(OSError, match="64x128 NV12, plane 1: it ends at byte 8128"):
            drm.Image(64, 128, "NV12", (planes[0], drm.Plane(other, 0, 128)))


def test_an_image_closes_its_buffers():
    buffer = dmabuf.allocate(4096, exporter="memfd")
    with drm.image(buffer, 32, 32) as picture:
        assert picture.buffer is buffer
    assert buffer.closed


@pytest.mark.parametrize(
    ("path", "code", "match"),
    [
        ("/dev/dri/card-of-nobody", errno.ENOENT, "use /dev/dri/card0"),
        ("/dev/null", errno.ENODEV, "not a DRM device"),
        ("/", errno.ENODEV, "not a DRM device"),
    ],
)
def test_nodes_that_are_not_drm_devices(path, code, match):
    with raises_errno(code, match, filename=path):
        drm.Card(path)
