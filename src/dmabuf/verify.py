"""Whether bytes arrive at all: a target tested at length, one direction at a time, every byte.

For people who test kernels, drivers and P2P hardware. A case is a range, a queue depth and a
request size. Before each the destination is poisoned beyond the range on both sides; afterwards all
of it is compared with what the known-good path (plain pread and pwrite, past the page cache where
that can be had) says. Everything follows from the seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from dmabuf import exporters
from dmabuf.buffer import Buffer
from dmabuf.compare import Findings, Mismatch, first_difference
from dmabuf.engine import Engine
from dmabuf.errors import IntegrityError, RouteUnavailable
from dmabuf.file import File
from dmabuf.reference import BLOCK, Reference
from dmabuf.route import Direction, Route

DEPTHS = (1, 2, 4, 8, 16, 32, 64)
REQUESTS = (4096, 16384, 131072, 1 << 20)
"""Bytes of a request, one of which each depth is tested with after the other."""
SIZE = 2 << 20
"""Bytes of the buffer."""
SWEPT = 64 << 20
"""Bytes that are read in order besides the cases, where nothing may be written."""
GUARD = 8192
"""Bytes beside a range that are poisoned and compared as well, where there are so many."""
_TOLD = 20  # failures that are described; all are counted

_EDGES = (0, 0, 0, 4, 64, 512, 4096, -512, -4, 1, -1)
_SIZES = (4096, 512, 8192, 65536, 1 << 20, 511, 513, 4095, 4097, 65537)


class Patterns:
    """Bytes that follow from a seed, and that no shift leaves equal."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._base = random.Random(seed).randbytes(4 * BLOCK)

    def at(self, name: str, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on of the endless pattern of that name."""
        parts = []
        while size:
            index, start = divmod(offset, BLOCK)
            place = random.Random(f"{self._seed}:{name}:{index}").randrange(3 * BLOCK)
            end = min(start + size, BLOCK)
            parts.append(self._base[place + start : place + end])
            offset, size = offset + end - start, size - (end - start)
        return b"".join(parts)


@dataclass(frozen=True, slots=True)
class Case:
    """One transfer, in bytes."""

    number: int
    depth: int
    request: int
    file_offset: int
    buffer_offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Failure:
    """One transfer whose bytes were wrong."""

    direction: Direction
    route: Route
    case: Case
    offset: int
    """The file offset of the first wrong byte."""
    counts: dict[str, int]
    """Wrong bytes by kind."""


@dataclass(slots=True)
class Tally:
    """What one direction by one route came to."""

    direction: Direction
    route: Route
    transfers: int = 0
    nbytes: int = 0
    wrong: dict[Mismatch, int] = field(default_factory=dict)
    """Transfers with at least one byte of each kind."""
    failed: int = 0
    changed: int = 0
    """Transfers not judged: somebody else wrote to the place meanwhile."""
    unavailable: str | None = None
    """Why none was possible, where none was."""


@dataclass(slots=True)
class Report:
    """All of it."""

    seed: int
    exporter: str
    reference: str
    """How the known-good path read."""
    tallies: list[Tally]
    failures: list[Failure] = field(default_factory=list)

    @property
    def failed(self) -> int:
        """Transfers whose bytes were wrong."""
        return sum(tally.failed for tally in self.tallies)

    def tally(self, direction: Direction, route: Route) -> Tally:
        """The one of a direction and route."""
        return next(t for t in self.tallies if (t.direction, t.route) == (direction, route))


def cases(seed: int, start: int, size: int, rounds: int) -> Iterator[Case]:
    """Ranges within [start, start + size) of the file at and beside blocks, at every depth."""
    dice = random.Random(f"{seed}:cases")
    for number in range(rounds * len(DEPTHS)):
        depth = DEPTHS[number % len(DEPTHS)]
        request = REQUESTS[number // len(DEPTHS) % len(REQUESTS)]
        length = min(dice.choice([*_SIZES, dice.randint(1, SIZE)]), size)
        free = size - length
        place = dice.choice([0, free, dice.randint(0, free)]) // 4096 * 4096 + dice.choice(_EDGES)
        place = min(max(place, 0), free)
        if number % 2:  # agreeing modulo a page, so that something can go straight
            offset = (start + place) % 4096
        else:
            offset = max(0, dice.randint(0, 64) * 4096 + dice.choice(_EDGES))
        yield Case(number, depth, request, start + place, min(offset, SIZE - length), length)


def sweep(start: int, size: int, number: int) -> Iterator[Case]:
    """All of a range in order, the requests as large and as many as may be."""
    for done in range(0, size, SIZE):
        yield Case(number, 32, 1 << 20, start + done, 0, min(SIZE, size - done))
        number += 1


class Verifier:
    """Tests one target."""

    def __init__(
        self,
        path: str,
        reference: Reference,
        *,
        put: Callable[[int, bytes], None] | None,
        seed: int,
        exporter: str,
        routes: Sequence[Route],
        progress: Callable[[int, int], object],
    ) -> None:
        """`put` writes by the known-good path; None where nothing may be written."""
        self._path = path
        self._reference = reference
        self._put = put
        self._seed = seed
        self._patterns = Patterns(seed)
        self._exporter = exporter
        self._routes = routes
        self._progress = progress
        self._done = self._total = 0

    def run(self, start: int, size: int, rounds: int) -> Report:
        """Test the range [start, start + size) of the target.

        Raises:
            OSError: what the kernel refused; RouteUnavailable where the buffer cannot be compared.
        """
        directions: tuple[Direction, ...] = ("read", "write") if self._put else ("read",)
        swept = size if self._put else min(size, SWEPT)
        every = list(cases(self._seed, start, size, rounds))
        every += sweep(start, swept, len(every))
        self._total = sum(case.size for case in every) * len(directions) * len(self._routes)
        with exporters.allocate(SIZE, exporter=self._exporter) as buffer:
            if buffer._address is None:
                text = f"nothing can be compared: {buffer._map_refusal}"
                raise RouteUnavailable(text, self._path)
            tallies = [Tally(d, route) for d in directions for route in self._routes]
            report = Report(self._seed, buffer.exporter, self._reference.how, tallies)
            if self._put:
                self._fill(start, size)
            for direction in directions:
                for (depth, request), some in _grouped(every):
                    with (
                        Engine(queue_depth=depth, block_size=request) as engine,
                        File(self._path, "r+" if self._put else "r", engine=engine) as file,
                    ):
                        for case in some:
                            self._try(report, direction, case, file, buffer, (start, start + size))
        return report

    def _fill(self, start: int, size: int) -> None:
        """The pattern, by the known-good path."""
        assert self._put is not None
        for offset in range(start, start + size, BLOCK):
            self._put(offset, self._patterns.at("file", offset, min(BLOCK, start + size - offset)))

    def _try(
        self,
        report: Report,
        direction: Direction,
        case: Case,
        file: File,
        buffer: Buffer,
        bounds: tuple[int, int],
    ) -> None:
        for route in self._routes:
            tally = report.tally(direction, route)
            try:
                file.plan(
                    buffer,
                    direction,
                    size=case.size,
                    file_offset=case.file_offset,
                    buffer_offset=case.buffer_offset,
                    route=route,
                )
            except RouteUnavailable as refusal:
                if not tally.transfers:
                    tally.unavailable = refusal.reason.partition(f"{route}: ")[2]
            else:
                tally.unavailable = None
                move = self._read if direction == "read" else self._write
                findings = move(case, route, file, buffer, bounds)
                _enter(report, tally, case, findings)
            self._done += case.size
            self._progress(self._done, self._total)

    def _known(self, offset: int, size: int) -> bytes:
        parts = range(offset, offset + size, BLOCK)
        return b"".join(
            self._reference.read(part, min(BLOCK, offset + size - part)) for part in parts
        )

    def _read(
        self, case: Case, route: Route, file: File, buffer: Buffer, _bounds: tuple[int, int]
    ) -> Findings | None:
        wanted = self._known(case.file_offset, case.size)
        if self._put and wanted != self._patterns.at("file", case.file_offset, case.size):
            text = "the known-good path itself does not find what it wrote"
            raise IntegrityError(text, self._path)
        before = buffer.pread(case.size, case.buffer_offset)
        poison = self._patterns.at(f"{case.number}:{route}", 0, SIZE)
        buffer.pwrite(poison, 0)
        file.read_into(
            buffer,
            case.size,
            file_offset=case.file_offset,
            buffer_offset=case.buffer_offset,
            route=route,
            audit="off",
        )
        found = buffer.pread(SIZE, 0)
        end = case.buffer_offset + case.size
        findings = Findings()
        same = findings.add(
            case.file_offset,
            wanted,
            found[case.buffer_offset : end],
            poison[case.buffer_offset : end],
            before,
        )
        if not same and wanted != self._known(case.file_offset, case.size):
            return None  # somebody else wrote there
        _beside(findings, case.file_offset, poison, found, case.buffer_offset, end)
        return findings

    def _write(
        self, case: Case, route: Route, file: File, buffer: Buffer, bounds: tuple[int, int]
    ) -> Findings:
        assert self._put is not None
        first = max(bounds[0], case.file_offset - GUARD)
        last = min(bounds[1], case.file_offset + case.size + GUARD)
        poison = self._patterns.at(f"{case.number}:{route}:poison", first, last - first)
        content = self._patterns.at(f"{case.number}:{route}", 0, SIZE)
        before = self._known(case.file_offset, case.size)
        self._put(first, poison)
        buffer.pwrite(content, 0)
        file.write_from(
            buffer,
            case.size,
            file_offset=case.file_offset,
            buffer_offset=case.buffer_offset,
            route=route,
            audit="off",
        )
        self._reference.flush()
        found = self._known(first, last - first).ljust(last - first, b"\0")
        start = case.file_offset - first
        end = start + case.size
        findings = Findings()
        findings.add(
            case.file_offset,
            content[case.buffer_offset : case.buffer_offset + case.size],
            found[start:end],
            poison[start:end],
            before,
        )
        _beside(findings, case.file_offset, poison, found, start, end)
        if buffer.pread(SIZE, 0) != content:  # a write that changes what it reads from
            findings.count(Mismatch.OUTSIDE, 1, case.file_offset)
        return findings


def _grouped(every: Sequence[Case]) -> list[tuple[tuple[int, int], list[Case]]]:
    groups: dict[tuple[int, int], list[Case]] = {}
    for case in every:
        groups.setdefault((case.depth, case.request), []).append(case)
    return list(groups.items())


def _beside(
    findings: Findings, offset: int, held: bytes, found: bytes, start: int, end: int
) -> None:
    """Compare what is before `start` and after `end`: nobody had any business there."""
    for low, high in ((0, start), (end, len(held))):
        one, other = held[low:high], found[low:high]
        if one != other:
            at = low + first_difference(one, other)
            wrong = sum(a != b for a, b in zip(one, other, strict=True))
            findings.count(Mismatch.OUTSIDE, wrong, offset + at - start)


def _enter(report: Report, tally: Tally, case: Case, findings: Findings | None) -> None:
    if findings is None:
        tally.changed += 1
        return
    tally.transfers += 1
    tally.nbytes += case.size
    if findings.first is None:
        return
    tally.failed += 1
    for kind in findings.counts:
        tally.wrong[kind] = tally.wrong.get(kind, 0) + 1
    if len(report.failures) < _TOLD:
        counts = {kind.value: count for kind, count in findings.counts.items()}
        failure = Failure(tally.direction, tally.route, case, findings.first, counts)
        report.failures.append(failure)
