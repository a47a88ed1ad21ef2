"""`dmabuf record`: write frames of a camera to disk, and beside them a file that locates each."""

from __future__ import annotations

import errno
import os
import stat
import time
from argparse import ArgumentTypeError, Namespace
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from dmabuf.cli import output
from dmabuf.cli.ends import End, advance, find_target, naming
from dmabuf.cli.parser import Command, Misuse, Parser, number
from dmabuf.copying import Replacement
from dmabuf.devices import v4l2
from dmabuf.devices.packing import Packer
from dmabuf.sizes import round_up
from dmabuf.transfer import ALLOWED, File, Route, growth

_PAGE = os.sysconf("SC_PAGESIZE")
_VIDEOS = (
    *(".mp4", ".m4v", ".mkv", ".webm", ".avi", ".mov", ".ts", ".mts", ".mpg", ".mpeg", ".ogv"),
    *(".ogg", ".flv", ".wmv", ".asf", ".3gp", ".mxf", ".nut", ".gif", ".apng"),
)
_PICTURES = (".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".ppm", ".pgm", ".dng", ".exr")


def _pixels(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise ArgumentTypeError(f"invalid size '{text}': width and height in pixels, as 640x480")
    return int(width), int(height)


def _arguments(parser: Parser) -> None:
    unset = "[default: the camera's setting]"
    parser.add_argument("device", metavar="DEVICE", help="The camera, as /dev/video0.")
    parser.add_argument("out", metavar="OUT", help="The file; - is standard output.")
    text = "The number of frames. [default: until Ctrl-C]"
    parser.option("-n --frames", "N", text, number(1, 10**9))
    parser.option("--format", "FOURCC", f"As YUYV or NV12. {unset}")
    parser.option("--size", "WxH", f"Pixels. {unset}", _pixels)
    parser.option("--fps", "N", f"Frames a second. {unset}", float)
    parser.flag("--packed", "Leave no gaps between frames, planes and rows of a raw file.")
    text = "Frames to hold while the disk is busy. [default: 8]"
    parser.option("--buffers", "N", text, number(1, 10**6), 8)
    text = "What makes the buffers: udmabuf, a heap, driver. [default: udmabuf]"
    parser.option("--exporter", "NAME", text, default="udmabuf")
    parser.flag("--huge-pages", "Make the buffers of huge pages.")
    parser.option("--timeout", "N", "Seconds to wait for each frame. [default: 5]", float, 5.0)
    parser.option(
        "--require", "", "Which routes are acceptable.", default="any", choices=[*ALLOWED]
    )
    parser.shared("sync", "force", "json", "progress", "quiet")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaneInFile:
    """One plane of a frame in the file."""

    offset: int
    """Its first byte in the file."""
    nbytes: int
    stride: int
    """Bytes from one row to the next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameInFile:
    """One frame in the file."""

    sequence: int
    """The driver's number of the frame, modulo 2**32."""
    timestamp_ns: int
    """When it was taken, by the `clock` of the recording."""
    time_ns: int | None
    """The same in nanoseconds since 1970; null unless `clock` is "monotonic"."""
    lost_before: int
    """The number of frames lost just before this one."""
    error: bool
    """Whether the driver reports that some bytes may be wrong."""
    planes: list[PlaneInFile]
    """None for .png."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferFormat:
    """What the driver writes into one buffer."""

    size: int
    bytes_per_line: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Described:
    device: str
    card: str
    """The name that the device reports."""
    driver: str
    container: str
    """"raw" (frames at multiples of the page size), "packed" (no gaps), "y4m" or "png"."""
    fourcc: str
    """The camera's pixel format, by V4L2's name."""
    pix_fmt: str | None
    """The same by FFmpeg's name."""
    color: v4l2.Color
    width: int
    height: int
    planes: list[BufferFormat]
    """One, or one for each buffer of a multi-planar format."""
    fps: str | None
    """Frames a second, as "30" or "30000/1001"; null where the driver has no rate."""
    clock: str
    """"monotonic", "copied" or "unknown"."""
    size: int
    """The bytes of the file."""
    frame_step: int | None
    """Bytes from one frame to the next; null where they differ, or for one frame."""
    lost: int
    frames: list[FrameInFile]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording(_Described):
    """What is in the file beside it, OUT.json."""

    format: Literal["dmabuf-recording/1"] = "dmabuf-recording/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded(_Described):
    """The result of `dmabuf record`."""

    target: str
    nbytes: int
    """The bytes of the frames."""
    seconds: float
    routes: dict[str, int]
    """How many bytes took each route."""
    reason: str
    copied: int
    """The bytes that the CPU copied."""
    synced: bool
    """Whether the bytes are on the medium."""
    format: Literal["dmabuf-record/1"] = "dmabuf-record/1"


@dataclass
class _Written:
    """What has been written completely."""

    frames: list[FrameInFile] = field(default_factory=list)
    end: int = 0
    """Where the last plane ends in the file."""
    nbytes: int = 0
    lost: int = 0
    copied: int = 0
    routes: Counter[str] = field(default_factory=Counter)
    reason: str = ""
    seconds: float = 0.0
    clock: str = "unknown"


def _run(args: Namespace) -> None:
    source = End(args.device, args.device)
    target = find_target(args.out, args.device)
    if target.status and stat.S_ISBLK(target.status.st_mode):
        raise OSError(errno.EINVAL, "is a block device: name a file on it", target.name)
    container = _container(args, target)
    packer = Packer(container)
    if args.format is not None:
        packer.check(args.format)  # before the camera's settings change
    width, height = args.size or (None, None)
    with (
        output.Progress(args.progress) as progress,
        v4l2.capture(
            args.device,
            buffers=args.buffers,
            exporter=args.exporter,
            huge_pages=args.huge_pages,
            format=args.format,
            width=width,
            height=height,
            fps=args.fps,
            timeout=args.timeout,
        ) as camera,
        packer,
    ):
        packer.check(camera.format.fourcc)
        if container == "png":
            args.frames = args.frames or 1
        if target.replaced:
            recording = _replace(args, camera, packer, source, target, progress)
        else:
            with naming(source, target, None), File(target.what, "w") as file:
                recording = _record(args, camera, packer, file, target.offset, progress)
            advance(source, target, recording.end - target.offset)
        about = _about(camera, container, recording)
    _report(args, target, about, recording)


def _container(args: Namespace, target: End) -> str:
    """Return what to write. The file's ending decides, and --packed where that means nothing."""
    ending = os.path.splitext(target.name)[1].lower()
    if ending in (".y4m", ".png"):
        if args.packed:
            raise Misuse(f"--packed: {ending} has its own layout; leave the option out")
        return ending[1:]
    if ending in _VIDEOS:
        text = f"{target.name}: cannot write {ending[1:]}; name it .y4m, or pipe to ffmpeg (--help)"
        raise Misuse(text)
    if ending in _PICTURES:
        raise Misuse(f"{target.name}: cannot write {ending[1:]}; name it .png")
    return "packed" if args.packed or not target.replaced else "raw"


def _replace(
    args: Namespace,
    camera: v4l2.Camera,
    packer: Packer,
    source: End,
    target: End,
    progress: output.Progress,
) -> _Written:
    """Record to a regular file, and write the file beside it; both appear whole or not at all."""
    assert isinstance(target.what, str)
    with (
        Replacement(target.what, force=args.force, note=output.note) as place,
        Replacement(target.what + ".json", force=args.force, note=output.note) as beside,
        naming(source, target, None if place.in_place else place.temporary),
    ):
        with File(place.temporary, "w") as file:
            planes = camera.format.planes
            known = packer.container != "png" and all(plane.bytes_per_line for plane in planes)
            if args.frames is not None and known:
                # So that a full disk is known before the first frame.
                total = args.frames * sum(round_up(plane.size, _PAGE) for plane in planes)
                growth.allocate(file.fileno(), place.temporary, [(0, total)])
            recording = _record(args, camera, packer, file, 0, progress)
            os.ftruncate(file.fileno(), recording.end)
            if args.sync:
                os.fdatasync(file.fileno())
        try:
            with open(beside.temporary, "w", encoding="ascii") as text:
                about = _about(camera, packer.container, recording)
                text.write(output.to_json(about, indent=1) + "\n")
                text.flush()
                if args.sync:
                    os.fdatasync(text.fileno())
        except OSError as error:
            error.filename = f"{target.name}.json"
            raise
        # It must never describe another recording.
        if beside.in_place is None and os.path.lexists(beside.path):
            os.unlink(beside.path)
        place.commit(None, sync=False)
        beside.commit(None, sync=args.sync)
    return recording


def _record(
    args: Namespace,
    camera: v4l2.Camera,
    packer: Packer,
    file: File,
    start: int,
    progress: output.Progress,
) -> _Written:
    """Write frames until there are enough; without a number, until Ctrl-C."""
    recording = _Written(end=start)
    begun = time.perf_counter()
    total = None
    if args.frames is not None:
        total = args.frames * sum(plane.size for plane in camera.format.planes)
    try:
        for number, frame in enumerate(camera, 1):
            with frame:
                if packer.container != "png" or number == args.frames:
                    _write(args, frame, packer, file, recording)
            progress.show("recording", recording.nbytes, total)
            if number == args.frames:
                break
    except OSError as error:
        if hasattr(error, "nbytes"):  # counts one piece: now all frames
            error.nbytes += recording.nbytes
        raise
    except KeyboardInterrupt:
        if args.frames is not None or not recording.frames:
            raise
    recording.seconds = time.perf_counter() - begun
    return recording


def _write(
    args: Namespace, frame: v4l2.Frame, packer: Packer, file: File, recording: _Written
) -> None:
    """Write one frame; a frame that is not written completely is not in the recording."""
    alignment = _PAGE if packer.container == "raw" else 1
    pieces, copied = packer.pieces(frame, not recording.frames)
    planes, end, nbytes = [], recording.end, 0
    reason, route = "", None
    if copied:
        reason = "; the CPU packed the planes"
        if args.require == "any":  # else each end of a frame within a block would wait for the disk
            route = Route.BUFFERED
    for piece in pieces:
        at = round_up(end, alignment)
        done = file.write_from(
            piece.buffer,
            min(round_up(piece.nbytes, alignment), piece.buffer.size - piece.offset),
            file_offset=None if file.size is None else at,
            buffer_offset=piece.offset,
            require=args.require,
            route=route,
        )
        end = at + piece.nbytes
        nbytes += piece.nbytes
        copied += done.copied
        recording.routes[done.route.value] += piece.nbytes
        recording.reason = done.reason + reason
        planes += [
            PlaneInFile(offset=at + offset, nbytes=size, stride=stride)
            for offset, size, stride in piece.planes
        ]
    recording.frames.append(
        FrameInFile(
            sequence=frame.sequence,
            timestamp_ns=frame.timestamp_ns,
            time_ns=frame.time_ns,
            lost_before=frame.lost,
            error=frame.error,
            planes=planes,
        )
    )
    recording.end = end
    recording.nbytes += nbytes
    recording.copied += copied
    recording.lost += frame.lost
    recording.clock = frame.clock


def _about(camera: v4l2.Camera, container: str, recording: _Written) -> Recording:
    form = camera.format
    starts = [frame.planes[0].offset for frame in recording.frames if frame.planes]
    steps = {after - before for before, after in pairwise(starts)}
    return Recording(
        device=camera.path,
        card=camera.card,
        driver=camera.driver,
        container=container,
        fourcc=form.fourcc,
        pix_fmt=form.pix_fmt,
        color=form.color,
        width=form.width,
        height=form.height,
        planes=[BufferFormat(**plane._asdict()) for plane in form.planes],
        fps=None if form.fps is None else str(form.fps),
        clock=recording.clock,
        size=recording.end,
        frame_step=steps.pop() if len(steps) == 1 else None,
        lost=recording.lost,
        frames=recording.frames,
    )


def _report(args: Namespace, target: End, about: Recording, recording: _Written) -> None:
    if args.json:
        fields = output.fields_of(about)
        fields.pop("format")
        record = Recorded(
            **fields,
            target=target.name,
            nbytes=recording.nbytes,
            seconds=recording.seconds,
            routes=dict(recording.routes),
            reason=recording.reason,
            copied=recording.copied,
            synced=args.sync,
        )
        output.say_json(record, stream=target.report_stream)
    elif not args.quiet:
        lost = f"{recording.lost} lost" if recording.lost else "none lost"
        frames = f"{len(recording.frames)} frame" + "s" * (len(recording.frames) != 1)
        output.say(
            f"{frames}, {output.decimal(recording.nbytes)} in "
            f"{recording.seconds:.2f} s, {lost}: {about.width}x{about.height} "
            f"{about.fourcc}, written {' and '.join(recording.routes)} ({recording.reason}), "
            f"{output.decimal(recording.copied)} copied by the CPU",
            stream=target.report_stream,
        )


RECORD = Command(
    """\
Record frames of the camera DEVICE to the file OUT; - is standard output.

The camera writes into buffers, and the disk reads from the same memory: if OUT takes O_DIRECT, no
CPU copies a frame. Each frame begins at a multiple of the page size (4096 bytes). OUT.json has the
offset and stride of its planes, its number and its time. Both files appear whole, or not at all.
Without --frames, recording goes on until Ctrl-C, which is then its regular end.

Players expect frames without gaps: --packed leaves none. OUT.y4m is video for players and encoders,
of YUV and grey formats. OUT.png is a picture of one frame, the Nth with --frames N. The CPU packs
these two, and rows that have padding. For other containers use a pipe to ffmpeg; a pipe gets packed
frames, and no other file is made.""",
    _arguments,
    _run,
    """\
  dmabuf record /dev/video0 out.raw --frames 300 --require zero-copy
  dmabuf record /dev/video0 out.raw --format NV12 --size 1920x1080 --fps 60
  dmabuf record /dev/video0 out.y4m --format YUYV --size 640x480
  dmabuf record /dev/video0 - --format YUYV --size 640x480 |
      ffmpeg -f rawvideo -pix_fmt yuyv422 -s 640x480 -i - out.mkv""",
)
