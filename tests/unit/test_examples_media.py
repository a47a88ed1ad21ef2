"""The examples with media libraries: GStreamer, libcamera, PyAV and Pillow."""

import os
import runpy
import site
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import PIL.Image
import pytest

import dmabuf
from tests.guards import needs
from tests.support import assert_same, pattern
from tests.unit.fake_camera import FakeCamera

EXAMPLES = Path(__file__).parents[2] / "examples"
WIDTH, HEIGHT = 64, 48
FRAME = WIDTH * HEIGHT * 3 // 2


def planar(frame: bytes) -> bytes:
    """An NV12 frame as I420."""
    luma, chroma = frame[: WIDTH * HEIGHT], frame[WIDTH * HEIGHT :]
    return luma + chroma[0::2] + chroma[1::2]


@needs("gstreamer")
@pytest.mark.parametrize(
    ("elements", "shared", "convert"),
    [("identity", 5, bytes), ("videoconvert ! video/x-raw,format=I420", 0, planar)],
)
def test_gstreamer(elements, shared, convert, tmp_path):
    """Memory that passes through stays the same; what an element makes is copied."""
    frames = [pattern(FRAME, seed) for seed in range(5)]
    (tmp_path / "in").write_bytes(b"".join(frames))
    # PyGObject is Debian's, for Debian's Python. -W: its importer is of the older kind.
    command = ["/usr/bin/python3", "-W", "error", "-W", "ignore::ImportWarning"]
    command += [EXAMPLES / "gstreamer_frames.py", tmp_path / "in", WIDTH, HEIGHT]
    command += [tmp_path / "out", elements]
    paths = [os.path.dirname(os.path.dirname(dmabuf.__file__)), *site.getsitepackages()]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment, timeout=60
    )
    assert (done.stderr, done.returncode) == ("", 0)
    assert done.stdout.startswith(f"5 frames, {shared} in shared memory, {5 * FRAME:,} bytes ")
    assert_same((tmp_path / "out").read_bytes(), b"".join(map(convert, frames)), "the frames")


class Picamera2:
    """As much of Picamera2 and libcamera as the example uses: two frame buffers, in turn.

    All planes of a FrameBuffer are in one descriptor here, as on a Raspberry Pi.
    """

    def __init__(self):
        size, half = WIDTH * HEIGHT, WIDTH * HEIGHT // 4
        self.held, self.taken = False, 0
        self.fds = [os.memfd_create(f"camera {n}") for n in range(2)]
        for fd in self.fds:
            os.ftruncate(fd, 8192)
        self.layout = [(0, size), (size, half), (size + half, half)]

    def create_video_configuration(self):
        return {}

    def configure(self, config):
        assert config == {}

    def start(self):
        pass

    def capture_request(self):
        assert not self.held, "each frame goes back before the next"
        fd = self.fds[self.taken % 2]
        os.pwrite(fd, pattern(FRAME, self.taken), 0)
        self.held, self.taken = True, self.taken + 1
        planes = [SimpleNamespace(fd=fd, offset=at, length=size) for at, size in self.layout]
        return SimpleNamespace(
            request=SimpleNamespace(buffers={"a stream": SimpleNamespace(planes=planes)}),
            stream_map={"main": "a stream"},
            config={"main": {"format": "YUV420", "size": (WIDTH, HEIGHT), "stride": WIDTH}},
            release=lambda: setattr(self, "held", False),
        )

    def stop(self):
        assert not self.held
        for fd in self.fds:
            os.close(fd)


def test_libcamera(monkeypatch, tmp_path, capsys):
    module = ModuleType("picamera2")
    module.Picamera2 = Picamera2
    monkeypatch.setitem(sys.modules, "picamera2", module)
    main = runpy.run_path(str(EXAMPLES / "libcamera_frames.py"))["main"]
    main(str(tmp_path / "out"), 5)
    expected = b"".join(pattern(FRAME, number) for number in range(5))
    assert_same((tmp_path / "out").read_bytes(), expected, "the frames")
    assert capsys.readouterr().out.startswith("5 frames of 64x48 YUV420, stride 64\nroute ")


@needs("av")
def test_pyav(monkeypatch, tmp_path, capsys):
    """Encoded without loss and decoded again."""
    import av

    fake = FakeCamera("/dev/video7").install(monkeypatch)
    fake.form, fake.padding = ("NV12", WIDTH, HEIGHT), 16
    fake.on_frame = lambda number: None
    expose = fake.expose
    frames = [pattern(FRAME, seed) for seed in range(4)]

    def padded():
        rows = np.frombuffer(frames[fake.sequence], np.uint8).reshape(-1, WIDTH)
        expose(np.pad(rows, ((0, 0), (0, 16)), constant_values=255).tobytes())

    fake.expose = padded
    main = runpy.run_path(str(EXAMPLES / "encode_video.py"))["main"]
    main("/dev/video7", str(tmp_path / "out.mkv"), 4, "ffv1")
    assert capsys.readouterr().out == "4 frames of 64x48 NV12 at 30 fps, 0 lost\n"
    with av.open(tmp_path / "out.mkv") as container:
        decoded = [frame.to_ndarray(format="yuv420p") for frame in container.decode(video=0)]
    assert len(decoded) == 4
    for frame, found in zip(frames, decoded, strict=True):
        assert_same(found.tobytes(), planar(frame), "a frame")


def test_pillow(tmp_path, capsys):
    pixels = np.frombuffer(pattern(WIDTH * HEIGHT * 3, 5), np.uint8).reshape(HEIGHT, WIDTH, 3)
    PIL.Image.fromarray(pixels).save(tmp_path / "in.png")
    main = runpy.run_path(str(EXAMPLES / "pillow_picture.py"))["main"]
    main(tmp_path / "in.png", tmp_path / "out.png")
    with PIL.Image.open(tmp_path / "out.png") as picture:
        assert (np.asarray(picture) == pixels).all()
    assert capsys.readouterr().out.startswith("64x48 XR24 in a ")
