"""Cameras, on a fake driver: the life of a frame, back-pressure, refusals, and nothing left."""

import errno
import gc
import os
import select
import sys
import threading

import pytest

import dmabuf
from dmabuf import _uapi
from dmabuf.devices import _v4l2, v4l2
from dmabuf.errors import BusyError, ClosedError
from dmabuf.exporters import udmabuf
from tests.resources import held
from tests.support import assert_same, in_child, poison
from tests.unit.fake_camera import FORMATS, FakeCamera

FRAME = 64 * 32 * 2


@pytest.fixture(autouse=True)
def nothing_left_behind():
    before = held()
    yield
    assert held() == before


@pytest.fixture(params=[False, True], ids=["one plane", "two planes"])
def multi(request):
    return request.param


@pytest.fixture
def camera(monkeypatch):
    return make(monkeypatch)


def make(monkeypatch, multi=False):
    fake = FakeCamera("/dev/video7", multi)
    monkeypatch.setattr(_uapi, "ioctl", fake.ioctl)
    monkeypatch.setattr(_v4l2, "_open", fake.open)
    monkeypatch.setattr(udmabuf, "DEVICE", os.devnull)
    return fake


def capture(**how):
    return v4l2.capture("/dev/video7", **{"timeout": 0.05} | how)


# -- frames


def test_frames(monkeypatch, multi):
    fake = make(monkeypatch, multi)
    with capture(buffers=3, timeout=5) as camera:
        assert (camera.card, camera.driver, camera.lost) == ("a fake", "fake", 0)
        assert (camera.format.width, camera.format.height, camera.format.fps) == (64, 32, 30)
        assert [plane.size for plane in camera.format.planes] == fake.sizes()
        for row in camera.buffers:
            for buffer in row:
                buffer.pwrite(poison(buffer.size), 0)
        assert not fake.streaming, "it starts with the first frame that is asked for"
        with pytest.raises(TimeoutError):
            expecting(camera, 0.01)
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


def expecting(camera, timeout):
    before, camera._timeout = camera._timeout, timeout
    try:
        return next(camera)
    finally:
        camera._timeout = before


def test_a_held_frame_is_not_written_over_and_the_lost_are_counted(camera):
    with capture(buffers=2) as mine:
        with pytest.raises(TimeoutError, match="signal"):
            next(mine)
        camera.expose()
        camera.expose()
        one, other = next(mine), next(mine)
        for _ in range(3):
            camera.expose()
        assert_same(one.buffer.pread(FRAME, 0), bytes(FRAME), "the first")
        assert_same(other.buffer.pread(FRAME, 0), b"\1" * FRAME, "the second")
        with pytest.raises(TimeoutError, match="all 2 are held"):
            next(mine)
        one.release()
        camera.expose()
        third = next(mine)
        assert (third.sequence, third.lost, mine.lost) == (5, 3, 3)
        assert third.buffer is one.buffer
        third.release()
        other.release()
        camera.sequence = 0  # a driver that begins anew has lost none
        camera.expose()
        assert next(mine).lost == 0


def test_a_wrapped_sequence(camera):
    with capture(buffers=2) as mine:
        with pytest.raises(TimeoutError):
            next(mine)
        camera.sequence = (1 << 32) - 1
        camera.expose()
        camera.sequence = 1
        camera.expose()
        assert [next(mine).lost for _ in range(2)] == [0, 1]


def test_a_dropped_frame_goes_back_by_itself(camera):
    with capture(buffers=2) as mine:
        with pytest.raises(TimeoutError):
            next(mine)
        for number in range(6):
            camera.expose()
            assert next(mine).sequence == number
        assert mine.lost == 0


def test_a_frame_in_use_is_not_given_back(camera):
    with capture(buffers=2) as mine:
        with pytest.raises(TimeoutError):
            next(mine)
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
            assert len(camera.queued) == 1, "its memory is looked at still"
            assert view[0] == 0
        with pytest.raises(TimeoutError):
            next(mine)
        assert len(camera.queued) == 2


def test_a_queued_buffer_cannot_be_closed(camera):
    with capture() as mine:
        with pytest.raises(BusyError):
            mine.buffers[0][0].close()


def test_a_device_that_still_uses_the_buffer(camera, monkeypatch):
    """Its fence has to signal before the camera writes there."""
    with capture(buffers=2) as mine:
        with pytest.raises(TimeoutError):
            next(mine)
        camera.expose()
        frame = next(mine)
        pending = [True]

        def wait(fds, direction, timeout=None, **_):
            assert (list(fds), direction) == ([frame.buffer.fileno()], "write")
            if pending:
                raise TimeoutError(errno.ETIMEDOUT, "a device still uses this buffer")

        monkeypatch.setattr(v4l2.fence, "wait", wait)
        with pytest.raises(TimeoutError, match="still uses"):
            frame.release()
        assert len(camera.queued) == 1
        pending.clear()
        frame.release()
        assert len(camera.queued) == 2


def test_a_frame_with_an_error(camera):
    with capture(buffers=2) as mine:
        with pytest.raises(TimeoutError):
            next(mine)
        camera.expose(b"half", flags=0x40)
        frame = next(mine)
        assert frame.error and frame.nbytes == 4
        assert "Frame 0 of /dev/video7, 4 bytes" in repr(frame)


def test_our_own_buffers(monkeypatch, multi):
    fake = make(monkeypatch, multi)
    rows = [[dmabuf.allocate(size, exporter="udmabuf") for size in fake.sizes()] for _ in range(2)]
    with capture(buffers=rows if multi else [row[0] for row in rows]) as mine:
        assert [list(row) for row in mine.buffers] == rows
        with pytest.raises(TimeoutError):
            next(mine)
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
        with capture(buffers=2, timeout=5) as mine:
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
            mine._timeout = 0.02
            for _ in range(len(camera.done)):
                (await mine.__anext__()).release()
            with pytest.raises(TimeoutError):
                await mine.__anext__()
            mine._timeout = None
            with anyio.move_on_after(0.02) as scope:
                await mine.__anext__()
            assert scope.cancelled_caught
        with pytest.raises(ClosedError):
            await mine.__anext__()

    run(main)


def test_closing_ends_an_iteration_in_another_thread(camera):
    mine = capture(timeout=None)
    ended = []

    def look():
        try:
            next(mine)
        except ClosedError as error:
            ended.append(error)

    thread = threading.Thread(target=look)
    thread.start()
    while not camera.streaming:
        pass
    mine.close()
    thread.join(10)
    assert not thread.is_alive() and len(ended) == 1


def test_closing_with_a_view_of_a_frame(camera):
    mine = capture(buffers=2)
    with pytest.raises(TimeoutError):
        next(mine)
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
    with pytest.warns(ResourceWarning, match="unclosed <dmabuf.Camera"):
        del mine
        gc.collect()


def test_a_fork_leaves_the_stream_to_the_parent(camera):
    with capture(buffers=2) as mine:
        with pytest.raises(TimeoutError):
            next(mine)
        camera.expose()
        frame = next(mine)
        before = list(camera.asked)
        child = os.fork()
        if not child:
            status = 1
            try:
                frame.release()
                try:
                    next(mine)
                except ClosedError:
                    mine.close()
                    status = 0 if camera.asked == before else 2
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
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
        ({"format": "ABCD"}, "has no format 'ABCD': it has " + ", ".join(FORMATS)),
        ({"format": "much too long"}, "has no format"),
        ({"format": "Grüß"}, "has no format"),
        ({"width": 120}, "cannot deliver 120x32 YUYV, the nearest is 128x64 YUYV"),
        ({"width": (1 << 32) + 64}, "cannot deliver 4294967360x32 YUYV, the nearest is 64x32"),
        ({"height": (1 << 32) + 32}, "cannot deliver 64x4294967328 YUYV, the nearest is 64x32"),
        ({"fps": 1000}, "cannot deliver 1000 frames a second here, but 30"),
        ({"fps": (1 << 32) + 30}, r"cannot deliver 4.29497e\+09 frames a second here, but 30"),
    ],
)
def test_what_the_device_lacks(how, match, camera):
    before = camera.form, camera.fps
    with pytest.raises(OSError, match=match) as caught:
        capture(**how)
    assert (caught.value.errno, caught.value.filename) == (errno.EINVAL, "/dev/video7")
    assert (camera.form, camera.fps) == before, "and nothing was changed"
    assert "QBUF" not in camera.asked


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
def test_arguments_that_make_no_sense(how, error, camera):
    with pytest.raises(error):
        capture(**how)
    assert camera.count == 0 and "S_FMT" not in camera.asked


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("small", "buffer 1 holds 4096 bytes, and a plane of 128x64 YUYV at 30 fps takes 16384"),
        ("memfd", "buffer 1 is a memfd"),
        ("slabs", "buffer 1 is 2 dma-bufs"),
        ("twice", "buffer 1 was given twice"),
        ("one too few", "needs 2 buffers and not 1"),
        ("two planes", "frame 0 was given 2"),
    ],
)
def test_buffers_that_will_not_do(kind, match, camera):
    camera.form = ("YUYV", 128, 64)
    camera.limit = 16384
    good = dmabuf.allocate(16384, exporter="udmabuf")
    bad = {
        "small": lambda: dmabuf.allocate(4096, exporter="udmabuf"),
        "memfd": lambda: dmabuf.allocate(16384, exporter="memfd"),
        "slabs": lambda: dmabuf.allocate(32768, exporter="udmabuf"),
    }.get(kind, lambda: dmabuf.allocate(16384, exporter="udmabuf"))()
    given = {"twice": [good, good], "one too few": [good], "two planes": [(good, bad)] * 2}
    with good, bad:
        with pytest.raises(OSError, match=match) as caught:
            capture(buffers=given.get(kind, [good, bad]))
        assert caught.value.errno == errno.EINVAL
        assert (good._users, bad._users) == (0, 0)


def test_an_import_that_the_driver_refuses(camera):
    camera.fail_queue_of = 2
    with pytest.raises(OSError, match=r"refuses to import buffer 2 \(4 KiB from udmabuf\)") as e:
        capture()
    assert e.value.errno == errno.EFAULT
    assert camera.count == 0 and not camera.queued


@pytest.mark.parametrize(
    ("call", "number", "match"),
    [
        ("QUERYCAP", errno.ENOTTY, "it is none"),
        ("G_FMT", errno.EINVAL, "asking for its format"),
        ("S_FMT", errno.EBUSY, "setting the format: another program is using it"),
        ("S_PARM", errno.ENOTTY, "leave fps out"),
        ("REQBUFS", errno.EINVAL, "takes no dma-bufs: use exporter='driver'"),
        ("REQBUFS", errno.EBUSY, "another program is using it"),
        (
            "QBUF",
            errno.EIO,
            "refuses to import buffer 0 .* cannot reach such memory: use exporter=",
        ),
        ("QBUF", errno.ENODEV, "refuses to import buffer 0 .* the device is gone"),
        ("STREAMON", errno.ENOSPC, "bandwidth"),
        ("DQBUF", errno.ENODEV, "the device is gone"),
        ("DQBUF", errno.EIO, "the driver gave the stream up"),
    ],
)
def test_what_the_driver_refuses(call, number, match, camera):
    camera.errors[call] = number
    with pytest.raises(OSError, match=match) as caught:
        with capture(format="GREY", fps=30) as mine:
            next(mine)
    assert (caught.value.errno, caught.value.filename) == (number, "/dev/video7")
    assert not camera.queued


def test_an_error_of_poll_is_not_the_stream_s(camera, monkeypatch):
    """vb2_fop_poll gives one where io_uring has work for the task while it waits for a lock."""
    polls = []

    class Interrupted:
        def register(self, fd, events):
            assert fd == camera.fd

        def poll(self, timeout):
            polls.append(timeout)
            if len(polls) == 3:
                camera.expose()
            return [(camera.fd, select.POLLERR)]

    with capture(timeout=5) as mine:
        with monkeypatch.context() as patch:
            patch.setattr(_v4l2.select, "poll", Interrupted)
            assert next(mine).sequence == 0
    assert len(polls) == 3


@pytest.mark.parametrize(
    ("caps", "number", "match"),
    [
        (0x2, errno.ENODEV, "an output node of 'a fake'"),
        (0x800000, errno.ENODEV, "a metadata node"),
        (0x8000, errno.ENODEV, "a codec's"),
        (0x10, errno.ENODEV, "no camera's node"),
        (0x1, errno.EOPNOTSUPP, "has no streaming I/O"),
    ],
)
def test_nodes_that_are_no_cameras(caps, number, match, camera):
    camera.caps = caps
    with pytest.raises(OSError, match=match) as caught:
        capture()
    assert caught.value.errno == number


def test_paths_that_are_no_video_devices(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path, "/dev/null"):
        with pytest.raises(OSError, match="is no video device") as caught:
            v4l2.capture(path)
        assert (caught.value.errno, caught.value.filename) == (errno.ENODEV, str(path))
    with pytest.raises(FileNotFoundError, match=r"cameras are /dev/video0 and so on \(v4l2-ctl"):
        v4l2.capture(tmp_path / "nothing")


def test_without_linuxpy(monkeypatch):
    monkeypatch.setitem(sys.modules, "linuxpy.video", None)
    monkeypatch.setitem(sys.modules, "linuxpy", None)
    with pytest.raises(ImportError, match=r"needs linuxpy .*: pip install dmabuf\[v4l2\]"):
        v4l2.capture("/dev/video7")


def test_the_import_is_light():
    source = (
        "import sys; from dmabuf.devices import v4l2; import dmabuf.cli;"
        "print(any(name.startswith(('linuxpy', 'anyio')) for name in sys.modules))"
    )
    assert in_child(source) == "False\n"
