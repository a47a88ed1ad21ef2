"""`dmabuf record` on a fake driver: the bytes, the file beside them, and whole or not at all."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from tests.support import PAGE, assert_same, pattern
from tests.unit.command import dmabuf
from tests.unit.fake_camera import FakeCamera
from tests.unit.test_cli_json import checked

Capture = pytest.CaptureFixture[str]


pytestmark = pytest.mark.usefixtures("leaves_nothing")


@pytest.fixture(params=[False, True], ids=["one plane", "two planes"])
def multi(request) -> bool:
    return request.param


@pytest.fixture
def camera(monkeypatch) -> FakeCamera:
    return make(monkeypatch)


def make(monkeypatch, multi: bool = False) -> FakeCamera:
    fake = FakeCamera("/dev/video7", multi)
    fake.on_frame = lambda number: None
    return fake.install(monkeypatch)


def record(capsys: Capture, *arguments: object):
    return dmabuf(capsys, "record", "/dev/video7", *arguments)


def planes(fake: FakeCamera, number: int) -> list[bytes]:
    return [bytes([number + at]) * size for at, size in enumerate(fake.sizes())]


def test_a_file_and_the_one_beside_it(monkeypatch, multi, tmp_path: Path, capsys: Capture) -> None:
    fake = make(monkeypatch, multi)
    name = "NM12" if multi else "GREY"
    out = tmp_path / "out.raw"
    ended = record(capsys, out, "-n", 5, "--format", name, "--size", "128x64", "--json")
    assert (ended.status, ended.err) == (0, "")
    told, beside = json.loads(ended.out), json.loads((tmp_path / "out.raw.json").read_text())
    assert told | {"format": beside["format"]} == told | beside
    assert checked(ended.out)["format"] == "dmabuf-record/1"
    assert checked(json.dumps(beside))["format"] == "dmabuf-recording/1"
    assert (beside["fourcc"], beside["width"], beside["height"]) == (name, 128, 64)
    assert (beside["lost"], beside["clock"], beside["fps"]) == (0, "monotonic", "30")
    assert [frame["sequence"] for frame in beside["frames"]] == [0, 1, 2, 3, 4]
    assert told["copied"] == 0 or "direct" not in told["routes"]
    data, end = out.read_bytes(), 0
    assert len(data) == beside["size"]
    for number, frame in enumerate(beside["frames"]):
        assert frame["timestamp_ns"] == 7_000_000_000 + number * 1000
        for plane, expected in zip(frame["planes"], planes(fake, number), strict=True):
            assert plane["offset"] == -(-end // PAGE) * PAGE
            assert plane["nbytes"] == len(expected)
            end = plane["offset"] + plane["nbytes"]
            assert_same(data[plane["offset"] : end], expected, f"a plane of frame {number}")
    assert end == len(data)
    assert told["nbytes"] == 5 * sum(fake.sizes())
    assert sorted(os.listdir(tmp_path)) == ["out.raw", "out.raw.json"]


@pytest.mark.parametrize("padding", [0, 16])
@pytest.mark.parametrize("packed", [False, True])
def test_planes_in_one_buffer(
    packed: bool, padding: int, camera, tmp_path: Path, capsys: Capture
) -> None:
    """A frame is one range of the file; packed, nothing lies between its rows or behind it."""
    camera.form, camera.padding = ("NV12", 64, 32), padding
    content = pattern(camera.sizes()[0], 3)
    expose, camera.expose = camera.expose, lambda: expose(content)
    out = tmp_path / "out.raw"
    assert record(capsys, out, "-n", 3, *["--packed"] * packed).status == 0
    beside = json.loads((tmp_path / "out.raw.json").read_text())
    stride = 64 if packed else 64 + padding
    step = 64 * 48 if packed else PAGE
    assert (beside["pix_fmt"], beside["frame_step"]) == ("nv12", step)
    assert beside["container"] == ("packed" if packed else "raw")
    assert beside["color"] == {
        "space": "srgb", "encoding": "601", "quantization": "lim_range", "transfer": "srgb",
    }  # fmt: skip
    for number, frame in enumerate(beside["frames"]):
        assert [(p["offset"] - number * step, p["stride"]) for p in frame["planes"]] == [
            (0, stride),
            (32 * stride, stride),
        ]
        assert abs(frame["time_ns"] - frame["timestamp_ns"] - time_of_boot()) < 60 * 10**9
    rows = [content[at:][:stride] for at in range(0, len(content), 64 + padding)]
    expected = b"".join(rows)
    data = out.read_bytes()
    assert len(data) == 2 * step + len(expected)
    for number in range(3):
        assert_same(data[number * step :][: len(expected)], expected, f"frame {number}")


def time_of_boot() -> int:
    return time.time_ns() - time.monotonic_ns()


def rows_of(content: bytes, at: int, row: int, stride: int, rows: int) -> np.ndarray:
    """Rows without their padding, cut by a loop."""
    parts = [content[at + y * stride :][:row] for y in range(rows)]
    return np.frombuffer(b"".join(parts), np.uint8).reshape(rows, row)


def planar(name: str, content: bytes, stride: int) -> list[np.ndarray]:
    """Y, U and V of a picture of 64 by 32."""
    if name == "YUYV":
        both = rows_of(content, 0, 128, stride, 32)
        return [both[:, 0::2], both[:, 1::4], both[:, 3::4]]
    luma = rows_of(content, 0, 64, stride, 32)
    if name == "NV12":
        both = rows_of(content, stride * 32, 64, stride, 16)
        return [luma, both[:, 0::2], both[:, 1::2]]
    half = [stride * 32, stride * 32 + stride * 8]
    return [luma, *(rows_of(content, at, 32, stride // 2, 16) for at in half if name == "YU12")]


@pytest.mark.parametrize("padding", [0, 16])
@pytest.mark.parametrize(
    ("name", "space"),
    [("GREY", "mono"), ("YUYV", "422"), ("NV12", "420jpeg"), ("YU12", "420jpeg")],
)
def test_y4m(name: str, space: str, padding: int, camera, tmp_path: Path, capsys: Capture) -> None:
    camera.form, camera.padding = (name, 64, 32), padding
    contents = [pattern(camera.sizes()[0], seed) for seed in range(3)]
    expose, camera.expose = camera.expose, lambda: expose(contents[camera.sequence])
    ended = record(capsys, tmp_path / "out.Y4M", "-n", 3, "--json")
    assert (ended.status, ended.err) == (0, "")
    told, data = json.loads(ended.out), (tmp_path / "out.Y4M").read_bytes()
    head, _, rest = data.partition(b"\n")
    assert head == f"YUV4MPEG2 W64 H32 F30:1 I? A1:1 C{space} XCOLORRANGE=LIMITED".encode()
    frames = []
    for content in contents:
        planes = [plane.tobytes() for plane in planar(name, content, camera.stride())]
        frames.append(b"FRAME\n" + b"".join(planes))
    assert_same(rest, b"".join(frames), "the frames")
    assert told["routes"] == {"buffered": len(data)}
    assert told["copied"] >= len(data) == told["nbytes"] and "the CPU packed" in told["reason"]
    for frame, content in zip(told["frames"], contents, strict=True):
        for plane, expected in zip(
            frame["planes"], planar(name, content, camera.stride()), strict=True
        ):
            at, size = plane["offset"], plane["nbytes"]
            assert_same(data[at : at + size], expected.tobytes(), "a plane")
            assert plane["stride"] == expected.shape[1]


JPEG = io.BytesIO()
PIL.Image.new("RGB", (64, 32), (200, 100, 50)).save(JPEG, "JPEG")


@pytest.mark.parametrize(
    ("name", "pixels", "color", "expected"),
    [
        ("RGB3", bytes([1, 2, 3]) * 64 * 32, 8, (1, 2, 3)),
        ("XR24", bytes([1, 2, 3, 0]) * 64 * 32, 8, (3, 2, 1)),
        ("GREY", bytes([7]) * 64 * 32, 8, 7),
        ("MJPG", JPEG.getvalue(), 7, (200, 100, 50)),
        # 100 % bars of SMPTE 170M and BT.709 with 16 to 235, and JPEG's of all 256 levels.
        ("YUYV", bytes([235, 128]) * 64 * 32, 1, (255, 255, 255)),
        ("YUYV", bytes([81, 90, 81, 240]) * 32 * 32, 1, (255, 0, 0)),
        ("NV12", bytes([63]) * 64 * 32 + bytes([102, 240]) * 32 * 16, 3, (255, 0, 0)),
        ("YU12", bytes([29]) * 2048 + bytes([255]) * 512 + bytes([107]) * 512, 7, (0, 0, 255)),
    ],
)
def test_png(name, pixels, color, expected, camera, tmp_path: Path, capsys: Capture) -> None:
    """The third frame; the others are other pictures."""
    camera.form, camera.color = (name, 64, 32), (color, 0, 0, 0)
    expose = camera.expose
    camera.expose = lambda: expose(pixels if camera.sequence == 2 else bytes(len(pixels)))
    ended = record(capsys, tmp_path / "out.png", "-n", 3)
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.startswith("1 frame, ")
    with PIL.Image.open(tmp_path / "out.png") as picture:
        assert picture.size == (64, 32)
        found = np.asarray(picture)
    assert np.abs(found.astype(int) - np.array(expected)).max() <= 1


@pytest.mark.parametrize(
    ("name", "form", "status", "match"),
    [
        ("x.mp4", "YUYV", 2, "x.mp4: cannot write mp4; name it .y4m, or pipe to ffmpeg (--help)"),
        ("x.MKV", "YUYV", 2, "cannot write mkv; name it .y4m"),
        ("x.jpg", "YUYV", 2, "x.jpg: cannot write jpg; name it .png"),
        ("x.y4m", "RGB3", 1, "record: cannot make y4m of RGB3; try --format YUYV or NV12, or a"),
        ("x.png", "RGGB", 1, "record: cannot make png of RGGB; try --format YUYV or NV12, or a"),
    ],
)
def test_files_that_are_not_made(
    name: str, form: str, status: int, match: str, camera, tmp_path: Path, capsys: Capture
) -> None:
    for words in ([], ["--format", form]):
        camera.form = ("MJPG" if words else form, 64, 32)
        before = camera.form
        ended = record(capsys, tmp_path / name, "-n", 1, *words)
        assert (ended.status, ended.out) == (status, "") and match in ended.err
        assert os.listdir(tmp_path) == [] and camera.form == before


def test_png_without_pillow(camera, tmp_path: Path, capsys: Capture, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    ended = record(capsys, tmp_path / "x.png")
    assert ended.status == 1 and "needs PIL.Image" in ended.err
    assert ended.err.endswith("pip install dmabuf[png]\n")
    assert os.listdir(tmp_path) == []


def test_what_people_are_told(camera, tmp_path: Path, capsys: Capture) -> None:
    camera.on_frame = lambda number: setattr(camera, "sequence", number + (number == 2) * 3)
    ended = record(capsys, tmp_path / "out.raw", "--frames", 4)
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.startswith("4 frames, 16.4 kB in ")
    assert ", 3 lost: 64x32 YUYV, written " in ended.out
    assert ended.out.count("\n") == 1
    beside = json.loads((tmp_path / "out.raw.json").read_text())
    assert [frame["sequence"] for frame in beside["frames"]] == [0, 1, 5, 6]
    assert [frame["lost_before"] for frame in beside["frames"]] == [0, 0, 3, 0]
    assert record(capsys, tmp_path / "out.raw", "-q", "-n", 1).out == ""


def test_compressed_frames_differ_in_size(camera, tmp_path: Path, capsys: Capture) -> None:
    exposed = [b"short", b"x" * 4096, b"longer " * 9]
    expose = camera.expose
    camera.expose = lambda: expose(exposed[camera.sequence])
    out = tmp_path / "out.raw"
    assert record(capsys, out, "-n", 3).status == 0
    frames = json.loads((tmp_path / "out.raw.json").read_text())["frames"]
    data = out.read_bytes()
    for frame, expected in zip(frames, exposed, strict=True):
        (plane,) = frame["planes"]
        assert data[plane["offset"] :][: plane["nbytes"]] == expected
    assert len(data) == 2 * PAGE + len(exposed[2])


@pytest.mark.parametrize("there", [False, True])
def test_ctrl_c(there: bool, camera, tmp_path: Path, capsys: Capture) -> None:
    """With a number of frames it is an abort; without, the end."""
    out = tmp_path / "out.raw"
    if there:
        out.write_bytes(b"old")
        (tmp_path / "out.raw.json").write_text("older")

    def interrupt(number: int) -> None:
        if number == 3:
            signal.raise_signal(signal.SIGINT)

    camera.on_frame = interrupt
    ended = record(capsys, out, "--frames", 10)
    assert (ended.status, ended.out, ended.err) == (130, "", "error: stopped by SIGINT\n")
    assert sorted(os.listdir(tmp_path)) == (["out.raw", "out.raw.json"] if there else [])
    if there:
        assert out.read_bytes() == b"old"
        assert (tmp_path / "out.raw.json").read_text() == "older"
    ended = record(capsys, out)
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.startswith("3 frames, ")
    assert len(json.loads((tmp_path / "out.raw.json").read_text())["frames"]) == 3
    assert_same(out.read_bytes(), b"".join(planes(camera, n)[0] for n in range(3)), "the file")


def test_ctrl_c_before_the_first_frame(camera, tmp_path: Path, capsys: Capture) -> None:
    camera.on_frame = lambda _: signal.raise_signal(signal.SIGTERM)
    ended = record(capsys, tmp_path / "out.raw")
    assert (ended.status, ended.err) == (143, "error: stopped by SIGTERM\n")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("after", [0, 2])
def test_a_camera_that_fails_leaves_no_file(
    after: int, camera, tmp_path: Path, capsys: Capture
) -> None:
    camera.on_frame = lambda number: (
        number == after and camera.errors.update({"DQBUF": errno.ENODEV, "QBUF": errno.ENODEV})
    )
    (tmp_path / "out.raw").write_bytes(b"old")
    ended = record(capsys, tmp_path / "out.raw", "-n", 5)
    assert (ended.status, ended.out) == (1, "")
    assert ended.err.startswith("error: /dev/video7: ")
    assert ended.err.endswith("the device is gone (the old file is unchanged)\n")
    assert os.listdir(tmp_path) == ["out.raw"]
    assert (tmp_path / "out.raw").read_bytes() == b"old"


def test_a_frame_that_never_comes(camera, tmp_path: Path, capsys: Capture) -> None:
    camera.on_frame = None
    ended = record(capsys, tmp_path / "out.raw", "-n", 5, "--timeout", "0.02")
    assert ended.status == 1
    assert (
        "error: /dev/video7: wait for a frame: none arrived within 0.02 s; check the signal"
        in ended.err
    )
    assert "(no file was made)" in ended.err
    assert os.listdir(tmp_path) == []


def test_refusals_touch_nothing(camera, tmp_path: Path, capsys: Capture) -> None:
    for arguments, status, match in (
        (
            ["--format", "ABCD"],
            1,
            "/dev/video7: set the format: no format 'ABCD'; it has YUYV",
        ),
        (["--size", "100x100"], 1, "the nearest is"),
        (["--size", "axb"], 2, "invalid size 'axb': width and height in pixels"),
        (["--size", "0x5"], 2, "width and height in pixels"),
        (["--fps", "1000"], 1, "cannot deliver 1000 frames a second"),
        (["--require", "magic"], 2, "invalid choice: 'magic'"),
        (["--exporter", "nobody"], 1, "invalid exporter 'nobody'"),
        (["--exporter", "memfd"], 1, "is a memfd, not a dma-buf"),
        (["--buffers", "0"], 2, "--buffers"),
        (["-n", "0"], 2, "--frames"),
    ):
        ended = record(capsys, tmp_path / "out.raw", "-n", 1, *arguments)
        assert (ended.status, ended.out) == (status, ""), arguments
        assert match in ended.err
        assert os.listdir(tmp_path) == []
    ended = dmabuf(capsys, "record", "/dev/null", tmp_path / "out.raw")
    assert ended.err.startswith("error: /dev/null: not a video device")
    ended = record(capsys, tmp_path / "nowhere" / "out.raw", "-n", 1)
    assert ended.status == 1
    assert "its directory: No such file" in ended.err


def test_a_full_disk(camera, capsys: Capture, tmp_path: Path) -> None:
    """Known before the first frame where the frames' size is."""
    with pytest.MonkeyPatch.context() as patch:
        refused = OSError(errno.ENOSPC, "growing the file: No space left on device")
        patch.setattr("dmabuf.transfer.growth.allocate", lambda *_: (_ for _ in ()).throw(refused))
        ended = record(capsys, tmp_path / "out.raw", "-n", 5)
    assert ended.status == 1
    assert "No space left on device (no file was made)" in ended.err
    assert "STREAMON" not in camera.asked
    assert os.listdir(tmp_path) == []
    ended = record(capsys, "/dev/full", "-n", 5)
    assert ended.status == 1
    assert "error: /dev/full: " in ended.err
    assert "No space left on device" in ended.err


def test_a_pipe_gets_the_frames_one_behind_the_other(monkeypatch, multi, tmp_path, capsys) -> None:
    fake = make(monkeypatch, multi)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with subprocess.Popen(["cat", fifo], stdout=subprocess.PIPE) as reader:
        ended = record(capsys, fifo, "-n", 3, "--json")
        data = reader.stdout.read()
    assert (ended.status, ended.err) == (0, "")
    assert_same(data, b"".join(part for n in range(3) for part in planes(fake, n)), "the pipe")
    assert json.loads(ended.out)["routes"] == {"buffered": len(data)}
    assert os.listdir(tmp_path) == ["fifo"]


def test_a_reader_who_leaves(camera, tmp_path: Path, capsys: Capture) -> None:
    read, write = os.pipe()
    saved = os.dup(1)
    os.dup2(write, 1)
    os.close(write)
    camera.on_frame = lambda number: os.close(read) if number == 2 else None
    try:
        ended = record(capsys, "-")
    finally:
        os.dup2(saved, 1)
        os.close(saved)
    assert (ended.status, ended.err) == (141, "")


def test_zero_copy_or_nothing(camera, tmp_path: Path, capsys: Capture) -> None:
    ended = record(capsys, "/dev/null", "-n", 1, "--require", "zero-copy")
    assert ended.status == 1
    assert "/dev/null" in ended.err
