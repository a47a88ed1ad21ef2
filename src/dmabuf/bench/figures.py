"""What becomes of samples: medians, spreads, percentiles, and the sentence they come to: pure."""

from __future__ import annotations

import statistics
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from dmabuf.bench.ways import LONG, TODAY
from dmabuf.route import Direction, Route
from dmabuf.sizes import format_size

GIB = 1 << 30
PERCENTILES = {"p50": 500, "p99": 990, "p99.9": 999, "p100": 1000}
"""Their names, and what they are in thousandths."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of one way."""

    seconds: float
    cpu: float
    """CPU seconds of the process and its children, user and system; io_uring's workers are in."""
    before: int
    """Pages of the range in the page cache before."""
    after: int


@dataclass(slots=True)
class Row:
    """One way with one queue depth, and its samples, one a round."""

    way: str
    depth: int
    registered: bool = False
    samples: list[Sample] = field(default_factory=list)

    @property
    def today(self) -> bool:
        """Whether it is a way that people do it today, and no route of ours."""
        return self.way in TODAY

    @property
    def label(self) -> str:
        """Its name in tables and charts."""
        return self.way if self.today else f"{self.way} x{self.depth}"


@dataclass(slots=True)
class Group:
    """What is compared with each other: one direction, one size of block, the same bytes."""

    direction: Direction
    block: int
    nbytes: int = 0
    """Bytes of a run."""
    rows: list[Row] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    """Why a way is not there."""
    latencies: dict[tuple[str, int], array[float]] = field(default_factory=dict)
    """Seconds of one block, by way and depth: at depth 1 of a call, at others of a request."""

    def add_latencies(self, way: str, depth: int, seconds: Iterable[float]) -> None:
        """Add to those of a way and depth."""
        self.latencies.setdefault((way, depth), array("d")).extend(seconds)

    @property
    def timed(self) -> list[tuple[str, int]]:
        """Every way and depth that has latencies, as the rows are ordered."""
        ways = list(dict.fromkeys(row.way for row in self.rows))
        return sorted(self.latencies, key=lambda key: (ways.index(key[0]), key[1]))

    @property
    def title(self) -> str:
        """What it is, in a few words."""
        return f"{self.direction}, blocks of {format_size(self.block)}"

    def row(self, way: str) -> Row | None:
        """A way's row, the one with the most requests in flight."""
        rows = [row for row in self.rows if row.way == way]
        return max(rows, key=lambda row: row.depth, default=None)

    @property
    def base(self) -> Row | None:
        """What the others are compared with."""
        return self.row(TODAY[0])

    def speed(self, row: Row) -> float:
        """Bytes a second, of the median run."""
        return self.nbytes / statistics.median(sample.seconds for sample in row.samples)

    def cpu(self, row: Row) -> float:
        """CPU seconds a GiB, the median."""
        return statistics.median(sample.cpu for sample in row.samples) * GIB / self.nbytes

    def sooner(self, row: Row, than: Row | None) -> tuple[float, float, float] | None:
        """1 - t/t_than of the runs of each round: median, lowest and highest."""
        if than is None:
            return None
        pairs = zip(row.samples, than.samples, strict=True)
        return spread([1 - one.seconds / other.seconds for one, other in pairs])


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, lowest and highest."""
    return statistics.median(values), min(values), max(values)


def percentile(ordered: Sequence[float], permille: int) -> float | None:
    """By nearest rank; None where there are too few values to tell it from the highest."""
    rank = -(-len(ordered) * permille // 1000)
    if not ordered or (rank == len(ordered) and permille < 1000):
        return None
    return ordered[rank - 1]


def percentiles(latencies: Sequence[float]) -> dict[str, float | None]:
    """Those of PERCENTILES, in seconds."""
    ordered = sorted(latencies)
    return {name: percentile(ordered, permille) for name, permille in PERCENTILES.items()}


def best(group: Group) -> Row | None:
    """The route that a transfer takes by itself, with the most requests in flight."""
    rows = (group.row(route.value) for route in Route)
    return next((row for row in rows if row is not None), None)


def headline(group: Group, cold: bool) -> str | None:
    """How much sooner the bytes are there than by each way of today; None without routes."""
    row = best(group)
    if row is None or group.base is None:
        return None
    figures = [(_long(group, way, cold), group.sooner(row, group.row(way))) for way in TODAY]
    known = [(name, figure) for name, figure in figures if figure is not None]
    name, figure = known[0]
    median, low, high = figure
    rounds = len(row.samples)
    what = "the bytes in the buffer" if group.direction == "read" else "the bytes on the medium"
    text = (
        f"{row.way} has {what} {_than(median)} than by a {name} "
        f"({round(100 * low)}% to {round(100 * high)}% over {rounds} round{'s'[: rounds > 1]}"
    )
    for name, (median, _, _) in known[1:]:
        text += f"; {_than(median)} than by {name}"
    return f"{text}): {format_size(group.block)} blocks, {row.depth} in flight"


def _long(group: Group, way: str, cold: bool) -> str:
    name = LONG[group.direction, way]
    return name if cold else name.removeprefix("cold ")


def _than(sooner: float) -> str:
    """`55% sooner`, or `12% later` (of the other's time)."""
    percent = round(100 * sooner)
    return f"{percent}% sooner" if percent >= 0 else f"{-percent}% later"
