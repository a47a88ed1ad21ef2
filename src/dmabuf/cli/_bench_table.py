"""What `dmabuf bench` tells people: what was measured on, tables, and what it comes to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dmabuf.bench.figures import PERCENTILES, Group, Row, percentiles
from dmabuf.bench.result import Result
from dmabuf.cli import _output, _table
from dmabuf.sizes import format_size


def say(result: Result) -> None:
    """All of it, on standard output."""
    for line in preamble(result):
        _output.say(line)
    for group in result.measured.groups:
        for table in tables(result, group):
            _output.say("\n" + _table.drawn(*table))
        for way, why in group.refused.items():
            _output.say(f"  no {way}: {why}")
    _output.say("")
    for line in result.headlines:
        _output.say(line)


def preamble(result: Result) -> Iterator[str]:
    """What was measured on, and how."""
    machine, measured = result.machine, result.measured
    yield (
        f"machine  {machine['cpus']} x {machine['cpu']}, {format_size(machine['memory'])} of memory"
    )
    yield f"kernel   Linux {machine['kernel']}, {machine['architecture']}"
    yield f"versions dmabuf {machine['dmabuf']}, Python {machine['python']}"
    about = [result.kind]
    about += [f"on {result.filesystem}"] if result.filesystem else []
    about += [f"device {result.device}"] if result.device else []
    yield f"target   {result.target} ({', '.join(about)})"
    where = f" from {result.start}" if result.start else ""
    yield f"measured {format_size(result.size)} of it{where}, every byte compared once per way"
    pages = f" of {result.huge_pages} pages" if result.huge_pages else ""
    yield f"buffer   {result.exporter}{pages}: {result.exporter_reason}"
    order = "blocks in random order" if result.setting.shuffled else "blocks one by one"
    yield (
        f"runs     {measured.rounds} interleaved rounds, {order}, seed {result.setting.seed}, "
        f"{result.seconds:.0f} s in all"
    )
    if measured.warm:
        yield f"no run was cold: {measured.warm}"
    if measured.unseen:
        yield f"dropped from the page cache before each run, but not seen to be: {measured.unseen}"


def tables(result: Result, group: Group) -> Iterator[_table.Content]:
    """The throughput of a group, and its latencies."""
    size = f"{format_size(group.nbytes)} a run"
    head = ("way", "in flight", "throughput", "IOPS", "CPU s/GiB", "sooner than copy", "cached")
    yield f"{group.title}, {size}", head, [_figures(result, group, row) for row in group.rows]
    rows = []
    for way, depth in group.timed:
        latencies = group.latencies[way, depth]
        cells = [
            "-" if seconds is None else duration(seconds)
            for seconds in percentiles(latencies).values()
        ]
        rows.append((way, str(depth), str(len(latencies)), *cells))
    yield f"{group.title}, latency", ("way", "in flight", "blocks", *PERCENTILES), rows


def _figures(result: Result, group: Group, row: Row) -> Sequence[str]:
    speed = group.speed(row)
    sooner = group.sooner(row, group.base)
    text = "-"
    if sooner is not None and row is not group.base:
        median, low, high = (f"{round(100 * value)}%" for value in sooner)
        text = f"{median} ({low} to {high})"
    cached = result.residency(row, group)
    return (
        row.way,
        str(row.depth),
        _output.decimal(speed, "B/s"),
        f"{speed / group.block:,.0f}",
        f"{group.cpu(row):.2f}",
        text,
        "?" if cached is None else f"{100 * cached:.0f}%",
    )


def duration(seconds: float) -> str:
    """A time, with three digits: `41.2 us`."""
    for unit, scale in (("us", 1e6), ("ms", 1e3)):
        if seconds * scale < 999.5:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds:.3g} s"
