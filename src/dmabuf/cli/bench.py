"""`dmabuf bench`: every way into a buffer and out of it, measured side by side."""

from __future__ import annotations

import errno
import os
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Annotated

import typer

from dmabuf import exporters, nvme
from dmabuf._replace import Replacement
from dmabuf.bench import about, chart, scratch
from dmabuf.bench.result import Result, as_json
from dmabuf.bench.run import Bench, Setting
from dmabuf.bench.ways import Place
from dmabuf.cli import _bench_page, _bench_table, _options, _output, _progress, _region
from dmabuf.cli._path import filesystem
from dmabuf.facts import PAGE, kind_of
from dmabuf.file import File
from dmabuf.sizes import format_size, parse_size

_HELP = """\
Measure every way into a buffer and out of it: our routes, and how people do it today.

Without TARGET a scratch file in --dir is read and written; it has no name, so nothing of it can be
left behind. TARGET, a file or block device, is only read, unless --region and --destroy say what of
it may be overwritten.

The ways of today are one thread that handles one block after the other: "copy" reads a block
through the page cache and copies it into the buffer, "bounce" reads it with O_DIRECT into aligned
memory and copies it, "mmap" copies it out of a mapping of the file; for writes the reverse. They
have no counterpart to more than one block in flight. All use the same buffer, touched before.
Before each run the page cache is emptied of the file's range, and looked at; a write ends when it
is on the medium (fdatasync). A warm-up compares every byte, so that a broken way cannot win.

In each round each way runs once, in random order; figures are medians, and "sooner" is 1 - t/t_copy
of the runs of the same round, with its lowest and highest. A latency is the time of one block, of a
write without the flush: with 1 in flight of a call, from Python to Python (of the ways of today
with the buffer mapped before), with more of a request, from being made to being completed. CPU
seconds are those of the process, the kernel's and io_uring's workers in it. "cached" is what a run
left in the page cache, of its bytes.
"""

_EXAMPLES = """\
Examples:

\b
  dmabuf bench
  dmabuf bench --quick --dir /mnt/nvme
  dmabuf bench --block 4KiB,128KiB,1MiB --depth 1,8,64 --plot bench.html /dev/nvme0n1
  dmabuf bench --region 0+1GiB --destroy --exporter udmabuf /dev/nvme0n1
  dmabuf bench --json model.safetensors | jq -r .headline
"""

_SIZE = 256 << 20
_LEAST_BLOCK = 4096
_MOST_BLOCK = 1 << 30  # what an engine takes
_MOST_DEPTH = 4096
_OF_THE_MEDIUM = (errno.EIO, errno.ENOSPC, errno.EDQUOT)
_FILL_PART = 0.2  # of the time, for filling a scratch file


@dataclass(frozen=True, slots=True)
class Options:
    """The command line, as it was understood."""

    target: str | None
    folder: str = "."
    region: tuple[int, int] | None = None
    """Offset and size, in bytes, of what may be overwritten."""
    size: int = _SIZE
    blocks: tuple[int, ...] = (4096, 1 << 20)
    depths: tuple[int, ...] = (1, 32)
    exporter: str = "auto"
    huge_pages: str | None = None
    shuffled: bool = False
    rounds: int = 5
    seconds: float = 55
    seed: int = 0
    plot: str | None = None
    json: bool = False
    progress: bool | None = None

    @property
    def name(self) -> str:
        """The target, as people know it."""
        return self.target or f"a scratch file in {self.folder}"


def add_to(app: typer.Typer) -> None:
    """Add the command to the parser."""
    app.command("bench", help=_HELP, epilog=_EXAMPLES)(_command)


def _command(
    target: Annotated[
        str | None, typer.Argument(metavar="TARGET", help="A file or block device.")
    ] = None,
    folder: Annotated[
        str | None,
        typer.Option("--dir", metavar="DIR", help="Where the scratch file is made. [default: .]"),
    ] = None,
    region: _options.Region = None,
    destroy: Annotated[
        bool, typer.Option("--destroy", help="Overwrite the region, and measure writes as well.")
    ] = False,
    size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Bytes of the file and the buffer. [default: 256MiB]"),
    ] = None,
    block: Annotated[
        str, typer.Option(metavar="SIZE,...", help="Bytes of a request.")
    ] = "4KiB,1MiB",
    depth: Annotated[
        str | None,
        typer.Option(
            metavar="N,...",
            help="Requests in flight, of our routes. [default: 1,32; with --quick 32]",
        ),
    ] = None,
    exporter: _options.Exporter = "auto",
    huge_pages: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Make the buffer of huge pages, as 2MiB."),
    ] = None,
    shuffled: Annotated[
        bool, typer.Option("--random", help="Blocks in random order. [default: one by one]")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="3 rounds and 10 seconds: an answer within 20.")
    ] = False,
    rounds: Annotated[
        int | None, typer.Option(metavar="N", min=1, max=1000, help="Runs a way. [default: 5]")
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            metavar="N", min=1, max=86400, help="How long it may take, about. [default: 55]"
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Of the order. [default: random]")
    ] = None,
    plot: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Charts: .png, .svg, or .html with tables as well."),
    ] = None,
    json: _options.Json = False,
    progress: _options.Progress = None,
) -> None:
    overwritten = _region.parse(region, destroy=destroy)
    if target is not None and folder is not None:
        raise typer.BadParameter("--dir is where a scratch file is made, and TARGET is given")
    if target is None and overwritten:
        raise typer.BadParameter("--region and --destroy are for a TARGET, and none is given")
    if size is not None and overwritten:
        raise typer.BadParameter("--size: the region has one already")
    blocks = tuple(_size("--block", one, _LEAST_BLOCK, _MOST_BLOCK) for one in block.split(","))
    for one in blocks:
        if one % _LEAST_BLOCK:
            raise typer.BadParameter(
                f"--block {block}: {one} bytes are no multiple of {_LEAST_BLOCK}"
            )
    nbytes = _size("--size", size, _LEAST_BLOCK, 1 << 62) if size else _SIZE
    if size and nbytes < max(blocks):
        raise typer.BadParameter(f"--size {size}: less than one block of {max(blocks)} bytes")
    if plot is not None and chart.format_of(plot) is None:
        raise typer.BadParameter(f"--plot {plot}: the name ends in {', '.join(chart.FORMATS)}")
    options = Options(
        target,
        folder or ".",
        overwritten,
        nbytes,
        tuple(sorted(set(blocks))),
        _depths(depth or ("32" if quick else "1,32")),
        exporter,
        huge_pages,
        shuffled,
        rounds or (3 if quick else 5),
        seconds or (10 if quick else 55),
        random.randrange(1 << 32) if seed is None else seed,
        plot,
        json,
        progress,
    )
    with _output.orderly():
        run(options)


def _size(option: str, text: str, least: int, most: int) -> int:
    try:
        nbytes = parse_size(text, option)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if not least <= nbytes <= most:
        raise typer.BadParameter(
            f"{option} {text}: from {format_size(least)} to {format_size(most)}"
        )
    return nbytes


def _depths(text: str) -> tuple[int, ...]:
    depths = set()
    for one in text.split(","):
        if not one.strip().isdecimal() or not 1 <= int(one) <= _MOST_DEPTH:
            raise typer.BadParameter(
                f"--depth {text}: from 1 to {_MOST_DEPTH}, with commas between"
            )
        depths.add(int(one))
    return tuple(sorted(depths))


def run(options: Options) -> None:
    """Measure, and tell.

    Raises:
        OSError: the target cannot be measured; nothing was touched where it is so from the start.
    """
    begun = time.monotonic()
    with ExitStack() as stack:
        place = None
        if options.plot is not None:
            chart.load()
            _check_plot(options.plot, options.target)
            place = stack.enter_context(Replacement(options.plot, force=False, note=_output.note))
        result = _measure(options, begun)
        try:
            if place is not None and options.plot is not None:
                _draw(result, place, options.plot)
        finally:  # what took minutes to measure is told, also where there is no room for its chart
            if options.json:
                _output.say_json(as_json(result))
            else:
                _bench_table.say(result)


def _draw(result: Result, place: Replacement, plot: str) -> None:
    try:
        _bench_page.draw(result, place.temporary, chart.format_of(plot) or "")
        place.commit(None, sync=False)
    except OSError as error:
        text = f"drawing the chart: {error.strerror or error}"
        raise OSError(error.errno or errno.EIO, text, plot) from None


def _check_plot(plot: str, target: str | None) -> None:
    if os.path.exists(plot) and not os.path.isfile(plot):
        raise OSError(errno.EINVAL, "is no regular file, and a chart would take its place", plot)
    if target is not None and os.path.exists(plot) and os.path.samefile(plot, target):
        raise OSError(errno.EINVAL, "is TARGET: a chart would take its place", plot)


def _measure(options: Options, begun: float) -> Result:
    with (
        _telling(options),
        _progress.display(options.progress) as shown,
        _opened(options) as file,
    ):
        start, size = _range(options, file)
        with exporters.allocate(
            size, exporter=options.exporter, huge_pages=options.huge_pages or False
        ) as buffer:
            if buffer._address is None:
                raise OSError(errno.EOPNOTSUPP, f"nothing can be compared: {buffer._map_refusal}")
            if options.target is None:
                size = _fill(options, file, begun, shown)
            place = Place(file, buffer, start, size)
            setting = Setting(
                directions=("read", "write") if file.writable() else ("read",),
                blocks=options.blocks,
                depths=options.depths,
                rounds=options.rounds,
                deadline=begun + options.seconds,
                seed=options.seed,
                shuffled=options.shuffled,
            )
            measured = Bench(
                place, setting, lambda title, done, total: shown.show(title, done, total or None)
            ).run()
            return Result(
                machine=about.machine(),
                target=options.name,
                kind=file.kind,
                filesystem=None
                if file.kind == "block device"
                else filesystem(options.target or options.folder),
                device=about.device(file.fileno()),
                start=start,
                size=size,
                exporter=buffer.exporter,
                exporter_reason=buffer.reason,
                huge_pages=options.huge_pages,
                setting=setting,
                measured=measured,
                seconds=time.monotonic() - begun,
            )


@contextmanager
def _telling(options: Options) -> Iterator[None]:
    """Errors by the name that the user gave, those of pwrite(2) and its like included."""
    try:
        yield
    except OSError as error:
        unnamed = error.filename is None and error.errno in _OF_THE_MEDIUM
        if unnamed or str(error.filename).startswith("descriptor "):
            error.filename = options.name
        raise


@contextmanager
def _opened(options: Options) -> Iterator[File]:
    """The target, or a scratch file that is still empty."""
    with ExitStack() as stack:
        if options.target is None:
            fd = stack.enter_context(scratch.scratch(options.folder))
            scratch.check_space(fd, options.size, options.folder)
            yield stack.enter_context(File(fd, "r+"))
        else:
            _check_kind(options.target)  # before opening it: a FIFO would wait for a writer
            yield stack.enter_context(File(options.target, "r+" if options.region else "r"))


def _check_kind(target: str) -> None:
    status = os.stat(target)
    kind = kind_of(status.st_mode)
    if kind in (None, "file", "block device"):  # None, such as a directory, is File's to refuse
        return
    disk = nvme.disk_of(status.st_rdev) if nvme.is_namespace(status) else None
    fix = f"name /dev/{disk}, the same namespace" if disk else "name a file or block device"
    text = f"a {kind} has no page cache, by which people read and write today: {fix}"
    raise OSError(errno.ESPIPE, text, target)


def _range(options: Options, file: File) -> tuple[int, int]:
    """Where the range begins that is measured, and how long it is."""
    align = max(PAGE, file._target.direct().alignment.offset)
    for block in options.blocks:
        if block % align:
            text = f"blocks of {block} bytes: O_DIRECT asks for multiples of {align} there"
            raise OSError(errno.EINVAL, text, options.name)
    if options.target is None:
        return 0, options.size // max(options.blocks) * max(options.blocks)
    size = file.size or 0
    start, length = options.region or (0, min(size, options.size))
    if start + length > size:
        text = f"the region ends at {start + length}, and the target at {size}"
        raise OSError(errno.ENOSPC, text, options.target)
    if start % align:
        text = f"the region begins at {start}, which is no multiple of {align}"
        raise OSError(errno.EINVAL, text, options.target)
    most = max(options.blocks)
    if length < most:
        what = "the region" if options.region else "it"
        fix = "give --block 4KiB" if length >= _LEAST_BLOCK else "too small to be measured"
        text = f"{what} has {length} B, less than one block of {format_size(most)}: {fix}"
        if not size:
            text = "is empty: there is nothing to read"
        raise OSError(errno.EINVAL, text, options.target)
    return start, length // most * most


def _fill(options: Options, file: File, begun: float, shown: _progress.Display) -> int:
    """Put random bytes into the scratch file; how many there was time for."""
    most = max(options.blocks)
    size = options.size // most * most
    done = scratch.fill(
        file.fileno(),
        size,
        most,
        options.seed,
        begun + _FILL_PART * options.seconds,
        lambda done: shown.show("filling the scratch file", done, size),
    )
    return done // most * most
