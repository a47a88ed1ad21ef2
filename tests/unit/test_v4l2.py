"""Cameras on a fake driver: frames, back-pressure, refusals, and that nothing is left behind."""

import errno
import gc
import select
import threading
import time

import pytest

import dmabuf
from dmabuf.devices import v4l2
from dmabuf.errors import BusyError, ClosedError
from dmabuf.kernel import fence
from tests import forking
from tests.support import assert_same, in_child, poison, raises_errno
from tests.unit.fake_camera import FORMATS, FakeCamera

NODE = "/dev/video7"
FRAME = 64 * 32 * 2


pytestmark = pytest.mark.usefixtures("leaves_nothing")


@pytest.fixture(params=[False, True], ids=["one plane", "two planes"])
def multi(request):
    return request.param


@pytest.fixture
def camera(monkeypatch):
    return FakeCamera(NODE).install(monkeypatch)


def capture(**how):
    """A camera that does not wait: a frame is ready, or `next` raises TimeoutError."""
    return v4l2.capture(NODE, **{"timeout": 0} | how)


def streaming(**how):
    """A camera whose stream has started."""
    mine = capture(**{"buffers": 2} | how)
    with pytest.raises(TimeoutError):
        next(mine)
    return mine


# -- frames


def test_frames(monkeypatch, multi):
    fake = FakeCamera(NODE, multi).install(monkeypatch)
    with capture(buffers=3) as camera:
        assert (camera.card, camera.driver, camera.lost) == ("a fake", "fake", 0)
        assert (camera.format.width, camera.format.height, camera.format.fps) == (64, 32, 30)
        assert [plane.size for plane in camera.format.planes] == fake.sizes()
        for row in camera.buffers:
            for buffer in row:
                buffer.pwrite(poison(buffer.size), 0)
        assert not fake.streaming, "the first request for a frame starts the stream"
        with pytest.raises(TimeoutError, match="signal"):
            next(camera)
        for number in range(7):
            fake.expose()
            frame = next(camera)
            assert (frame.sequence, frame.lost, frame.error) == (number, 0, False)
            assert (frame.timestamp_ns, frame.clock) == (7_000_000_000 + number * 1000, "monotonic")
            assert frame.nbytes == sum(fake.sizes())
            for at, (plane, size) in enumerate(zip(frame.planes, fake.sizes(), strict=True)):
                expected = bytes([number + at]) * size
                assert_same(plane.buffer.pread(plane.nbytes, plane.offset), expected, "a plane")
            frame.release()
            frame.release()
            assert len(fake.queued) == 3
    assert not fake.streaming and camera.closed
    camera.close()


def test_a_held_frame_is_not_written_over_and_the_lost_are_counted(camera):
    with streaming() as mine:
        camera.expose()
        camera.expose()
        one, other = next(mine), next(mine)
        for _ in range(3):
            camera.expose()
        assert_same(one.buffer.pread(FRAME, 0), bytes(FRAME), "the first")
        assert_same(other.buffer.pread(FRAME, 0), b"\1" * FRAME, "the second")
        with pytest.raises(TimeoutError, match="all 2 buffers are held"):
            next(mine)
        one.release()
        camera.expose()
        third = next(mine)
        assert (third.sequence, third.lost, mine.lost) == (5, 3, 3)
        assert third.buffer is one.buffer
        third.release()
        other.release()
        camera.sequence = 0  # a driver that restarts its numbers has lost none
        camera.expose()
        assert next(mine).lost == 0


def test_a_wrapped_sequence(camera):
    with streaming() as mine:
        camera.sequence = (1 << 32) - 1
        camera.expose()
        camera.sequence = 1
        camera.expose()
        assert [next(mine).lost for _ in range(2)] == [0, 1]


def test_a_dropped_frame_is_released(camera):
    with streaming() as mine:
        for number in range(6):
            camera.expose()
            assert next(mine).sequence == number
        assert mine.lost == 0


def test_a_frame_in_use_is_not_released(camera):
    with streaming() as mine:
        camera.expose()
        frame = next(mine)
        with frame.buffer.map() as view:
            with pytest.raises(BusyError):
                frame.release()
            assert not frame.released and len(camera.queued) == 1
            del frame
            gc.collect()
            with pytest.raises(TimeoutError):
                next(mine)
            assert len(camera.queued) == 1, "its memory is still mapped"
            assert view[0] == 0
        with pytest.raises(TimeoutError):
            next(mine)
        assert len(camera.queued) == 2
        with pytest.raises(BusyError):
            mine.buffers[0][0].close()


def test_a_frame_returns_after_the_fences_of_its_buffer(camera, monkeypatch):
    with streaming() as mine:
        camera.expose()
        frame = next(mine)
        pending = [True]

        def wait(fds, direction, timeout=None, **_):
            assert (list(fds), direction) == ([frame.buffer.fileno()], "write")
            if pending:
                raise TimeoutError(errno.ETIMEDOUT, "a device still uses this buffer")

        monkeypatch.setattr(fence, "wait", wait)
        with pytest.raises(TimeoutError, match="still uses"):
            frame.release()
        assert len(camera.queued) == 1
        pending.clear()
        frame.release()
        assert len(camera.queued) == 2


def test_a_frame_with_an_error(camera):
    with streaming() as mine:
        camera.expose(b"half", flags=0x40)
        frame = next(mine)
        assert frame.error and frame.nbytes == 4
        assert "Frame 0 of /dev/video7, 4 bytes" in repr(frame)


def test_buffers_of_the_caller(monkeypatch, multi):
    fake = FakeCamera(NODE, multi).install(monkeypatch)
    rows = [[dmabuf.allocate(size, exporter="udmabuf") for size in fake.sizes()] for _ in range(2)]
    with streaming(buffers=rows if multi else [row[0] for row in rows]) as mine:
        assert [list(row) for row in mine.buffers] == rows
        fake.expose()
        with next(mine) as frame:
            assert frame.buffer is rows[0][0]
    for row in rows:
        for buffer in row:
            assert not buffer.closed
            buffer.close()


def test_in_an_event_loop(run, camera):
    import anyio

    async def main():
        with capture(buffers=2, timeout=None) as mine:
            frames = []

            async def look():
                async for frame in mine:
                    with frame:
                        frames.append(frame.sequence)
                    if len(frames) == 5:
                        return

            async with anyio.create_task_group() as group:
                group.start_soon(look)
                while len(frames) < 5:
                    await anyio.sleep(0)
                    if camera.streaming and camera.queued:
                        camera.expose()
            assert frames[:2] == [0, 1] and mine.lost == 0
            for _ in range(len(camera.done)):
                (await mine.__anext__()).release()
            with anyio.move_on_after(0) as scope:
                await mine.__anext__()
            assert scope.cancelled_caught
        with pytest.raises(ClosedError):
            await mine.__anext__()
        with capture() as mine, pytest.raises(TimeoutError):
            await mine.__anext__()

    run(main)


# -- the end


def test_closing_ends_an_iteration_in_another_thread(camera):
    mine = capture(timeout=None)
    ended = []

    def look():
        with pytest.raises(ClosedError):
            next(mine)
        ended.append(True)

    thread = threading.Thread(target=look)
    thread.start()
    while not camera.streaming:
        time.sleep(0.001)
    mine.close()
    thread.join()
    assert ended


def test_closing_with_a_view_of_a_frame(camera):
    mine = streaming()
    camera.expose()
    frame = next(mine)
    with frame.buffer.map() as view:
        with pytest.raises(BufferError):
            mine.close()
        assert mine.closed and view[0] == 0
        frame.release()
    mine.close()
    assert frame.buffer.closed


def test_a_forgotten_camera_closes_itself(camera):
    mine = capture()
    with pytest.warns(ResourceWarning, match=r"unclosed <dmabuf\.Camera"):
        del mine
        gc.collect()


def test_a_fork_leaves_the_stream_to_the_parent(camera):
    with streaming() as mine:
        camera.expose()
        frame = next(mine)
        before = list(camera.asked)

        def child():
            frame.release()
            with pytest.raises(ClosedError, match="fork"):
                next(mine)
            mine.close()
            assert camera.asked == before

        forking.in_child(child)
        frame.release()
        camera.expose()
        assert next(mine).sequence == 1


# -- what is asked for


def test_the_format_is_what_was_asked_for(camera):
    with capture(format="GREY", width=128, height=64, fps=25) as mine:
        assert str(mine.format) == "128x64 GREY at 25 fps"
    assert camera.form == ("GREY", 128, 64)


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ({"format": "ABCD"}, "no format 'ABCD'; it has " + ", ".join(FORMATS)),
        ({"format": "much too long"}, "no format"),
        ({"format": "Grüß"}, "no format"),
        ({"width": 120}, "no 120x32 YUYV; the nearest is 128x64 YUYV"),
        ({"width": (1 << 32) + 64}, "no 4294967360x32 YUYV; the nearest is 64x32"),
        ({"height": (1 << 32) + 32}, "no 64x4294967328 YUYV; the nearest is 64x32"),
        ({"fps": 1000}, "cannot deliver 1000 frames a second; the nearest is 30"),
        ({"fps": (1 << 32) + 30}, r"cannot deliver 4.29497e\+09 frames a second"),
    ],
)
def test_what_the_device_lacks(how, match, camera):
    before = camera.form, camera.fps
    with raises_errno(errno.EINVAL, match, filename=NODE):
        capture(**how)
    assert (camera.form, camera.fps) == before
    assert "QBUF" not in camera.asked


@pytest.mark.parametrize(
    "refusal", ["the rate", "the buffers", "an import", "REQBUFS", "QBUF", "an interrupt"]
)
def test_a_refused_capture_restores_the_format_and_the_rate(camera, monkeypatch, refusal):
    camera.form, camera.fps = ("YUYV", 64, 32), (1, 12)
    how = {"format": "GREY", "width": 128, "height": 64, "fps": 25}
    error = OSError
    if refusal == "the rate":
        how["fps"] = 1000
    elif refusal == "the buffers":
        how["exporter"], error = "nobody", ValueError
    elif refusal == "an import":
        camera.fail_queue_of = 2
    elif refusal == "an interrupt":
        error = KeyboardInterrupt
        monkeypatch.setattr(camera, "qbuf", lambda item: (_ for _ in ()).throw(error))
    else:
        camera.errors[refusal] = errno.EIO
    with pytest.raises(error):
        capture(**how)
    monkeypatch.undo()
    camera.errors, camera.fail_queue_of = {}, -1
    camera.install(monkeypatch)
    assert (camera.form, camera.fps) == (("YUYV", 64, 32), (1, 12))
    assert "S_FMT" in camera.asked and not camera.count and not camera.queued
    with capture() as mine:
        assert str(mine.format) == "64x32 YUYV at 12 fps"


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ({"buffers": 0}, ValueError),
        ({"buffers": []}, ValueError),
        ({"buffers": ["x", "y"]}, TypeError),
        ({"buffers": 2.0}, TypeError),
        ({"timeout": -1}, ValueError),
        ({"fps": 0}, ValueError),
        ({"fps": float("inf")}, ValueError),
        ({"fps": float("nan")}, ValueError),
        ({"format": 3}, TypeError),
        ({"width": 64.5}, TypeError),
        ({"width": -5}, ValueError),
        ({"exporter": "nobody"}, ValueError),
    ],
)
def test_invalid_arguments(how, error, camera):
    with pytest.raises(error):
        capture(**how)
    assert camera.count == 0 and "S_FMT" not in camera.asked


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("small", "buffer 1 has 4096 bytes; a plane of 128x64 YUYV at 30 fps takes 16384"),
        ("memfd", "buffer 1 is a memfd"),
        ("slabs", "buffer 1 has 2 slabs"),
        ("twice", "buffer 1 was given twice"),
        ("one too few", "needs 2 buffers, not 1"),
        ("two planes", "frame 0 was given 2"),
    ],
)
def test_buffers_that_cannot_be_used(kind, match, camera):
    camera.form = ("YUYV", 128, 64)
    dmabuf.allocate(4096, exporter="udmabuf").close()  # probes the kernel once, by a larger one
    camera.limit = 16384
    size = {"small": 4096, "slabs": 32768}.get(kind, 16384)
    good = dmabuf.allocate(16384, exporter="udmabuf")
    bad = dmabuf.allocate(size, exporter="memfd" if kind == "memfd" else "udmabuf")
    given = {"twice": [good, good], "one too few": [good], "two planes": [(good, bad)] * 2}
    with raises_errno(errno.EINVAL, match):
        capture(buffers=given.get(kind, [good, bad]))
    good.close()  # nothing holds them
    bad.close()


@pytest.mark.parametrize(
    ("call", "number", "match"),
    [
        ("QUERYCAP", errno.ENOTTY, "not a V4L2 device"),
        ("G_FMT", errno.EINVAL, "get the format"),
        ("S_FMT", errno.EBUSY, "set the format: another program is using it"),
        ("S_PARM", errno.ENOTTY, "leave fps= out"),
        ("REQBUFS", errno.EINVAL, "not import dma-bufs; use exporter='driver'"),
        ("REQBUFS", errno.EBUSY, "another program is using it"),
        ("QBUF", errno.EFAULT, r"import buffer 0 \(4 KiB of udmabuf\) into fake: .*contiguous"),
        ("QBUF", errno.EIO, "cannot reach such memory; use exporter="),
        ("QBUF", errno.ENODEV, "import buffer 0 .* the device is gone"),
        ("STREAMON", errno.ENOSPC, "bandwidth"),
        ("DQBUF", errno.ENODEV, "the device is gone"),
        ("DQBUF", errno.EIO, "the driver ended the stream"),
    ],
)
def test_what_the_driver_refuses(call, number, match, camera):
    camera.errors[call] = number
    with raises_errno(number, match, filename=NODE):
        with capture(format="GREY", fps=30) as mine:
            next(mine)
    assert not camera.queued


def test_an_error_of_poll_is_not_an_error_of_the_stream(camera, monkeypatch):
    """vb2_fop_poll reports one where io_uring has work for the task that waits for a lock."""
    polls = []

    class Interrupted:
        def register(self, fd, events):
            assert fd == camera.fd

        def poll(self, timeout):
            polls.append(timeout)
            if len(polls) == 3:
                camera.expose()
            return [(camera.fd, select.POLLERR)]

    with capture(timeout=None) as mine:
        with monkeypatch.context() as patch:
            patch.setattr(select, "poll", Interrupted)
            assert next(mine).sequence == 0
    assert len(polls) == 3


@pytest.mark.parametrize(
    ("caps", "number", "match"),
    [
        (0x2, errno.ENODEV, "this node of 'a fake' has no frames"),  # an output
        (0x8000, errno.ENODEV, "has no frames"),  # a codec
        (0x1, errno.EOPNOTSUPP, "not streaming I/O"),
    ],
)
def test_nodes_that_are_not_cameras(caps, number, match, camera):
    camera.caps = caps
    with raises_errno(number, match):
        capture()


def test_paths_that_are_not_video_devices(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path, "/dev/null"):
        with raises_errno(errno.ENODEV, "not a video device", filename=str(path)):
            v4l2.capture(path)
    with pytest.raises(FileNotFoundError, match=r"use /dev/video0 or similar \(v4l2-ctl"):
        v4l2.capture(tmp_path / "nothing")


@pytest.mark.parametrize(
    "module", ["cuda", "drm", "hip", "level_zero", "staging", "v4l2", "vaapi", "vfio", "vulkan"]
)
def test_a_module_loads_no_library_of_its_world(module):
    source = (
        f"import sys; from dmabuf.devices import {module}; loaded = sys.modules;"
        "print([name for name in loaded if name in ('linuxpy', 'anyio', 'cuda', 'vulkan')],"
        "sorted(name for name in loaded if name.startswith('dmabuf.devices.')))"
    )
    ours = {"staging": [], "vulkan": [], "vfio": ["node"]}
    ours |= {name: ["gpu", "staging"] for name in ("cuda", "hip", "level_zero")}
    ours["v4l2"] = ["codec", "frames", "node", "video"]
    ours["vaapi"] = ["drm", "frames", "node"]
    names = sorted({"lifetime", module, *ours.get(module, ["frames", "node"])})
    assert in_child(source) == f"[] {[f'dmabuf.devices.{name}' for name in names]}\n"
