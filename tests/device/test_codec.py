"""Codecs by the kernel's vicodec and vim2m: each byte equals that of the driver's own MMAP run."""

import contextlib
import errno
import itertools
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import dmabuf
from dmabuf.devices import v4l2
from dmabuf.errors import BusyError, ClosedError
from dmabuf.memory import exporters
from tests import forking, support
from tests.device import m2m
from tests.device.vivid import MOVE_RIGHT, SINGLE, picture
from tests.guards import needs
from tests.support import assert_same, mounted, poison

ENCODER, DECODER = m2m.node("stateful-encoder"), m2m.node("stateful-decoder")
STATELESS, CONVERTER = m2m.node("stateless-decoder"), m2m.node("vim2m")

WIDTH, HEIGHT = 640, 480
NV12 = WIDTH * HEIGHT * 3 // 2
SMALL, LARGE = (WIDTH, HEIGHT), (800, 608)

codecs = needs("codecs", "udmabuf")


def encoder(size: tuple[int, int] = SMALL, **how) -> v4l2.Codec:
    return v4l2.codec(ENCODER, input="NV12", width=size[0], height=size[1], timeout=60, **how)


def decoder(**how) -> v4l2.Codec:
    return v4l2.codec(DECODER, **{"output": "NV12", "timeout": 60} | how)


def poison_outputs(codec: v4l2.Codec) -> None:
    for row in codec.buffers:
        for buffer in row:
            buffer.pwrite(poison(buffer.size), 0)


def filled(codec: v4l2.Codec, parts: list[bytes]) -> Iterator[v4l2.Input]:
    """Inputs with these bytes; what is beyond them is poison."""
    for number, data in enumerate(parts):
        room = codec.input()
        room.buffer.pwrite(poison(room.buffer.size), 0)
        room.buffer.pwrite(data, 0)
        room.nbytes, room.timestamp_ns = len(data), number * 1_000_000
        yield room


def taken(outputs: Iterator[v4l2.Frame]) -> list[bytes]:
    found = []
    for frame in outputs:
        with frame:
            assert not frame.error
            found.append(frame.buffer.pread(frame.nbytes, 0))
    return found


def same(found: list[bytes], expected: list[bytes]) -> None:
    assert len(found) == len(expected)
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert_same(one, other, f"output {number}")


@pytest.fixture(scope="module")
def small() -> list[bytes]:
    return m2m.pictures(*SMALL, 12, NV12)


@pytest.fixture(scope="module")
def packets(small: list[bytes]) -> list[bytes]:
    """The small pictures as the driver encodes them: the first is a key frame."""
    return m2m.process(ENCODER, small, ("NV12", *SMALL), "FWHT")


@pytest.fixture(scope="module")
def decoded(packets: list[bytes]) -> list[bytes]:
    """The packets as the driver decodes them."""
    return m2m.decode(DECODER, packets, "NV12")


EXPORTERS = {
    "udmabuf": {"exporter": "udmabuf"},
    "huge pages": {"huge_pages": "2MiB"},
    "dma-heap": {"exporter": "system"},
}


def how_of(which: str) -> dict[str, str]:
    """The memory; of kernels that refuse huge pages, small ones."""
    if which == "huge pages" and not exporters.maps_large_pages():
        return {}
    return EXPORTERS[which]


@codecs
@needs("dma_heap", "hugepages")
@pytest.mark.parametrize("which", EXPORTERS)
@pytest.mark.device_table("V4L2 codec", "import")
def test_an_encoder(which: str, small: list[bytes], packets: list[bytes]) -> None:
    with encoder(outputs=2, **how_of(which)) as codec:
        assert (codec.kind, codec.input_format.fourcc, codec.format.fourcc) == (
            "encoder", "NV12", "FWHT",
        )  # fmt: skip
        poison_outputs(codec)
        times, found = [], []
        for frame in codec.run(filled(codec, small)):
            with frame:
                times.append(frame.timestamp_ns)
                assert (frame.clock, frame.error) == ("copied", False)
                found.append(frame.buffer.pread(frame.nbytes, 0))
        assert times == [number * 1_000_000 for number in range(len(small))]
    same(found, packets)


@codecs
@needs("dma_heap", "hugepages")
@pytest.mark.parametrize("which", EXPORTERS)
@pytest.mark.parametrize("step", [None, 100_001])
@pytest.mark.device_table("V4L2 codec", "import", "read")
def test_a_decoder(
    which: str, step: int | None, packets: list[bytes], decoded: list[bytes], tmp_path: Path
) -> None:
    """From a file into the driver: a packet at a time, or pieces that begin anywhere."""
    stream = b"".join(packets)
    path = tmp_path / "stream.fwht"
    path.write_bytes(stream)
    ends = [*itertools.accumulate(map(len, packets))]
    if step is not None:
        ends = [*range(step, len(stream), step), len(stream)]

    def pieces() -> Iterator[v4l2.Input]:
        with dmabuf.open(path) as file:
            for start, end in itertools.pairwise([0, *ends]):
                room = codec.input()
                file.read_into(room.buffer, end - start, file_offset=start)
                room.nbytes = end - start
                yield room

    with decoder(**how_of(which)) as codec:
        assert (codec.kind, codec.format) == ("decoder", None)
        found = taken(codec.run(pieces()))
        assert (codec.format.fourcc, codec.format.width, codec.format.height) == ("NV12", *SMALL)
        assert codec.visible == (0, 0, *SMALL)
        assert codec.damaged == 0
    same(found, decoded)


@codecs
def test_outputs_are_written_whole(packets: list[bytes], decoded: list[bytes]) -> None:
    """Into poisoned memory, each output twice."""
    with decoder(outputs=1) as codec:
        first = codec.run(filled(codec, packets[:1]))
        next(first).release()
        for _ in first:
            pass
        poison_outputs(codec)
        same(taken(codec.run(filled(codec, packets))), decoded)


def padded(data: bytes) -> list[bytes]:
    """The packets of a file as the example writes it, each with the zeroes after it.

    At the end of a stream vicodec looks for no other frame behind zeroes, so each is a piece.
    """
    found, at = [], 0
    while at < len(data):
        size = 44 + int.from_bytes(data[at + 40 : at + 44], "big")  # struct fwht_cframe_hdr
        step = -(-size // 4096) * 4096
        assert data[at : at + 4] == b"OOOO" and not any(data[at + size : at + step])
        found.append(data[at : at + step])
        at += step
    return found


@codecs
@needs("cameras", "nvme")
@pytest.mark.device_table("V4L2 codec", "import", "write", "zero-copy")
def test_camera_to_codec_to_file(tmp_path: Path) -> None:
    """The memory that the camera wrote is what the encoder reads, and its output goes to a drive.

    The camera's own frames are kept to compare, by copies.
    """
    frames: list[bytes] = []
    how = {"format": "YUYV", "width": WIDTH, "height": HEIGHT}

    def pictures() -> Iterator[v4l2.Frame]:
        for frame in itertools.islice(camera, 10):
            frames.append(frame.buffer.pread(frame.nbytes, 0))
            times.append(frame.timestamp_ns)
            yield frame

    found, times, back = [], [], []
    with (
        picture(SINGLE, MOVE_RIGHT),
        mounted(os.environ["DMABUF_TEST_NVME1"], "ext4", tmp_path / "mnt") as folder,
        v4l2.capture(SINGLE, **how) as camera,
        v4l2.codec(ENCODER, input=camera.format, timeout=60) as codec,
        dmabuf.open(folder / "out.fwht", "w") as file,
    ):
        at = 0
        for packet in codec.run(pictures()):
            with packet:
                back.append(packet.timestamp_ns)
                step = -(-packet.nbytes // 4096) * 4096
                packet.buffer.pwrite(bytes(step - packet.nbytes), packet.nbytes)
                t = file.write_from(
                    packet.buffer, step, file_offset=at, require="zero-copy", sync=True
                )
                assert t.copied == 0
                found.append((at, packet.nbytes))
                at += step
        data = (folder / "out.fwht").read_bytes()
        colors = camera.format.color, codec.input_format.color
    assert colors[0] == colors[1]
    assert back == times
    expected = m2m.process(ENCODER, frames, ("YUYV", WIDTH, HEIGHT), "FWHT")
    same([strip(data[start:][:size]) for start, size in found], list(map(strip, expected)))
    apart = [data[start:][:size] for start, size in found]
    with decoder(output=None) as codec:  # which skips the zeroes after each packet
        same(taken(codec.run(filled(codec, padded(data)))), m2m.decode(DECODER, apart))


def strip(packet: bytes) -> bytes:
    """A packet without its colours, which the camera's format has and the reference's has not."""
    return packet[:24] + packet[40:]


@codecs
@needs("cameras")
def test_the_example(tmp_path: Path) -> None:
    out = tmp_path / "out.fwht"
    told = support.run("python3", "examples/encode_camera.py", SINGLE, ENCODER, out)
    assert told.endswith("0 bytes copied by the CPU")
    with decoder(output=None) as codec:
        assert len(taken(codec.run(filled(codec, padded(out.read_bytes()))))) == 30


# -- the end of a stream, another size, another stream


@codecs
def test_a_stream_that_changes_its_size(packets: list[bytes], decoded: list[bytes]) -> None:
    """A frame of the old size stays as it was, and its memory goes when it is released."""
    large = m2m.pictures(*LARGE, 4, LARGE[0] * LARGE[1] * 3 // 2)
    others = m2m.process(ENCODER, large, ("NV12", *LARGE), "FWHT")
    expected = decoded + m2m.decode(DECODER, others, "NV12") + decoded
    found, sizes, kept = [], [], None
    with decoder(width=LARGE[0], height=LARGE[1]) as codec:
        for frame in codec.run(filled(codec, packets + others + packets)):
            found.append(frame.buffer.pread(frame.nbytes, 0))
            sizes.append((frame.width, frame.height))
            if kept is None:
                kept = frame
            else:
                frame.release()
        assert_same(kept.buffer.pread(kept.nbytes, 0), expected[0], "the frame that is held")
        buffer = kept.buffer
        kept.release()
        assert buffer.closed
    same(found, expected)
    assert sizes == [SMALL] * 12 + [LARGE] * 4 + [SMALL] * 12


@codecs
def test_one_stream_after_another(small: list[bytes], packets: list[bytes]) -> None:
    """After the end, after a flush, and after a drain of nothing."""
    with encoder() as codec:
        codec.drain()
        assert list(codec) == []
        for _ in range(2):
            same(taken(codec.run(filled(codec, small))), packets)
            assert list(codec) == []
        for room in filled(codec, small[:3]):
            codec.send(room)
        held = next(codec)
        codec.flush()
        assert_same(held.buffer.pread(held.nbytes, 0), packets[0], "the frame that is held")
        same(taken(codec.run(filled(codec, small))), packets)
        assert not held.released


@codecs
def test_a_flushed_decoder(packets: list[bytes], decoded: list[bytes]) -> None:
    with decoder() as codec:
        for room in filled(codec, packets[:3]):
            codec.send(room)
        next(codec).release()
        codec.flush()
        same(taken(codec.run(filled(codec, packets))), decoded)


@codecs
def test_while_it_drains_nothing_is_sent(small: list[bytes]) -> None:
    with encoder() as codec:
        rooms = [codec.input(), codec.input()]
        codec.send(rooms[0])
        codec.drain()
        with pytest.raises(OSError, match="drains") as caught:
            codec.send(rooms[1])
        assert caught.value.errno == errno.EBUSY and not rooms[1].sent
        assert len(taken(codec)) == 1
        codec.send(rooms[1])
        codec.drain()
        assert len(taken(codec)) == 1


@codecs
def test_one_thread_sends_and_another_takes(small: list[bytes], packets: list[bytes]) -> None:
    with encoder(inputs=2, outputs=1) as codec:

        def feed() -> None:
            for room in filled(codec, small):
                codec.send(room)
            codec.drain()

        thread = threading.Thread(target=feed)
        thread.start()
        same(taken(codec), packets)
        thread.join()


# -- converters


@codecs
def test_a_converter() -> None:
    """vim2m: it cannot be told to stop, so the outputs are counted."""
    frames = m2m.pictures(*SMALL, 6, WIDTH * HEIGHT * 3)
    expected = m2m.process(CONVERTER, frames, ("RGB3", *SMALL), "YUYV")
    how = {"input": "RGB3", "output": "YUYV", "width": WIDTH, "height": HEIGHT, "timeout": 60}
    with v4l2.codec(CONVERTER, **how) as codec:
        assert codec.kind == "converter"
        poison_outputs(codec)
        for _ in range(2):
            same(taken(codec.run(filled(codec, frames))), expected)


@codecs
@needs("cameras")
def test_from_a_camera_by_a_converter_to_an_encoder() -> None:
    """Two devices after the camera; the frames of each go into the next."""
    how = {"format": "RGB3", "width": WIDTH, "height": HEIGHT}
    with (
        picture(SINGLE),
        v4l2.capture(SINGLE, **how) as camera,
        v4l2.codec(CONVERTER, input=camera.format, output="YUYV", timeout=60) as converter,
        v4l2.codec(ENCODER, input=converter.format, timeout=60) as codec,
    ):
        still = next(camera)
        data = still.buffer.pread(still.nbytes, 0)
        still.release()
        found = taken(codec.run(converter.run(itertools.islice(camera, 5))))
    yuyv = m2m.process(CONVERTER, [data] * 5, ("RGB3", *SMALL), "YUYV")
    expected = m2m.process(ENCODER, yuyv, ("YUYV", *SMALL), "FWHT")
    same(list(map(strip, found)), list(map(strip, expected)))


@codecs
@needs("root")
def test_several_planes(small: list[bytes], packets: list[bytes]) -> None:
    """The same driver with the multi-planar interface."""
    with reloaded("vicodec", "multiplanar=1"):
        again = m2m.node("stateful-encoder")
        with v4l2.codec(again, input="NV12", width=WIDTH, height=HEIGHT, timeout=60) as codec:
            same(taken(codec.run(filled(codec, small))), packets)


@contextlib.contextmanager
def reloaded(module: str, *words: str) -> Iterator[None]:
    path = f"/lab/built/{module}.ko"
    try:
        for command in (["rmmod", module], ["insmod", path, *words]):
            subprocess.run(command, check=True)
        yield
    finally:
        for command in (["rmmod", module], ["insmod", path]):
            subprocess.run(command, check=True)


# -- what is refused, and what goes wrong


@codecs
@needs("cameras")
def test_what_is_refused(small: list[bytes]) -> None:
    big = {"width": 100_000, "height": 360}
    for path, how, number, match in (
        ("/dev/null", {}, errno.ENODEV, "not a video device"),
        (SINGLE, {}, errno.ENODEV, "'vivid' is not a memory-to-memory device"),
        (STATELESS, {}, errno.EINVAL, "only stateful decoders work here"),
        (ENCODER, {"input": "MJPG"}, errno.EINVAL, "no format 'MJPG'; it has YU12, "),
        (ENCODER, {"output": "NV12"}, errno.EINVAL, "no format 'NV12'; it has FWHT"),
        (ENCODER, {"input": "NV12", **big}, errno.EINVAL, "it has no 100000x360 NV12"),
        (DECODER, {"output": "MJPG"}, errno.EINVAL, "no format 'MJPG'"),
    ):
        with pytest.raises(OSError, match=match) as caught:
            v4l2.codec(path, **how)
        assert caught.value.errno == number, path
        assert caught.value.filename == path
    for how, error in (
        ({"inputs": 0}, ValueError),
        ({"outputs": -1}, ValueError),
        ({"width": 0}, ValueError),
        ({"timeout": -1}, ValueError),
        ({"exporter": "driver"}, ValueError),
        ({"input": 7}, TypeError),
    ):
        with pytest.raises(error):
            v4l2.codec(ENCODER, **how)


@codecs
@needs("cameras")
def test_frames_that_do_not_fit(small: list[bytes], packets: list[bytes]) -> None:
    """Of a camera whose size, format or rows differ; and a released one. None is taken."""
    with encoder() as codec:
        for how, match in (
            ({"format": "YUYV", "width": 640, "height": 480}, "is YUYV, and the codec takes NV12"),
            ({"format": "NV12", "width": 320, "height": 180}, "320x180, and the codec takes 640x"),
        ):
            with v4l2.capture(SINGLE, **how) as camera:
                frame = next(camera)
                with pytest.raises(OSError, match=match) as caught:
                    codec.send(frame)
                assert caught.value.errno == errno.EINVAL
                frame.release()
                with pytest.raises(ClosedError, match="was released"):
                    codec.send(frame)
        with encoder() as other:
            with pytest.raises(ValueError, match="another codec"):
                codec.send(other.input())
        room = codec.input()
        for nbytes in (0, room.buffer.size + 1):
            room.nbytes = nbytes
            with pytest.raises(ValueError, match="are possible"):
                codec.send(room)
        room.release()
        with pytest.raises(ClosedError, match="was sent or released"):
            codec.send(room)
        same(taken(codec.run(filled(codec, small))), packets)


@codecs
@needs("cameras")
def test_a_frame_is_the_encoders_until_it_was_read() -> None:
    """The camera does not get it back before, and gets it back after."""
    with (
        v4l2.capture(SINGLE, format="NV12", width=WIDTH, height=HEIGHT, buffers=2) as camera,
        encoder(outputs=1) as codec,
    ):
        frames = list(itertools.islice(camera, len(camera.buffers)))
        outputs = len(codec.buffers)
        held = []
        for _ in range(outputs):  # after these the encoder has nothing to write into
            codec.send(frames.pop(0))
            held.append(next(codec))
            frames.append(next(camera))
        waiting = frames.pop(0)
        codec.send(waiting)
        with pytest.raises(BusyError):
            waiting.release()
        for one in held:
            one.release()
        next(codec).release()
        assert waiting.released


@codecs
def test_nobody_takes_the_outputs(small: list[bytes]) -> None:
    with v4l2.codec(
        ENCODER, input="NV12", width=WIDTH, height=HEIGHT, inputs=2, outputs=1, timeout=0.2
    ) as codec:
        held = []
        with pytest.raises(TimeoutError, match=r"send\(\) inputs, or drain"):
            next(codec)
        with pytest.raises(TimeoutError, match="all outputs are held"):
            for frame in codec.run(filled(codec, small * 3)):
                held.append(frame)
        assert len(held) == len(codec.buffers)
        for frame in held:
            frame.release()


@codecs
def test_a_stream_without_a_header() -> None:
    with decoder(timeout=0.2) as codec:
        with pytest.raises(TimeoutError, match="no header that the driver knows"):
            list(codec.run(filled(codec, [b"no header" * 1000] * 3)))
        assert codec.damaged == 3


@codecs
def test_a_damaged_stream(packets: list[bytes], decoded: list[bytes]) -> None:
    """A packet whose size is impossible: its picture is marked, and the others are whole."""
    bad = bytearray(packets[5])
    bad[8:12] = b"\xff" * 4  # the version
    found, errors = [], []
    with decoder() as codec:
        for frame in codec.run(filled(codec, [*packets[:5], bytes(bad)])):
            with frame:
                errors.append(frame.error)
                found.append(frame.buffer.pread(frame.nbytes, 0))
        assert codec.damaged == 1
    assert errors == [False] * 5 + [True]
    same(found[:5], decoded[:5])


@codecs
@needs("root")
@pytest.mark.parametrize("driver", ["vicodec", "vim2m"])
def test_a_device_that_goes_away(driver: str) -> None:
    """In the middle of a stream, with inputs queued and an output held."""
    path = ENCODER if driver == "vicodec" else CONVERTER
    control = Path(f"/sys/bus/platform/drivers/{driver}")
    (device,) = (one.name for one in control.iterdir() if one.name.startswith(f"{driver}"))
    how = {"width": WIDTH, "height": HEIGHT, "timeout": 60}
    with v4l2.codec(path, **how) as codec:
        codec.send(codec.input())
        held = next(codec)
        codec.send(codec.input())
        (control / "unbind").write_text(device)
        try:
            with pytest.raises(OSError, match="the device is gone") as caught:
                for _ in range(3):
                    next(codec)
            assert caught.value.errno == errno.ENODEV
            with pytest.raises(OSError, match="the device is gone"):
                codec.input()
        finally:
            codec.close()
            held.release()
            (control / "bind").write_text(device)
    with v4l2.codec(m2m.node("stateful-encoder" if driver == "vicodec" else "vim2m")) as codec:
        codec.send(codec.input())
        next(codec).release()


@codecs
def test_closing_with_work_in_the_driver(small: list[bytes]) -> None:
    codec = encoder()
    for room in filled(codec, small[:4]):
        codec.send(room)
    frame = next(codec)
    codec.close()
    frame.release()
    with pytest.raises(ClosedError):
        next(codec)
    with pytest.raises(ClosedError):
        codec.input()
    codec.close()


@codecs
def test_closing_ends_an_iteration_in_another_thread() -> None:
    codec = encoder(outputs=1)
    ended: list[BaseException] = []

    def iterate() -> None:
        try:
            next(codec)
        except ClosedError as error:
            ended.append(error)

    thread = threading.Thread(target=iterate)
    thread.start()
    codec.close()
    thread.join()
    assert len(ended) == 1


@codecs
def test_a_fork_leaves_the_codec_to_the_parent(small: list[bytes], packets: list[bytes]) -> None:
    with encoder() as codec:
        codec.send(next(filled(codec, small)))

        def child() -> None:
            with pytest.raises(ClosedError, match="before fork"):
                next(codec)
            codec.close()

        forking.in_child(child)
        codec.drain()
        same(taken(codec), packets[:1])
