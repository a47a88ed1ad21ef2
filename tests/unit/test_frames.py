"""The pictures in a camera's frames: planes, arrays over them, colours, and pictures for DRM."""

import errno
import gc
import time

import numpy as np
import pytest

from dmabuf.devices import drm, v4l2
from dmabuf.errors import BusyError, ClosedError
from tests.support import assert_same, pattern, raises_errno
from tests.unit.fake_camera import FakeCamera

NODE = "/dev/video7"
WIDTH, HEIGHT = 64, 32


def take(fake: FakeCamera, camera: v4l2.Camera, content: bytes | None = None) -> v4l2.Frame:
    with pytest.raises(TimeoutError):
        next(camera)
    fake.expose(content)
    return next(camera)


@pytest.fixture(params=[0, 16], ids=["", "padded"])
def fake(request, monkeypatch):
    made = FakeCamera(NODE).install(monkeypatch)
    made.padding = request.param
    return made


CHROMA = (HEIGHT // 2, WIDTH // 2)
PICTURES = [  # the shape and dtype of each plane
    ("GREY", [((HEIGHT, WIDTH), "u1")]),
    ("RGGB", [((HEIGHT, WIDTH), "u1")]),
    ("Y16", [((HEIGHT, WIDTH), "<u2")]),
    ("pRAA", [((HEIGHT, WIDTH * 5 // 4), "u1")]),
    ("RGB3", [((HEIGHT, WIDTH, 3), "u1")]),
    ("XR24", [((HEIGHT, WIDTH, 4), "u1")]),
    ("YUYV", [((HEIGHT, WIDTH, 2), "u1")]),
    ("NV12", [((HEIGHT, WIDTH), "u1"), ((*CHROMA, 2), "u1")]),
    ("YU12", [((HEIGHT, WIDTH), "u1"), (CHROMA, "u1"), (CHROMA, "u1")]),
]


@pytest.mark.parametrize(("name", "shapes"), PICTURES, ids=[name for name, _ in PICTURES])
def test_arrays_have_every_pixel_and_no_padding(name, shapes, fake):
    fake.form = (name, WIDTH, HEIGHT)
    content = pattern(sum(fake.sizes()), 7)
    with v4l2.capture(NODE, timeout=0) as camera, take(fake, camera, content) as frame:
        assert (frame.width, frame.height, frame.format) == (WIDTH, HEIGHT, camera.format)
        assert frame.stride == fake.stride() and frame.nbytes == len(content)
        at = 0
        for number, (shape, dtype) in enumerate(shapes):
            row = int(np.prod(shape[1:])) * np.dtype(dtype).itemsize
            stride = fake.stride() * (WIDTH // 2 if shape == CHROMA else WIDTH) // WIDTH
            plane = frame.planes[number]
            assert plane == (frame.buffer, at, stride * shape[0], stride, shape[0], row)
            array = frame.asarray(number)
            assert (array.shape, array.dtype, array.strides[0]) == (shape, dtype, stride)
            rows = [content[at + stride * y :][:row] for y in range(shape[0])]
            assert_same(array.tobytes(), b"".join(rows), f"plane {number}")
            at += stride * shape[0]
            del array
        assert at == len(content)
        with pytest.raises(
            IndexError, match=f"{name} has {len(shapes)} planes; plane={number + 1}"
        ):
            frame.asarray(number + 1)


def test_planes_in_buffers_of_their_own(monkeypatch):
    fake = FakeCamera(NODE, multi=True).install(monkeypatch)
    fake.padding = 8
    with v4l2.capture(NODE, timeout=0) as camera, take(fake, camera) as frame:
        assert [plane.buffer for plane in frame.planes] == list(camera.buffers[0])
        luma, chroma = frame.asarray(0), frame.asarray(1)
        assert luma.shape == (HEIGHT, WIDTH) and chroma.shape == (*CHROMA, 2)
        assert (luma == 0).all() and (chroma == 1).all()
        del luma, chroma


def test_compressed_frames_are_bytes(fake):
    fake.form = ("MJPG", WIDTH, HEIGHT)
    with v4l2.capture(NODE, timeout=0) as camera, take(fake, camera, b"compressed") as frame:
        assert frame.planes == ((frame.buffer, 0, 10, 10, 1, 10),)
        assert frame.asarray().tobytes() == b"compressed"
        with raises_errno(errno.EINVAL, "DRM has no format MJPG; capture another"):
            drm.image(frame)


def test_an_array_shares_the_memory_and_holds_the_frame(fake):
    with v4l2.capture(NODE, timeout=0) as camera:
        frame = take(fake, camera)
        array = frame.asarray()
        array[1, 0] = (7, 9)
        assert frame.buffer.pread(2, frame.stride) == b"\7\x09"
        with pytest.raises(BusyError, match="an array over it exists"):
            frame.release()
        part = array[:2, ::2, 0]
        del frame, array
        gc.collect()
        for _ in range(2 * len(camera.buffers)):
            fake.expose()
            next(camera)  # dropped at once, unlike the first
        assert part.tolist()[1][0] == 7
        del part
        fake.expose()
        frame = next(camera)
        frame.release()
        with pytest.raises(ClosedError, match="was released"):
            frame.asarray()


@pytest.mark.parametrize(("name", "drm_name"), [("RGB3", "BG24"), ("NV12", "NV12")])
def test_a_frame_as_a_picture_of_drm(name, drm_name, fake):
    fake.form = (name, WIDTH, HEIGHT)
    with v4l2.capture(NODE, timeout=0) as camera, take(fake, camera) as frame:
        picture = drm.image(frame)
        assert str(picture) == f"64x32 {drm_name}" and picture.buffer is frame.buffer
        assert [(p.offset, p.pitch) for p in picture.planes] == [
            (p.offset, p.stride) for p in frame.planes
        ]


@pytest.mark.parametrize(
    ("name", "color", "expected"),
    [
        ("YUYV", (3, 0, 0, 0), ("rec709", "709", "lim_range", "709")),
        ("YUYV", (7, 0, 0, 0), ("jpeg", "601", "full_range", "srgb")),
        ("RGB3", (8, 0, 0, 0), ("srgb", "601", "full_range", "srgb")),
        ("YUYV", (1, 2, 1, 7), ("smpte170m", "709", "full_range", "smpte2084")),
        ("YUYV", (200, 0, 2, 99), ("200", "601", "lim_range", "99")),
    ],
)
def test_colours(name, color, expected, fake):
    fake.form, fake.color = (name, WIDTH, HEIGHT), color
    with v4l2.capture(NODE) as camera:
        assert camera.format.color == v4l2.Color(*expected)


def test_the_time_of_day_of_a_frame(fake):
    with v4l2.capture(NODE, timeout=0) as camera, take(fake, camera) as frame:
        age = time.monotonic_ns() - frame.timestamp_ns
        assert abs(time.time_ns() - frame.time_ns - age) < 1_000_000_000 * 60
