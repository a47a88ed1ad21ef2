"""`dmabuf bench`: measure every way into a buffer and out of it, side by side."""

from __future__ import annotations

import errno
import os
import random
from argparse import ArgumentTypeError, Namespace
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

from dmabuf.cli import output
from dmabuf.cli.parser import Command, Misuse, Parser, number, region, size
from dmabuf.copying import Replacement
from dmabuf.inspect import (
    CHART_FORMATS,
    PERCENTILES,
    TODAY,
    Facts,
    Group,
    Ratio,
    Result,
    Row,
    draw_chart,
    load_matplotlib,
    measure_routes,
)
from dmabuf.sizes import format_size
from dmabuf.transfer import Direction

_LEAST_BLOCK = 4096
_MOST_BLOCK = 1 << 30


def _blocks(text: str) -> tuple[int, ...]:
    blocks = {size(one) for one in text.split(",")}
    for one in blocks:
        if one % _LEAST_BLOCK or not _LEAST_BLOCK <= one <= _MOST_BLOCK:
            raise ArgumentTypeError(
                f"invalid block size {one}: a multiple of 4096, up to {format_size(_MOST_BLOCK)}"
            )
    return tuple(sorted(blocks))


def _depths(text: str) -> tuple[int, ...]:
    return tuple(sorted({number(1, 4096)(one) for one in text.split(",")}))


def _arguments(parser: Parser) -> None:
    parser.add_argument("target", metavar="TARGET", nargs="?", help="A file or block device.")
    parser.option("--dir", "DIR", "Where the scratch file is made. [default: .]")
    parser.shared("region", "destroy")
    parser.option("--size", "SIZE", "Bytes of the file and the buffer. [default: 256MiB]", size)
    text = "Bytes of a request. [default: 4KiB,1MiB]"
    parser.option("--block", "SIZE,...", text, _blocks, (4096, 1 << 20))
    text = "Requests in flight, of our routes. [default: 1,32; with --quick 32]"
    parser.option("--depth", "N,...", text, _depths)
    parser.shared("exporter")
    parser.option("--huge-pages", "SIZE", "Use huge pages, such as 2MiB.")
    parser.flag("--random", "Visit the blocks in random order.")
    parser.flag("--quick", "3 rounds and 10 seconds: an answer within 20.")
    parser.option("--rounds", "N", "Runs of each way. [default: 5]", number(1, 1000))
    text = "How long it may take, about. [default: 55]"
    parser.option("--seconds", "N", text, number(1, 86400, float))
    parser.option("--seed", "N", "Of the order. [default: random]", number(0, 1 << 62))
    parser.option("--plot", "FILE", "Draw charts: .png or .svg.")
    parser.shared("json", "progress")


def _run(args: Namespace) -> None:
    overwritten = region(args)
    if args.target is not None and args.dir is not None:
        raise Misuse("--dir is for a scratch file, and TARGET is given")
    if args.target is None and overwritten:
        raise Misuse("--region and --destroy are for a TARGET, and none is given")
    if args.size is not None and overwritten:
        raise Misuse("--size: the region has one already")
    if args.size is not None and args.size < max(args.block):
        raise Misuse(f"--size {args.size}: less than one block of {max(args.block)} bytes")
    image = None if args.plot is None else args.plot.rpartition(".")[2].lower()
    if image is not None and image not in CHART_FORMATS:
        raise Misuse(f"--plot {args.plot}: the name ends in .{' or .'.join(CHART_FORMATS)}")
    seed = random.randrange(1 << 32) if args.seed is None else args.seed
    with ExitStack() as stack:
        place = None
        if args.plot is not None:
            load_matplotlib()
            _check_plot(args.plot, args.target)
            place = stack.enter_context(Replacement(args.plot, force=False, note=output.note))
        with output.Progress(args.progress) as progress:
            result = measure_routes(
                args.target,
                folder=args.dir or ".",
                region=overwritten,
                size=args.size or 256 << 20,
                blocks=args.block,
                depths=args.depth or ((32,) if args.quick else (1, 32)),
                exporter=args.exporter,
                huge_pages=args.huge_pages,
                shuffled=args.random,
                rounds=args.rounds or (3 if args.quick else 5),
                seconds=args.seconds or (10 if args.quick else 55),
                seed=seed,
                progress=progress.show,
            )
        try:
            if place is not None and image is not None:
                _draw(result, place, image, args.plot)
        finally:  # print what took minutes to measure, even without room for its chart
            if args.json:
                output.say_json(_document(result, args, seed))
            else:
                _say(result, args, seed)


def _check_plot(plot: str, target: str | None) -> None:
    if os.path.exists(plot) and not os.path.isfile(plot):
        raise OSError(errno.EINVAL, "is not a regular file, and a chart would replace it", plot)
    if target is not None and os.path.exists(plot) and os.path.samefile(plot, target):
        raise OSError(errno.EINVAL, "is TARGET: a chart would replace it", plot)


def _draw(result: Result, place: Replacement, image: str, plot: str) -> None:
    try:
        draw_chart(result, place.temporary, image)
        place.commit(None, sync=False)
    except OSError as error:
        text = f"drawing the chart: {error.strerror or error}"
        raise OSError(error.errno or errno.EIO, text, plot) from None


# -- for people


def _say(result: Result, args: Namespace, seed: int) -> None:
    machine, target, buffer = result.machine, result.target, result.buffer
    on = [str(target["kind"])]
    on += [f"on {target['filesystem']}"] if target["filesystem"] else []
    on += [f"device {target['device']}"] if target["device"] else []
    where = f" from {target['start']}" if target["start"] else ""
    pages = f" of {buffer['huge_pages']} pages" if buffer["huge_pages"] else ""
    rounds = "round" if result.rounds == 1 else "rounds"
    order = "blocks in random order" if args.random else "blocks in order"
    for line in (
        f"machine  {machine['cpus']} x {machine['cpu']}, {_bytes(machine['memory'])} of memory",
        f"kernel   Linux {machine['kernel']}, {machine['architecture']}",
        f"versions dmabuf {machine['dmabuf']}, Python {machine['python']}",
        f"target   {target['name']} ({', '.join(on)})",
        f"measured {_bytes(target['size'])} of it{where}, every byte compared once per way",
        f"buffer   {buffer['exporter']}{pages}: {buffer['reason']}",
        f"runs     {result.rounds} interleaved {rounds}, {order}, seed {seed}, "
        f"{result.seconds:.0f} s in all",
    ):
        output.say(line)
    if result.warm:
        output.say(f"no run was cold: {result.warm}")
    if result.unseen:
        output.say(f"the page cache was dropped before each run but not examined: {result.unseen}")
    for group in result.groups:
        output.write("\n")
        _say_group(result, group)
    output.write("\n")
    for line in result.headlines:
        output.say(line)


def _bytes(value: str | int | None) -> str:
    return format_size(int(value or 0))


def _say_group(result: Result, group: Group) -> None:
    base = next(iter(TODAY))
    rows: list[tuple[str, ...]] = [
        (
            row.way,
            str(row.depth),
            output.decimal(group.speed(row), "B/s"),
            f"{group.speed(row) / group.block:,.0f}",
            f"{group.cpu(row):.2f}",
            _ratio(group, row),
            _cached(result, group, row),
        )
        for row in group.rows
    ]
    title = f"{group.title}, {format_size(group.nbytes)} a run"
    output.write(
        output.table(
            ("way", "in flight", "throughput", "IOPS", "CPU s/GiB", f"times {base}", "cached"),
            rows,
            title=title,
        )
        + "\n"
    )
    rows = [
        (way, str(len(calls)), *map(_duration, group.percentiles(way).values()))
        for way, calls in group.latencies.items()
    ]
    output.write(
        output.table(
            ("way", "calls", *PERCENTILES), rows, title=f"{group.title}, latency of a call"
        )
    )
    for way, why in group.refused.items():
        output.say(f"  no {way}: {why}")


def _ratio(group: Group, row: Row) -> str:
    figure = group.ratio(row)
    if figure is None:
        return "-"
    text = f"{figure.median:.2f} ({figure.low:.2f} to {figure.high:.2f})"
    return text if figure.certain else f"in the noise: {text}"


def _cached(result: Result, group: Group, row: Row) -> str:
    part = result.residency(row, group)
    return "?" if part is None else f"{100 * part:.0f}%"


def _duration(seconds: float | None) -> str:
    """Return a time with three digits: `41.2 us`."""
    if seconds is None:
        return "-"
    for unit, scale in (("us", 1e6), ("ms", 1e3)):
        if seconds * scale < 999.5:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds:.3g} s"


# -- for programs


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast one way was, with one queue depth."""

    way: str
    today: bool
    """Whether people use this way today; false for a route."""
    depth: int
    """Requests in flight."""
    registered: bool
    """Whether the pages of the buffer were registered with io_uring."""
    bytes_per_second: float
    """The median run."""
    iops: float
    cpu_seconds_per_gib: float
    times_as_fast: dict[str, Ratio]
    """t_other / t of runs in the same round, by the other way."""
    seconds: list[float]
    """The time of each run."""
    cached_pages_before: int | None
    """Pages of the file in the page cache before a run, at most; null if unknown."""
    cached_pages_after: int | None


@dataclass(frozen=True, slots=True)
class Latency:
    """The time of single calls of one way, one block each."""

    way: str
    calls: int
    seconds: dict[str, float | None]
    """By percentile; null where there are too few calls to tell it from the slowest."""


@dataclass(frozen=True, slots=True)
class Compared:
    """What is compared with each other: one direction, one block size, the same bytes."""

    direction: Direction
    block: int
    """Bytes."""
    nbytes: int
    """Bytes of a run."""
    ways: list[Speed]
    latencies: list[Latency]
    refused: dict[str, str]
    """Why a way is missing."""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """The result of `dmabuf bench`."""

    headlines: list[str]
    """A sentence for each direction and block size, the largest blocks first."""
    machine: Facts
    target: Facts
    buffer: Facts
    rounds: int
    seed: int
    random: bool
    """Whether the blocks were visited in random order."""
    seconds: float
    why_not_cold: str | None
    """Why no run was cold; null if all were."""
    why_not_visible: str | None
    """Why the page cache could not be examined; null if it was."""
    groups: list[Compared]
    format: Literal["dmabuf-bench/1"] = "dmabuf-bench/1"


def _document(result: Result, args: Namespace, seed: int) -> Benchmark:
    return Benchmark(
        result.headlines,
        result.machine,
        result.target,
        result.buffer,
        result.rounds,
        seed,
        args.random,
        result.seconds,
        result.warm,
        result.unseen,
        [
            Compared(
                group.direction,
                group.block,
                group.nbytes,
                [_speed(result, group, row) for row in group.rows],
                [
                    Latency(way, len(calls), group.percentiles(way))
                    for way, calls in group.latencies.items()
                ],
                group.refused,
            )
            for group in result.groups
        ],
    )


def _speed(result: Result, group: Group, row: Row) -> Speed:
    ratios = {way: group.ratio(row, way) for way in TODAY}
    seen = not result.unseen
    return Speed(
        row.way,
        row.today,
        row.depth,
        row.registered,
        group.speed(row),
        group.speed(row) / group.block,
        group.cpu(row),
        {way: figure for way, figure in ratios.items() if figure},
        [sample.seconds for sample in row.samples],
        max(one.before for one in row.samples) if seen else None,
        max(one.after for one in row.samples) if seen else None,
    )


BENCH = Command(
    """\
Measure every way into a buffer and out of it: our routes, and what people use today.

Without TARGET, a scratch file in --dir is read and written; it has no name, so nothing of it can be
left. TARGET, a file or block device, is only read, unless --region and --destroy allow a part of it
to be overwritten.

The ways of today are one thread that handles one block after the other: "copy" reads through the
page cache and copies into the buffer, "bounce" reads with O_DIRECT into aligned memory and copies,
"mmap" copies out of a mapping of the file; writes do the reverse. Before each run the file is
dropped from the page cache. A write ends when it is on the medium (fdatasync).

In each round each way runs once, in random order. "times copy" is t_copy / t of runs in the same
round: median, lowest and highest. A difference counts only if there were three rounds, all agree,
and it exceeds half of the range; otherwise it is "in the noise". A latency is the time of one call
that moves one block, of a write without the flush. See docs/guides/testing-kernels.md.""",
    _arguments,
    _run,
    """\
  dmabuf bench
  dmabuf bench --quick --dir /mnt/nvme
  dmabuf bench --block 4KiB,1MiB --depth 1,8,64 --plot bench.svg /dev/nvme0n1
  dmabuf bench --region 0+1GiB --destroy --exporter udmabuf /dev/nvme0n1
  dmabuf bench --json model.safetensors | jq -r '.headlines[0]'""",
)
