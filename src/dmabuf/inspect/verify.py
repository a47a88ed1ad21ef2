"""Tests whether bytes arrive: every route, one direction at a time, every byte compared.

For people who test kernels, drivers and peer-to-peer hardware. Before each transfer the destination
is poisoned, beyond both ends of the range too. Afterwards all of it is compared with plain pread
and pwrite, past the page cache where the target allows that. A seed determines every choice.
"""

from __future__ import annotations

import errno
import io
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from dmabuf.errors import IntegrityError, RouteUnavailable, os_error
from dmabuf.kernel import files, nvme
from dmabuf.memory import Buffer, allocate
from dmabuf.transfer import (
    BLOCK,
    Direction,
    Engine,
    File,
    Findings,
    Mismatch,
    NamespaceReference,
    Reference,
    Route,
    first_difference,
    open_reference,
)

_DEPTHS = (1, 2, 4, 8, 16, 32, 64)
_REQUESTS = (4096, 16384, 131072, 1 << 20)
_BUFFER = 2 << 20
_SWEPT = 64 << 20  # bytes that are read in order where nothing may be written
_GUARD = 8192  # bytes beside a range that are poisoned and compared too
_SAMPLE = 32  # bytes beside a range that are looked for within it
_MOST_FAILURES = 20
_NEAR = (0, 0, 0, 4, 64, 512, 4096, -512, -4, 1, -1)  # distances from a page boundary
_SIZES = (4096, 512, 8192, 65536, 1 << 20, 511, 513, 4095, 4097, 65537)


class Patterns:
    """Endless byte patterns that follow from a seed and differ from their own shifts."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._base = random.Random(seed).randbytes(4 * BLOCK)

    def at(self, name: str, offset: int, size: int) -> bytes:
        """Return `size` bytes of the pattern `name`, from `offset` on."""
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
    """One transfer: a range, a queue depth and a request size. Sizes and offsets are in bytes."""

    number: int
    depth: int
    request: int
    file_offset: int
    buffer_offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Failure:
    """A transfer with wrong bytes."""

    direction: Direction
    route: Route
    case: Case
    offset: int
    """The file offset of the first wrong byte."""
    counts: dict[str, int]
    """The number of wrong bytes of each kind."""
    runs: list[str]
    """The first places with wrong bytes of one kind, such as `512 bytes unchanged at 4096`."""


@dataclass(slots=True)
class Tally:
    """The results of one direction by one route."""

    direction: Direction
    route: Route
    transfers: int = 0
    nbytes: int = 0
    failed: int = 0
    """The number of transfers with wrong bytes."""
    mismatches: dict[Mismatch, int] = field(default_factory=lambda: dict.fromkeys(Mismatch, 0))
    """The number of transfers with at least one wrong byte of each kind."""
    changed: int = 0
    """Transfers without a verdict, because another program wrote to the range meanwhile."""
    unavailable: str | None = None
    """Why no transfer was possible."""


@dataclass(slots=True)
class Report:
    """The result of `verify_routes`."""

    seed: int
    rounds: int
    region: tuple[int, int] | None
    exporter: str
    reference: str
    """How the reference was read."""
    results: list[Tally]
    failures: list[Failure] = field(default_factory=list)
    """The first failures, at most 20."""

    @property
    def failed(self) -> int:
        """The number of transfers with wrong bytes."""
        return sum(tally.failed for tally in self.results)


def verify_routes(
    path: str,
    *,
    region: tuple[int, int] | None = None,
    exporter: str = "auto",
    routes: Sequence[Route] = tuple(Route),
    seed: int = 0,
    rounds: int = 16,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Report:
    """Transfer ranges of `path` by each route and compare every byte.

    Args:
        path: a regular file, block device or NVMe namespace.
        region: offset and size, in bytes, of the part to overwrite; without it only reads are
            tested and nothing is written.
        exporter: what makes the buffer, as for `allocate`.
        routes: the routes to test.
        seed: determines ranges, patterns and order.
        rounds: ranges for each of seven queue depths.
        progress: called with the bytes tested and their sum.

    Raises:
        RouteUnavailable: no route could be tested.
        OSError: the target cannot be tested; nothing has been written if that was known at once.
    """
    with File(path, "r+" if region else "r") as file:
        start, size = _bounds(file, path, region)
        with (
            known_good(file) as reference,
            allocate(_BUFFER, exporter=exporter) as buffer,
        ):
            check_mappable(buffer, path)
            directions: tuple[Direction, ...] = ("read", "write") if region else ("read",)
            tallies = [Tally(direction, route) for direction in directions for route in routes]
            how = reference.how
            report = Report(seed, rounds, region, buffer.exporter, how, tallies)
            verifier = _Verifier(path, file, reference, buffer, report, progress)
            verifier.run(start, size)
    if not any(tally.transfers + tally.changed for tally in report.results):
        why = "; ".join(f"{tally.route}: {tally.unavailable}" for tally in report.results)
        raise RouteUnavailable(f"nothing could be tested: {why}", path)
    return report


def _bounds(file: File, path: str, region: tuple[int, int] | None) -> tuple[int, int]:
    """Return the offset and size of the range to test."""
    size = file.size
    if size is None:
        text = f"verify: a {file.kind} cannot be read twice; name a file or block device"
        raise os_error(errno.ESPIPE, text, path)
    if region is not None and file.kind == "NVMe character device":
        disk = nvme.disk_of(os.fstat(file.fileno()).st_rdev)
        text = "verify: an NVMe character device takes only writes of whole blocks; "
        text += f"name /dev/{disk}" if disk else "leave out --destroy"
        raise os_error(errno.EOPNOTSUPP, text, path)
    if region is None:
        if not size:
            raise os_error(errno.EINVAL, "is empty: there is nothing to read", path)
        return 0, size
    if sum(region) > size:
        text = f"the region ends at {sum(region)}, and the target at {size}"
        raise os_error(errno.ENOSPC, text, path)
    return region


@contextmanager
def known_good(file: File) -> Iterator[Reference]:
    """Open the bytes of a file for reading by plain pread, past the page cache if possible."""
    fd = file.fileno()
    kind = files.kind_of(os.fstat(fd).st_mode)
    namespace = nvme.namespace(fd, str(file.name)) if kind == "character device" else None
    if namespace is not None:
        reference = NamespaceReference(fd, namespace, str(file.name))
        try:
            yield reference
        finally:
            reference.close()
        return
    assert kind is not None
    direct = files.open_direct(fd, kind, writable=False, readable=True)
    if direct.refusal is None:
        os.close(direct.fd)
    with open_reference(fd, direct.refusal) as plain:
        yield plain


def check_mappable(buffer: Buffer, path: str) -> None:
    """Raise RouteUnavailable if the CPU cannot map the buffer, so cannot compare its bytes."""
    try:
        with buffer.map("r"):
            pass
    except io.UnsupportedOperation as refusal:
        raise RouteUnavailable(f"nothing can be compared: {refusal}", path) from None


def _cases(seed: int, start: int, size: int, rounds: int) -> Iterator[Case]:
    """Yield ranges within [start, start + size) at and beside blocks, at every queue depth."""
    dice = random.Random(f"{seed}:cases")
    for number in range(rounds * len(_DEPTHS)):
        depth = _DEPTHS[number % len(_DEPTHS)]
        request = _REQUESTS[number // len(_DEPTHS) % len(_REQUESTS)]
        length = min(dice.choice([*_SIZES, dice.randint(1, _BUFFER)]), size)
        free = size - length
        place = dice.choice([0, free, dice.randint(0, free)]) // 4096 * 4096 + dice.choice(_NEAR)
        place = min(max(place, 0), free)
        if number % 2:  # equal modulo a page, so that a part can go straight
            offset = (start + place) % 4096
        else:
            offset = max(0, dice.randint(0, 64) * 4096 + dice.choice(_NEAR))
        yield Case(number, depth, request, start + place, min(offset, _BUFFER - length), length)


def _sweep(start: int, size: int, number: int) -> Iterator[Case]:
    """Yield the whole range in order, in large requests."""
    for done in range(0, size, _BUFFER):
        yield Case(number, 32, 1 << 20, start + done, 0, min(_BUFFER, size - done))
        number += 1


class _Verifier:
    """One verification in progress."""

    def __init__(
        self,
        path: str,
        file: File,
        reference: Reference,
        buffer: Buffer,
        report: Report,
        progress: Callable[[int, int], object],
    ) -> None:
        self._path = path
        self._fd = file.fileno()
        self._reference = reference
        self._buffer = buffer
        self._report = report
        self._patterns = Patterns(report.seed)
        self._writes = report.region is not None
        self._progress = progress
        self._start = self._end = self._done = self._total = 0

    def run(self, start: int, size: int) -> None:
        """Test the range [start, start + size)."""
        self._start, self._end = start, start + size
        cases = list(_cases(self._report.seed, start, size, self._report.rounds))
        cases += _sweep(start, size if self._writes else min(size, _SWEPT), len(cases))
        self._total = sum(case.size for case in cases) * len(self._report.results)
        if self._writes:
            for offset in range(start, self._end, BLOCK):
                part = min(BLOCK, self._end - offset)
                self._put(offset, self._patterns.at("file", offset, part))
        groups: dict[tuple[int, int], list[Case]] = {}
        for case in cases:
            groups.setdefault((case.depth, case.request), []).append(case)
        directions = dict.fromkeys(tally.direction for tally in self._report.results)
        for direction in directions:
            for (depth, request), group in groups.items():
                with (
                    Engine(queue_depth=depth, block_size=request) as engine,
                    File(self._path, "r+" if self._writes else "r", engine=engine) as file,
                ):
                    for case in group:
                        self._try(direction, case, file)

    def _put(self, offset: int, data: bytes) -> None:
        """Write by plain pwrite, flush, and drop the range from the page cache."""
        done = 0
        while done < len(data):
            done += os.pwrite(self._fd, memoryview(data)[done:], offset + done)
        os.fdatasync(self._fd)
        os.posix_fadvise(self._fd, offset, len(data), os.POSIX_FADV_DONTNEED)

    def _known(self, offset: int, size: int) -> bytes:
        """Read from the reference."""
        parts = range(offset, offset + size, BLOCK)
        return b"".join(
            self._reference.read(part, min(BLOCK, offset + size - part)) for part in parts
        )

    def _try(self, direction: Direction, case: Case, file: File) -> None:
        """Test one range by each route."""
        for tally in self._report.results:
            if tally.direction != direction:
                continue
            try:
                file.plan(
                    self._buffer,
                    direction,
                    size=case.size,
                    file_offset=case.file_offset,
                    buffer_offset=case.buffer_offset,
                    route=tally.route,
                )
            except RouteUnavailable as refusal:
                if not tally.transfers:
                    reason = refusal.reason.partition(f"{tally.route}: ")[2]
                    tally.unavailable = reason or refusal.reason
            else:
                tally.unavailable = None
                move = self._read if direction == "read" else self._write
                self._enter(tally, case, move(case, tally.route, file))
            self._done += case.size
            self._progress(self._done, self._total)

    def _read(self, case: Case, route: Route, file: File) -> Findings | None:
        wanted = self._known(case.file_offset, case.size)
        if self._writes and wanted != self._patterns.at("file", case.file_offset, case.size):
            text = "plain pread does not return what plain pwrite wrote"
            raise IntegrityError(text, self._path)
        start, end = case.buffer_offset, case.buffer_offset + case.size
        before = self._buffer.pread(case.size, start)
        poison = self._patterns.at(f"{case.number}:{route}", 0, _BUFFER)
        self._buffer.pwrite(poison, 0)
        file.read_into(
            self._buffer,
            case.size,
            file_offset=case.file_offset,
            buffer_offset=start,
            route=route,
            audit="off",
        )
        found = self._buffer.pread(_BUFFER, 0)
        findings = Findings()
        same = findings.add(case.file_offset, wanted, found[start:end], poison[start:end], before)
        if not same and wanted != self._known(case.file_offset, case.size):
            return None  # another program wrote to the range
        _compare_beside(findings, case.file_offset, poison, found, start, end, wanted)
        return findings

    def _write(self, case: Case, route: Route, file: File) -> Findings:
        first = max(self._start, case.file_offset - _GUARD)
        last = min(self._end, case.file_offset + case.size + _GUARD)
        poison = self._patterns.at(f"{case.number}:{route}:poison", first, last - first)
        content = self._patterns.at(f"{case.number}:{route}", 0, _BUFFER)
        before = self._known(case.file_offset, case.size)
        self._put(first, poison)
        self._buffer.pwrite(content, 0)
        file.write_from(
            self._buffer,
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
        wanted = content[case.buffer_offset : case.buffer_offset + case.size]
        findings.add(
            case.file_offset,
            wanted,
            found[start:end],
            poison[start:end],
            before,
        )
        _compare_beside(findings, case.file_offset, poison, found, start, end, wanted)
        if self._buffer.pread(_BUFFER, 0) != content:  # a write must not change its source
            findings.count(Mismatch.OUTSIDE, 1, case.file_offset)
        return findings

    def _enter(self, tally: Tally, case: Case, findings: Findings | None) -> None:
        """Add a result to the report."""
        if findings is None:
            tally.changed += 1
            return
        tally.transfers += 1
        tally.nbytes += case.size
        if findings.first is None:
            return
        tally.failed += 1
        for kind in findings.counts:
            tally.mismatches[kind] += 1
        if len(self._report.failures) < _MOST_FAILURES:
            counts = {kind.value: count for kind, count in findings.counts.items()}
            runs = [str(run) for run in findings.runs]
            failure = Failure(tally.direction, tally.route, case, findings.first, counts, runs)
            self._report.failures.append(failure)


def _compare_beside(
    findings: Findings,
    offset: int,
    held: bytes,
    found: bytes,
    start: int,
    end: int,
    moved: bytes,
) -> None:
    """Compare the bytes before `start` and after `end`, which must be unchanged.

    Where they are now bytes that were `moved`, these went to the wrong place.
    """
    for low, high in ((0, start), (end, len(held))):
        one, other = held[low:high], found[low:high]
        if one != other:
            first = first_difference(one, other)
            wrong = sum(a != b for a, b in zip(one, other, strict=True))
            part = other[first:][:_SAMPLE]
            strayed = len(set(part)) >= _SAMPLE // 2 and part in moved
            kind = Mismatch.MISDIRECTED if strayed else Mismatch.OUTSIDE
            findings.count(kind, wrong, offset + low + first - start)


def reproducer(path: str, report: Report, failure: Failure) -> str:
    """Return a Python script that repeats a transfer until bytes are wrong, and prints where.

    For a write it overwrites the range of that transfer.
    """
    case, write = failure.case, failure.direction == "write"
    verb, mode = ("write_from", "r+") if write else ("read_into", "r")
    return f"""\
# A {failure.direction} by the {failure.route} route with wrong bytes, found by `dmabuf verify`.
import random
import dmabuf
size, file_offset, buffer_offset = {case.size}, {case.file_offset}, {case.buffer_offset}
with (
    dmabuf.Engine(queue_depth={case.depth}, block_size={case.request}) as engine,
    dmabuf.open({path!r}, {mode!r}, engine=engine) as file,
    dmabuf.allocate({_BUFFER}, exporter={report.exporter!r}) as buffer,
):
    for attempt in range(1000):
        content = random.Random(attempt).randbytes(buffer.size)
        buffer.pwrite(content, 0)
        try:
            file.{verb}(
                buffer, size, file_offset=file_offset, buffer_offset=buffer_offset,
                route={str(failure.route)!r}, audit="always",
            )
        except dmabuf.IntegrityError as error:
            raise SystemExit(f"attempt {{attempt}}: {{error}}\\n{{error.report}}")
        found = bytearray(buffer.pread(buffer.size, 0))
        found[buffer_offset : buffer_offset + size] = content[buffer_offset : buffer_offset + size]
        if found != content:
            raise SystemExit(f"attempt {{attempt}}: bytes of the buffer beside the range changed")
print("1000 transfers without a wrong byte")
"""
