"""`dmabuf record`: frames of a camera to disk, and beside them a file that tells where each is."""

from __future__ import annotations

import errno
import json
import os
import stat
import sys
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from dmabuf import growth
from dmabuf._replace import Replacement
from dmabuf.cli import _options, _output, _progress
from dmabuf.cli._ends import End, advance, find_target, telling
from dmabuf.devices import v4l2
from dmabuf.file import File
from dmabuf.route import ALLOWED
from dmabuf.sizes import round_up

_HELP = """\
Record frames of the camera DEVICE to OUT, a raw file; - is standard output.

The camera writes into buffers, and the disk reads from the same memory: where OUT takes O_DIRECT
no CPU copies a frame. Each plane begins at a multiple of the page size (4096 bytes), and OUT.json
tells where, with the frame's number and time. Both files appear whole, or not at all. Without
--frames, recording goes on until Ctrl-C, which then is its regular end.

Into a pipe go the planes one behind the other, and no other file is made.
"""

_EXAMPLES = """\
Examples:

\b
  dmabuf record /dev/video0 out.raw --frames 300
  dmabuf record /dev/video0 out.raw --format NV12 --size 1920x1080 --fps 60 --require zero-copy
  dmabuf record /dev/video0 - --format YUYV --size 640x480 |
      ffmpeg -f rawvideo -pix_fmt yuyv422 -s 640x480 -i - out.mkv
"""

_PAGE = os.sysconf("SC_PAGESIZE")


@dataclass(frozen=True, slots=True)
class Options:
    """The command line, as it was understood."""

    device: str
    out: str
    frames: int | None = None
    format: str | None = None
    size: tuple[int, int] | None = None
    fps: float | None = None
    buffers: int = 8
    exporter: str = "udmabuf"
    huge_pages: bool = False
    timeout: float = 5.0
    require: str = "any"
    sync: bool = False
    force: bool = False
    json: bool = False
    progress: bool | None = None
    quiet: bool = False


def add_to(app: typer.Typer) -> None:
    """Add the command to the parser."""
    app.command("record", help=_HELP, epilog=_EXAMPLES)(_command)


def _command(
    device: Annotated[str, typer.Argument(metavar="DEVICE", help="The camera, as /dev/video0.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Where to; - is standard output.")],
    frames: Annotated[
        int | None,
        typer.Option("--frames", "-n", min=1, help="How many. [default: until Ctrl-C]"),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option("--format", metavar="FOURCC", help="As YUYV or NV12. [default: as it is set]"),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(metavar="WxH", help="Pixels, as 640x480. [default: as it is set]"),
    ] = None,
    fps: Annotated[
        float | None, typer.Option(help="Frames a second. [default: as it is set]")
    ] = None,
    buffers: Annotated[
        int, typer.Option(min=1, help="Frames that there is room for while the disk is busy.")
    ] = 8,
    exporter: Annotated[
        str,
        typer.Option(metavar="NAME", help="What makes the buffers: udmabuf, a heap, driver."),
    ] = "udmabuf",
    huge_pages: Annotated[
        bool, typer.Option("--huge-pages", help="Make the buffers of huge pages.")
    ] = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for each frame.")] = 5.0,
    require: Annotated[
        str, typer.Option(metavar="zero-copy|uncached|any", help="Which routes to OUT will do.")
    ] = "any",
    sync: _options.Sync = False,
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Replace a file without permission.")
    ] = False,
    json: _options.Json = False,
    progress: _options.Progress = None,
    quiet: _options.Quiet = False,
) -> None:

    if require not in ALLOWED:
        raise typer.BadParameter(f"--require {require}: one of {', '.join(ALLOWED)}")
    options = Options(
        device, out, frames, form, _parse_size(size), fps, buffers, exporter, huge_pages, timeout,
        require, sync, force, json, False if quiet and progress is None else progress, quiet,
    )  # fmt: skip
    with _output.orderly():
        run(options)


def _parse_size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise typer.BadParameter(f"--size {text}: width and height in pixels, as 640x480")
    return int(width), int(height)


@dataclass
class _Recorded:
    """What has been written whole."""

    frames: list[dict[str, Any]] = field(default_factory=list)
    end: int = 0
    """Where the last plane's bytes end in the file."""
    nbytes: int = 0
    lost: int = 0
    copied: int = 0
    routes: Counter[str] = field(default_factory=Counter)
    reason: str = ""
    seconds: float = 0.0
    clock: str = "unknown"


def run(options: Options) -> None:
    """Carry the command out.

    Raises:
        OSError, ValueError, ImportError: what went wrong; the files are as they were before.
    """
    source = End(options.device, options.device, None)
    target = find_target(options.out, options.device)
    mode = target.status.st_mode if target.status else stat.S_IFREG
    if stat.S_ISBLK(mode):
        raise OSError(errno.EINVAL, "is a block device: name a file on it", target.name)
    width, height = options.size or (None, None)
    with ExitStack() as stack:
        shown = stack.enter_context(_progress.display(options.progress))
        camera = stack.enter_context(
            v4l2.capture(
                options.device,
                buffers=options.buffers,
                exporter=options.exporter,
                huge_pages=options.huge_pages,
                format=options.format,
                width=width,
                height=height,
                fps=options.fps,
                timeout=options.timeout,
            )
        )
        if isinstance(target.what, int) or not stat.S_ISREG(mode):
            with telling(source, target, None), File(target.what, "w") as file:
                recorded = _record(options, camera, file, target.offset, 1, shown)
            advance(source, target, recorded.end - target.offset)
        else:
            recorded = _replace(options, camera, source, target, shown)
        about = _about(camera, recorded)
    _tell(options, target, about, recorded)


def _replace(
    options: Options, camera: v4l2.Camera, source: End, target: End, shown: _progress.Display
) -> _Recorded:
    """Record to a regular file, and write the one beside it."""
    assert isinstance(target.what, str)
    with (
        Replacement(target.what, force=options.force, note=_output.note) as place,
        Replacement(target.what + ".json", force=options.force, note=_output.note) as beside,
        telling(source, target, place.temporary),
    ):
        with File(place.temporary, "w") as file:
            _make_room(options, camera, file, place.temporary)
            recorded = _record(options, camera, file, 0, _PAGE, shown)
            os.ftruncate(file.fileno(), recorded.end)
            if options.sync:
                os.fdatasync(file.fileno())
        try:
            with open(beside.temporary, "w", encoding="ascii") as text:
                json.dump(_about(camera, recorded), text, indent=1)
                text.write("\n")
                text.flush()
                if options.sync:
                    os.fdatasync(text.fileno())
        except OSError as error:
            error.filename = f"{target.name}.json"
            raise
        if os.path.lexists(beside.path):  # never one that tells of another recording
            os.unlink(beside.path)
        place.commit(None, sync=False)
        beside.commit(None, sync=options.sync)
    return recorded


def _make_room(options: Options, camera: v4l2.Camera, file: File, path: str) -> None:
    """All of the disk that the frames will take, so that a full one is known before the first."""
    planes = camera.format.planes
    if options.frames is not None and all(plane.bytes_per_line for plane in planes):
        total = options.frames * sum(round_up(plane.size, _PAGE) for plane in planes)
        growth.allocate(file.fileno(), path, [(0, total)], 0)


def _record(
    options: Options,
    camera: v4l2.Camera,
    file: File,
    start: int,
    alignment: int,
    shown: _progress.Display,
) -> _Recorded:
    """Write frames until there are enough, or until Ctrl-C where it is not told how many."""
    recorded = _Recorded(end=start)
    begun = time.perf_counter()
    total = None
    if options.frames is not None:
        total = options.frames * sum(plane.size for plane in camera.format.planes)
    try:
        for frame in camera:
            with frame:
                _write(options, frame, file, alignment, recorded)
            shown.show("recording", recorded.nbytes, total)
            if len(recorded.frames) == options.frames:
                break
    except OSError as error:
        if hasattr(error, "nbytes"):  # of a plane: now of all of them
            error.nbytes += recorded.nbytes
        raise
    except KeyboardInterrupt:
        if options.frames is not None or not recorded.frames:
            raise
    recorded.seconds = time.perf_counter() - begun
    return recorded


def _write(
    options: Options, frame: v4l2.Frame, file: File, alignment: int, recorded: _Recorded
) -> None:
    """One frame; what has not arrived whole is not on the record."""
    planes = []
    end, copied = recorded.end, 0
    for plane in frame.planes:
        at = round_up(end, alignment)
        done = file.write_from(
            plane.buffer,
            min(round_up(plane.nbytes, alignment), plane.buffer.size - plane.offset),
            file_offset=None if file.size is None else at,
            buffer_offset=plane.offset,
            require=options.require,  # type: ignore[arg-type]
        )
        end = at + plane.nbytes
        copied += done.copied
        recorded.routes[done.route.value] += plane.nbytes
        recorded.reason = done.reason
        planes.append({"offset": at, "nbytes": plane.nbytes})
    recorded.frames.append(
        {
            "sequence": frame.sequence,
            "timestamp_ns": frame.timestamp_ns,
            "lost_before": frame.lost,
            "error": frame.error,
            "planes": planes,
        }
    )
    recorded.end = end
    recorded.nbytes += frame.nbytes
    recorded.copied += copied
    recorded.lost += frame.lost
    recorded.clock = frame.clock


def _about(camera: v4l2.Camera, recorded: _Recorded) -> dict[str, Any]:
    """The file beside the recording; keys are only ever added."""
    form = camera.format
    return {
        "device": camera.path,
        "card": camera.card,
        "driver": camera.driver,
        "fourcc": form.fourcc,
        "width": form.width,
        "height": form.height,
        "planes": [plane._asdict() for plane in form.planes],
        "fps": None if form.fps is None else str(form.fps),
        "clock": recorded.clock,
        "size": recorded.end,
        "lost": recorded.lost,
        "frames": recorded.frames,
    }


def _tell(options: Options, target: End, about: dict[str, Any], recorded: _Recorded) -> None:
    stream = sys.stderr if target.what == 1 else sys.stdout
    if options.json:
        record = {
            "target": target.name,
            "nbytes": recorded.nbytes,
            "seconds": recorded.seconds,
            "routes": dict(recorded.routes),
            "reason": recorded.reason,
            "copied": recorded.copied,
            "synced": options.sync,
        }
        _output.say_json(record | about, stream=stream)
    elif not options.quiet:
        lost = f"{recorded.lost} lost" if recorded.lost else "none lost"
        routes = " and ".join(recorded.routes)
        _output.say(
            f"{len(recorded.frames)} frames, {_output.decimal(recorded.nbytes)} in "
            f"{recorded.seconds:.2f} s, {lost}: {about['width']}x{about['height']} "
            f"{about['fourcc']}, written {routes} ({recorded.reason}), "
            f"{_output.decimal(recorded.copied)} copied by the CPU",
            stream=stream,
        )
