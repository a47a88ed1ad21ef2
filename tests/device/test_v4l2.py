"""Cameras by the kernel's vivid: every byte of every frame, and nothing left after a refusal."""

import contextlib
import errno
import fcntl
import json
import os
import signal
import stat
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import dmabuf
from dmabuf.devices import frames, v4l2
from dmabuf.memory import exporters
from tests import support
from tests.device.vivid import (
    CONTIGUOUS,
    METADATA,
    MOVE_RIGHT,
    MULTI,
    OUTPUT,
    SINGLE,
    Moving,
    picture,
    reference,
    skipped,
)
from tests.guards import needs
from tests.support import PAGE, assert_same, mounted, poison
from tests.unit.command import dmabuf as command
from tests.unit.command import finish, start

Capture = pytest.CaptureFixture[str]

SMALL = {"width": 320, "height": 180}


@pytest.fixture(scope="module")
def moving() -> Moving:
    return Moving(reference("RGB3", **SMALL), SMALL["width"])


def poison_all(camera: v4l2.Camera) -> None:
    for row in camera.buffers:
        for buffer in row:
            buffer.pwrite(poison(buffer.size), 0)


def assert_accounted(sequences: list[int], lost: int) -> None:
    """Every number is a frame's or was lost. Where vivid is late it may give two the same."""
    assert sequences == sorted(sequences)
    assert sequences[-1] - sequences[0] + 1 == len(set(sequences)) + lost


EXPORTERS = {
    "udmabuf": {"exporter": "udmabuf"},
    "huge pages": {"huge_pages": "2MiB"},
    "dma-heap": {"exporter": "system"},
    "the driver's own": {"exporter": "driver"},
}


@needs("cameras", "udmabuf", "dma_heap", "hugepages")
@pytest.mark.parametrize("which", EXPORTERS)
@pytest.mark.device_table("V4L2 camera", "import", "export")
def test_every_byte_of_a_picture_that_moves(which: str, moving: Moving) -> None:
    """At the camera's full rate: what it cannot deliver it says."""
    if which == "huge pages" and not exporters.maps_large_pages():
        with pytest.raises(OSError, match="huge pages"):
            v4l2.capture(SINGLE, **EXPORTERS[which])
        return
    frames, sequences = [], []
    with (
        picture(SINGLE, MOVE_RIGHT),
        v4l2.capture(SINGLE, format="RGB3", fps=120, **SMALL, **EXPORTERS[which]) as camera,
    ):
        assert camera.format.fps == 120
        poison_all(camera)
        for frame in camera:
            with frame:
                assert frame.clock == "monotonic" and not frame.error
                frames.append((frame.buffer.pread(frame.nbytes, 0), frame.lost))
                sequences.append(frame.sequence)
            if len(frames) == 40:
                break
        assert_accounted(sequences, camera.lost)
    moving.check(frames)


@needs("cameras", "udmabuf")
def test_at_the_full_rate_there_is_always_a_buffer_to_fill(moving: Moving) -> None:
    """So what is lost then, vivid's own thread was too late for."""
    frames, filled, back = [], [], []
    with (
        picture(SINGLE, MOVE_RIGHT),
        v4l2.capture(SINGLE, format="RGB3", fps=120, buffers=64, **SMALL) as camera,
    ):
        for frame in camera:
            with frame:
                frames.append((frame.buffer.pread(frame.nbytes, 0), frame.lost))
                filled.append(frame.timestamp_ns)
            back.append(time.monotonic_ns())
            if len(frames) == 160:
                break
        room = len(camera.buffers)
    assert room < 100
    wanting = [n for n in range(room, len(filled)) if back[n + 1 - room] > filled[n]]
    assert not wanting, "when these were filled there was no other buffer"
    moving.check(frames)


@needs("cameras", "udmabuf")
def test_none_is_lost_at_a_rate_that_the_machine_holds(moving: Moving) -> None:
    """Each compared as it comes. The rate is one at which vivid itself leaves none out."""
    told = []
    for fps in (60, 30, 15, 10, 5, 2):
        count = max(fps, 10)
        with (
            picture(SINGLE, MOVE_RIGHT),
            v4l2.capture(SINGLE, format="RGB3", fps=fps, **SMALL) as camera,
        ):
            for _, frame in zip(range(count), camera, strict=False):
                with frame:
                    moving.turn_of(frame.buffer.pread(frame.nbytes, 0))
        if not camera.lost:
            return
        told.append((fps, camera.lost, skipped(SINGLE, count)))
    pytest.fail(f"fps, lost of a second, left out by vivid itself: {told}")


@needs("cameras", "udmabuf", "dma_heap")
@pytest.mark.parametrize("exporter", ["udmabuf", "system", "driver"])
@pytest.mark.device_table("V4L2 camera", "import", "export")
def test_two_planes_in_a_buffer_each(exporter: str) -> None:
    expected = reference("NV12", **SMALL)
    cut = SMALL["width"] * SMALL["height"]
    with picture(MULTI), v4l2.capture(MULTI, format="NM12", exporter=exporter, **SMALL) as camera:
        poison_all(camera)
        for _ in range(6):
            with next(camera) as frame:
                one, other = frame.planes
                assert (one.nbytes, other.nbytes) == (cut, cut // 2)
                assert_same(one.buffer.pread(one.nbytes, 0), expected[:cut], "luma")
                assert_same(other.buffer.pread(other.nbytes, 0), expected[cut:], "chroma")


@needs("cameras", "udmabuf")
def test_the_planes_of_every_format_fill_what_the_driver_writes() -> None:
    """Of each known format that vivid has, so nearly all: an independent account of their sizes."""
    with pytest.raises(OSError, match="no format") as caught:
        v4l2.capture(SINGLE, format="none")
    names = str(caught.value).partition("it has ")[2].partition(": '/dev")[0].split(", ")
    known = [name for name in names if name in frames.V4L2_FORMATS]
    assert len(known) > 30
    wrong = {}
    for name in known:
        with v4l2.capture(SINGLE, format=name, **SMALL) as camera, next(camera) as frame:
            sizes = frame.nbytes, sum(plane.size for plane in camera.format.planes)
            rules = frames.V4L2_FORMATS[name]
            shapes = [frame.asarray(n).shape[:2] for n in range(len(rules))]
            rows = [-(-180 // rule.down) for rule in rules]
            if sizes[0] != sizes[1] or [shape[0] for shape in shapes] != rows:
                wrong[name] = sizes, shapes
    assert not wrong


@needs("cameras", "udmabuf")
def test_a_frame_stays_as_it_is_until_it_is_released(moving: Moving) -> None:
    with (
        picture(SINGLE, MOVE_RIGHT),
        v4l2.capture(SINGLE, format="RGB3", fps=60, buffers=3, timeout=1, **SMALL) as camera,
    ):
        kept = [next(camera) for _ in camera.buffers]
        first = [frame.buffer.pread(frame.nbytes, 0) for frame in kept]
        with pytest.raises(TimeoutError, match="all 3 buffers are held"):
            next(camera)
        for frame, before in zip(kept, first, strict=True):
            assert_same(frame.buffer.pread(frame.nbytes, 0), before, "a frame that is held")
            frame.release()
        later = [next(camera), next(camera)]
        assert later[0].lost > 10, "for a second there was nowhere to put a frame"
        assert camera.lost == sum(frame.lost for frame in (*kept, *later))
        for frame in later:
            moving.turn_of(frame.buffer.pread(frame.nbytes, 0))


# -- record


@needs("cameras", "udmabuf", "nvme")
@pytest.mark.parametrize("exporter", ["udmabuf", "huge pages"])
@pytest.mark.device_table("V4L2 camera", "import", "write", "zero-copy")
def test_a_recording(exporter: str, moving: Moving, tmp_path: Path, capsys: Capture) -> None:
    """To a filesystem on an NVMe drive, and no byte of a frame by the CPU."""
    how = []
    if exporter == "huge pages" and exporters.maps_large_pages():
        how = ["--huge-pages"]
    with (
        picture(SINGLE, MOVE_RIGHT),
        mounted(os.environ["DMABUF_TEST_NVME1"], "ext4", tmp_path / "mnt") as folder,
    ):
        out = folder / "out.raw"
        ended = command(
            capsys, "record", SINGLE, out, "-n", 40, "--format", "RGB3", "--size", "320x180",
            "--fps", 120, "--require", "zero-copy", "--json", "--sync", *how,
        )  # fmt: skip
        assert (ended.status, ended.err) == (0, "")
        told = json.loads(ended.out)
        assert set(told["routes"]) <= {"direct", "native"}
        assert told["copied"] == 0
        assert sorted(os.listdir(folder)) == ["lost+found", "out.raw", "out.raw.json"]
        data = out.read_bytes()
        frames = json.loads((folder / "out.raw.json").read_text())["frames"]
    found = []
    for frame in frames:
        (plane,) = frame["planes"]
        found.append((data[plane["offset"] :][: plane["nbytes"]], frame["lost_before"]))
    assert len(found) == 40
    moving.check(found)
    assert_accounted([frame["sequence"] for frame in frames], told["lost"])


@needs("cameras", "udmabuf", "root")
@pytest.mark.parametrize("frames", [["-n", "100"], []])
def test_a_full_disk(frames: list[str], tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "mnt"
    folder.mkdir()
    support.run("mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder)
    try:
        (folder / "out.raw").write_bytes(b"old")
        ended = command(
            capsys, "record", SINGLE, folder / "out.raw", "--format", "RGB3", "--size", "320x180",
            "--fps", 60, *frames,
        )  # fmt: skip
        assert (ended.status, ended.out) == (1, "")
        assert "No space left on device" in ended.err
        assert "the old file is unchanged" in ended.err
        assert os.listdir(folder) == ["out.raw"]
        assert (folder / "out.raw").read_bytes() == b"old"
    finally:
        support.run("umount", folder)


@needs("cameras", "udmabuf")
@pytest.mark.parametrize(("frames", "kept"), [([], True), (["-n", "2000"], False)])
def test_ctrl_c(frames: list[str], kept: bool, tmp_path: Path) -> None:
    process = start(
        "record", SINGLE, tmp_path / "out.raw", "--format", "RGB3", "--size", "320x180",
        "--progress", *frames,
    )  # fmt: skip
    line = process.stderr.readline()  # after a second
    process.send_signal(signal.SIGINT)
    ended = finish(process)
    assert line.startswith(b"recording: "), line
    if kept:
        assert ended.status == 0
        told = json.loads((tmp_path / "out.raw.json").read_text())
        assert told["size"] == (tmp_path / "out.raw").stat().st_size > 0
        count = len(told["frames"])
        assert ended.out.startswith(f"{count} frame{'s' * (count > 1)}, ")
    else:
        assert ended.status == 130
        assert ended.err.endswith("error: stopped by SIGINT\n")
        assert os.listdir(tmp_path) == []


@needs("cameras", "udmabuf")
def test_the_example(tmp_path: Path) -> None:
    told = support.run("python3", "examples/camera.py", SINGLE, tmp_path / "frames.raw")
    assert told.endswith("0 bytes copied by the CPU")
    assert stat.S_ISREG((tmp_path / "frames.raw").stat().st_mode)


# -- what is refused


@needs("cameras", "udmabuf", "root", "nvme")
def test_nodes_that_are_not_cameras() -> None:
    for path, number, match in (
        ("/dev/null", errno.ENODEV, "not a video device"),
        (os.environ["DMABUF_TEST_NVME0"], errno.ENODEV, "not a video device"),
        (OUTPUT, errno.ENODEV, "this node of 'vivid' has no frames"),
        (METADATA, errno.ENODEV, "this node of 'vivid' has no frames"),
        ("/dev/video99", errno.ENOENT, "no such video device"),
    ):
        with pytest.raises(OSError, match=match) as caught:
            v4l2.capture(path)
        assert (caught.value.errno, caught.value.filename) == (number, path)
    before = os.stat(SINGLE).st_mode
    os.chmod(SINGLE, 0o600)
    os.seteuid(65534)
    try:
        with pytest.raises(PermissionError, match="join its group, often video"):
            v4l2.capture(SINGLE)
    finally:
        os.seteuid(0)
        os.chmod(SINGLE, stat.S_IMODE(before))


@needs("cameras", "udmabuf")
def test_what_is_refused_leaves_the_format_and_the_rate() -> None:
    how = {"format": "YUYV", "width": 640, "height": 480, "fps": 15}
    with v4l2.capture(SINGLE, **how) as camera:
        before = camera.format
    with dmabuf.allocate(PAGE, exporter="udmabuf") as small:
        for how, match in (
            ({"format": "ABCD"}, "no format 'ABCD'; it has YUYV, "),
            ({"format": "GREY", "width": 650}, "it has no 650x"),
            ({"format": "RGB3", "fps": 1000, **SMALL}, "cannot deliver 1000 frames a second"),
            ({"format": "RGB3", "fps": 30, "buffers": [small], **SMALL}, f"has {PAGE} bytes"),
        ):
            with pytest.raises(OSError, match=match) as caught:
                v4l2.capture(SINGLE, **how)
            assert caught.value.errno == errno.EINVAL
            with v4l2.capture(SINGLE) as camera:
                assert camera.format == before


@contextlib.contextmanager
def scattered() -> Iterator[dmabuf.Buffer]:
    """A udmabuf of 40 MiB that is the same few pages again and again.

    They can lie one behind the other nowhere; and where the kernel bounces them, since they are
    above what the device reaches, two such do not fit into its 64 MiB for that.
    """
    size = 32 * PAGE
    memory = os.memfd_create("pieces", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    device = exporters.open_udmabuf()
    try:
        os.ftruncate(memory, size)
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        items = struct.pack("=I4xQQ", memory, 0, size) * 320
        request = bytearray(struct.pack("=II", 1, 320) + items)
        fd = fcntl.ioctl(device, 0x40087543, request)  # UDMABUF_CREATE_LIST
    finally:
        os.close(device)
        os.close(memory)
    try:
        buffer = dmabuf.from_fd(fd)
    finally:
        os.close(fd)
    with buffer:
        yield buffer


@needs("cameras", "udmabuf")
def test_an_import_that_the_driver_refuses() -> None:
    """By a device that takes memory in one piece; its own is."""
    how = {"format": "RGB3", **SMALL}
    large = {"format": "AR24", "width": 3840, "height": 2160}
    with scattered() as one, scattered() as other:
        with pytest.raises(OSError, match=r"import buffer [01] \(") as caught:
            v4l2.capture(CONTIGUOUS, buffers=[one, other], **large)
        assert caught.value.filename == CONTIGUOUS
        assert caught.value.errno in (errno.EINVAL, errno.EFAULT)
        with v4l2.capture(SINGLE, buffers=[one, other], **how) as camera:
            next(camera).release()  # one that does not mind takes them
    with v4l2.capture(CONTIGUOUS, exporter="driver", **how) as camera, next(camera) as frame:
        assert frame.nbytes == 320 * 180 * 3


@needs("cameras", "udmabuf")
def test_a_camera_in_use() -> None:
    with v4l2.capture(SINGLE):
        for how in ({}, {"format": "GREY"}):
            with pytest.raises(OSError, match="another program is using it") as caught:
                v4l2.capture(SINGLE, **how)
            assert caught.value.errno == errno.EBUSY
