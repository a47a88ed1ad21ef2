"""The benchmark: every way between a file and a Buffer, measured side by side.

A machine with neighbours is never quiet. So in every round each way runs once, in random order, and
a way is compared with the baseline of the same round. Before the rounds every way moves every byte
once and is compared with plain pread: a way that does not work is not measured.
"""

from __future__ import annotations

import errno
import os
import platform
import random
import resource
import statistics
import tempfile
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from dmabuf import __version__
from dmabuf.errors import IntegrityError, RouteUnavailable, os_error
from dmabuf.inspect.bench_ways import TODAY, Place, Way, by_route, today
from dmabuf.inspect.doctor import filesystem
from dmabuf.inspect.page_cache import PageCache
from dmabuf.inspect.verify import Patterns, check_mappable, known_good
from dmabuf.kernel import files, nvme, proc
from dmabuf.memory import allocate
from dmabuf.sizes import format_size
from dmabuf.transfer import (
    BLOCK,
    Direction,
    Engine,
    File,
    Reference,
    Route,
    device_of,
    first_difference,
)

PERCENTILES = {"p50": 500, "p99": 990, "p99.9": 999, "p100": 1000}
"""The reported percentiles, in thousandths."""
BASELINE = next(iter(TODAY))

_PILOT_SECONDS = 0.04
_PILOT_RUNS = 2
"""Pilot runs of a way last so long, or are so many, until its speed is known well enough."""
_LATENCY_PART = 0.25
"""The part of a round's time for single calls."""
_MOST_CALLS = 2000
"""Single calls of a way in a round."""
_FILL_PART = 0.2
"""The part of the time for filling a scratch file."""
_FEWEST_ROUNDS = 3
"""Fewer rounds do not show how far they scatter."""
_OF_THE_MEDIUM = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Progress = Callable[[str, int, int | None], object]
Facts = dict[str, str | int | None]
"""What is stated by name: text, numbers, or None where it is unknown."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of one way."""

    seconds: float
    cpu: float
    """CPU seconds of the process and its children, user and system, io_uring workers included."""
    before: int
    """Cached pages of the range before the run."""
    after: int


@dataclass(slots=True)
class Row:
    """One way with one queue depth, and a sample for each round."""

    way: str
    depth: int
    registered: bool = False
    samples: list[Sample] = field(default_factory=list)

    @property
    def today(self) -> bool:
        """Whether people use this way today; false for a route."""
        return self.way in TODAY

    @property
    def label(self) -> str:
        """The name in tables and charts."""
        return self.way if self.today else f"{self.way} x{self.depth}"


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times as fast one way is as another, from runs of the same round."""

    median: float
    low: float
    high: float
    certain: bool
    """Whether this differs from 1 by more than the noise.

    True if there were at least three rounds, all agree on which way is faster, and the median
    differs from 1 by more than half of the range between the rounds.
    """


def ratio(values: Sequence[float]) -> Ratio:
    """Return the Ratio of the values of each round."""
    median, low, high = statistics.median(values), min(values), max(values)
    best, worst = (high, low) if median >= 1 else (1 / low, 1 / high)
    gain = max(median, 1 / median) - 1
    certain = len(values) >= _FEWEST_ROUNDS and worst > 1 and gain > (best - worst) / 2
    return Ratio(median, low, high, certain)


@dataclass(slots=True)
class Group:
    """What is compared with each other: one direction, one block size, the same bytes."""

    direction: Direction
    block: int
    nbytes: int = 0
    """Bytes of a run."""
    rows: list[Row] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    """Why a way is missing."""
    latencies: dict[str, array[float]] = field(default_factory=dict)
    """Seconds of single calls, one block each, by way."""

    @property
    def title(self) -> str:
        """A short description."""
        return f"{self.direction}, blocks of {format_size(self.block)}"

    def row(self, way: str) -> Row | None:
        """Return the row of a way with the most requests in flight."""
        rows = [row for row in self.rows if row.way == way]
        return max(rows, key=lambda row: row.depth, default=None)

    def speed(self, row: Row) -> float:
        """Return the bytes a second of the median run."""
        return self.nbytes / statistics.median(sample.seconds for sample in row.samples)

    def cpu(self, row: Row) -> float:
        """Return the CPU seconds for a GiB, as a median."""
        return statistics.median(sample.cpu for sample in row.samples) * (1 << 30) / self.nbytes

    def ratio(self, row: Row, way: str = BASELINE) -> Ratio | None:
        """Return how many times as fast a row is as another way; None without that way."""
        other = self.row(way)
        if other is None or other is row:
            return None
        pairs = zip(row.samples, other.samples, strict=True)
        return ratio([theirs.seconds / ours.seconds for ours, theirs in pairs])

    def percentiles(self, way: str) -> dict[str, float | None]:
        """Return the latency percentiles of a way, in seconds, by nearest rank.

        A percentile is None if there are too few calls to tell it from the slowest.
        """
        ordered = sorted(self.latencies.get(way, ()))
        found: dict[str, float | None] = {}
        for name, permille in PERCENTILES.items():
            rank = -(-len(ordered) * permille // 1000)
            known = ordered and (rank < len(ordered) or permille == 1000)
            found[name] = ordered[rank - 1] if known else None
        return found

    def headline(self) -> str | None:
        """Return a sentence that compares the best route with the baseline; None without routes."""
        rows = (self.row(route.value) for route in Route)
        row = next((row for row in rows if row is not None), None)
        figure = None if row is None else self.ratio(row)
        if row is None or figure is None:
            return None
        baseline = TODAY[BASELINE][self.direction == "write"]
        range_ = f"ratio {figure.low:.2f} to {figure.high:.2f} in {len(row.samples)} rounds"
        claim = f"{figure.median:.2f} times as fast as"
        if not figure.certain:
            claim = "not measurably faster or slower than"
        return (
            f"{self.direction} {format_size(self.block)}: {row.label} is {claim} {baseline} "
            f"({range_})"
        )


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a benchmark."""

    machine: Facts
    """CPU, memory, kernel and versions."""
    target: Facts
    """The measured range: its name, kind, filesystem, device, start and size in bytes."""
    buffer: Facts
    """The exporter, with its reason, and the page size if pages are huge."""
    groups: list[Group]
    rounds: int
    """Complete rounds."""
    warm: str | None
    """Why no run was cold, or None."""
    unseen: str | None
    """Why the page cache could not be examined, or None."""
    seconds: float

    @property
    def headlines(self) -> list[str]:
        """A sentence for each direction and block size, the largest blocks first."""
        order = sorted(self.groups, key=lambda group: (group.direction, -group.block))
        return [line for group in order if (line := group.headline())]

    def residency(self, row: Row, group: Group) -> float | None:
        """Return the part of a run's bytes that it left in the page cache; None if unknown."""
        if self.unseen:
            return None
        return max(sample.after for sample in row.samples) * files.PAGE / group.nbytes


def measure_routes(
    target: str | None = None,
    *,
    folder: str = ".",
    region: tuple[int, int] | None = None,
    size: int = 256 << 20,
    blocks: Sequence[int] = (4096, 1 << 20),
    depths: Sequence[int] = (1, 32),
    exporter: str = "auto",
    huge_pages: str | None = None,
    shuffled: bool = False,
    rounds: int = 5,
    seconds: float = 55,
    seed: int = 0,
    progress: Progress = lambda title, done, total: None,
) -> Result:
    """Measure every way between a file and a buffer.

    Args:
        target: a regular file or block device; without one, a scratch file is made in `folder`
            that has no name, so nothing of it can be left.
        folder: where to make the scratch file.
        region: offset and size of the part of `target` to overwrite; without it only reads.
        size: bytes of the scratch file and the buffer, at most.
        blocks: request sizes, in bytes, ascending multiples of 4096.
        depths: requests in flight, for our routes.
        exporter: what makes the buffer, as for `allocate`.
        huge_pages: the page size of the buffer, such as "2MiB".
        shuffled: visit the blocks in random order.
        rounds: runs of each way, at most.
        seconds: the time it may take, about; one round is always done.
        seed: determines order and patterns.
        progress: called with a title, the bytes measured and their sum.

    Raises:
        OSError: the target cannot be measured; nothing has been touched if that was known at once.
        IntegrityError: a way moved wrong bytes.
    """
    begun = time.monotonic()
    name = target or f"a scratch file in {folder}"
    with _named(name), ExitStack() as stack:
        if target is None:
            file = stack.enter_context(_scratch(folder, size))
        else:
            _check_kind(target)
            file = stack.enter_context(File(target, "r+" if region else "r"))
        start, size = _range(file, name, region, size, blocks, scratch=target is None)
        how = huge_pages or False
        buffer = stack.enter_context(allocate(size, exporter=exporter, huge_pages=how))
        check_mappable(buffer, name)
        if target is None:
            deadline = begun + _FILL_PART * seconds
            size = _fill(file, size, max(blocks), seed, deadline, progress)
        place = Place(file, buffer, name, start, size)
        about = {
            "name": name,
            "kind": file.kind,
            "filesystem": None if file.kind == "block device" else filesystem(target or folder),
            "device": _device(file.fileno()),
            "start": start,
            "size": size,
        }
        memory: dict[str, str | int | None] = {
            "exporter": buffer.exporter,
            "reason": buffer.reason,
            "huge_pages": huge_pages,
        }
        session = _Session(place, rounds, begun + seconds, seed, shuffled, progress)
        plans = session.plans(stack, blocks, depths)
        done = session.run(plans)
        groups, cache = [plan.group for plan in plans], session.cache
    spent = time.monotonic() - begun
    return Result(_machine(), about, memory, groups, done, cache.stays, cache.unseen, spent)


# -- the target


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Give errors the name of the target, if they name only its descriptor or nothing."""
    try:
        yield
    except OSError as error:
        unnamed = error.filename is None and error.errno in _OF_THE_MEDIUM
        if unnamed or str(error.filename).startswith("descriptor "):
            error.filename = name
        raise


@contextmanager
def _scratch(folder: str, size: int) -> Iterator[File]:
    """Make an empty file without a name, and check that there is room for `size` bytes."""
    try:
        scratch = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - with, below
    except OSError as error:
        text = f"a scratch file cannot be made there: {error.strerror}"
        raise os_error(error.errno or errno.EIO, text, folder) from None
    with scratch:
        room = os.fstatvfs(scratch.fileno())
        free, needed = room.f_bavail * room.f_frsize, size + size // 20  # and the filesystem's own
        if needed > free:
            text = (
                f"has {format_size(free)} free, and a scratch file of {format_size(size)} may take "
                f"{format_size(needed)}; give a smaller --size or another --dir"
            )
            raise os_error(errno.ENOSPC, text, folder)
        with File(scratch.fileno(), "r+") as file:
            yield file


def _fill(file: File, size: int, block: int, seed: int, deadline: float, progress: Progress) -> int:
    """Write random bytes until `size` or the deadline, one block at least; return their number."""
    patterns, done = Patterns(seed), 0
    while done < size and (done < block or time.monotonic() < deadline):
        data = memoryview(patterns.at("scratch", done, min(4 << 20, size - done)))
        while data:
            written = os.pwrite(file.fileno(), data, done)
            done += written
            data = data[written:]
        os.fdatasync(file.fileno())
        progress("filling the scratch file", done, size)
    return done // block * block


def _check_kind(target: str) -> None:
    """Refuse what has no page cache, before it is opened: a FIFO would wait for a writer."""
    status = os.stat(target)
    kind = files.kind_of(status.st_mode)
    if kind in (None, "file", "block device"):  # File refuses None, such as a directory
        return
    disk = nvme.disk_of(status.st_rdev) if nvme.is_namespace(status) else None
    fix = f"name /dev/{disk}, the same namespace" if disk else "name a file or block device"
    text = f"a {kind} has no page cache, which the ways of today need; {fix}"
    raise os_error(errno.ESPIPE, text, target)


def _range(
    file: File,
    name: str,
    region: tuple[int, int] | None,
    size: int,
    blocks: Sequence[int],
    *,
    scratch: bool,
) -> tuple[int, int]:
    """Return the offset and size of the range to measure."""
    most, there = max(blocks), file.size or 0
    if scratch:
        return 0, size // most * most
    if not there:
        raise os_error(errno.EINVAL, "is empty: there is nothing to read", name)
    start, length = region or (0, min(there, size))
    if start + length > there:
        text = f"the region ends at {start + length}, and the target at {there}"
        raise os_error(errno.ENOSPC, text, name)
    if start % files.PAGE:
        text = f"the region begins at {start}, which is not a multiple of {files.PAGE}"
        raise os_error(errno.EINVAL, text, name)
    if length < most:
        what = "the region" if region else "the target"
        fix = "give --block 4KiB" if length >= 4096 else "too small to be measured"
        text = f"{what} has {length} bytes, less than one block of {format_size(most)}; {fix}"
        raise os_error(errno.EINVAL, text, name)
    return start, length // most * most


def _machine() -> Facts:
    """Return the CPU, memory, kernel and versions."""
    cpu = platform.machine()  # ARM's /proc/cpuinfo names no model
    for line in proc.read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
    return {
        "cpu": cpu,
        "cpus": os.cpu_count(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "dmabuf": __version__,
        "python": platform.python_version(),
    }


def _device(fd: int) -> str | None:
    """Return the block device under a file, with its model; None without one."""
    place = device_of(fd)
    if not os.path.isdir(place):
        return None
    name, model = os.path.basename(place), proc.read(place, "device/model").strip()
    return f"{name} ({model})" if model else name


# -- the runs


@dataclass(slots=True)
class _Entry:
    row: Row
    way: Way
    speed: float = 0.0


@dataclass(slots=True)
class _Plan:
    group: Group
    entries: list[_Entry]
    segments: array[int] = field(default_factory=lambda: array("Q"))
    """What one run moves."""


class _Session:
    """One benchmark in progress."""

    def __init__(
        self,
        place: Place,
        rounds: int,
        deadline: float,
        seed: int,
        shuffled: bool,
        progress: Progress,
    ) -> None:
        self._place = place
        self._rounds = rounds
        self._deadline = deadline
        self._seed = seed
        self._shuffled = shuffled
        self._progress = progress
        self._lot = random.Random(seed)
        self._patterns = Patterns(seed)
        self.cache = PageCache(place.file.fileno(), place.start, place.size, place.name)
        self._share = 0.0
        self._done = self._total = 0

    def plans(self, stack: ExitStack, blocks: Sequence[int], depths: Sequence[int]) -> list[_Plan]:
        """Collect the ways of each direction and block size; `stack` closes them."""
        directions: tuple[Direction, ...] = ("read",)
        if self._place.file.writable():
            directions = ("read", "write")
        engines = {
            (depth, block): stack.enter_context(Engine(queue_depth=depth, block_size=block))
            for depth in depths
            for block in blocks
        }
        plans = []
        for direction in directions:
            for block in blocks:
                group, entries = Group(direction, block), []
                for depth in depths:
                    engine = engines[depth, block]
                    ways, refused = by_route(self._place, direction, block, engine)
                    group.refused |= refused
                    entries += self._entries(stack, ways, depth)
                entries.sort(key=lambda entry: list(Route).index(Route(entry.row.way)))
                ways, refused = today(self._place, direction, block)
                group.refused |= refused
                entries += self._entries(stack, ways, 1)
                plans.append(_Plan(group, entries))
        return plans

    def _entries(self, stack: ExitStack, ways: Iterable[Way], depth: int) -> list[_Entry]:
        entries = []
        for way in ways:
            stack.callback(way.close)
            entries.append(_Entry(Row(way.name, depth), way))
        return entries

    def run(self, plans: Sequence[_Plan]) -> int:
        """Try, compare and measure every way; return the number of rounds."""
        self.cache.drop(dirty=True)
        for plan in plans:
            self._try_each(plan)
            plan.group.nbytes = self._place.size
        self._share_time(plans, self._rounds + 2)  # comparing costs about as much as two rounds
        with known_good(self._place.file) as reference:
            for plan in plans:
                self._compare_each(plan, reference)
        self._share_time(plans, self._rounds)
        longest = 0.0
        for number in range(self._rounds):
            begun = time.monotonic()
            if number and begun + longest > self._deadline:
                return number
            for plan in self._lot.sample(plans, len(plans)):
                self._round(plan, f"round {number + 1} of {self._rounds}: {plan.group.title}")
            longest = max(longest, time.monotonic() - begun)
        return self._rounds

    def _try_each(self, plan: _Plan) -> None:
        """Estimate the speed of each way, and drop the ways that turn out to be unavailable."""
        group, possible = plan.group, []
        for entry in plan.entries:
            self._progress(f"trying {group.title}, {entry.row.label}", 0, None)
            try:
                after = self._find_speed(plan, entry)
            except RouteUnavailable as refusal:
                group.refused[entry.row.way] = refusal.reason
                continue
            possible.append(entry)
            if not after and (group.direction, entry.row.way) == ("read", BASELINE):
                nothing = "the kernel reports no page of it after a buffered read"
                self.cache.unseen = self.cache.unseen or nothing
        plan.entries = possible
        group.rows = [entry.row for entry in possible]
        group.latencies = {row.way: array("d") for row in group.rows}

    def _find_speed(self, plan: _Plan, entry: _Entry) -> int:
        """Estimate a way's speed; return the pages that it left in the cache."""
        count, most = 1, self._place.size // plan.group.block
        spent, runs = 0.0, 0
        while True:
            self._set_count(plan, count)
            sample = self._measure(plan, entry)
            spent, runs = spent + sample.seconds, runs + 1
            # The best counts: a hiccup of the machine in a small run says nothing about the way.
            entry.speed = max(entry.speed, plan.group.nbytes / max(sample.seconds, 1e-6))
            if runs >= _PILOT_RUNS and (spent >= _PILOT_SECONDS or count == most):
                return sample.after
            if spent < _PILOT_SECONDS:
                count = min(4 * count, most)

    def _share_time(self, plans: Sequence[_Plan], rounds: int) -> None:
        """Reduce the bytes of a run so that so many rounds end in time."""
        self._share = max(0.0, self._deadline - time.monotonic()) / len(plans) / rounds
        self._total = 0
        for plan in plans:
            group = plan.group
            cost = sum(1 / entry.speed for entry in plan.entries)
            possible = int(self._share * (1 - _LATENCY_PART) / cost)
            self._set_count(plan, max(1, min(possible, group.nbytes) // group.block))
            self._total += group.nbytes * len(plan.entries) * self._rounds

    def _set_count(self, plan: _Plan, count: int) -> None:
        plan.group.nbytes = count * plan.group.block
        plan.segments = self._segments(plan.group.block, count)

    def _segments(self, block: int, count: int) -> array[int]:
        """Return the first blocks of the range, in order or shuffled."""
        places = list(range(count))
        if self._shuffled:
            random.Random(f"{self._seed}:{block}").shuffle(places)
        segments = array("Q")
        for place in places:
            segments.extend((self._place.start + place * block, place * block, block))
        return segments

    def _measure(self, plan: _Plan, entry: _Entry) -> Sample:
        before = self.cache.drop(dirty=plan.group.direction == "write")
        with entry.way.prepared():
            cpu, begun = _cpu_seconds(), time.perf_counter()
            entry.way.run(plan.segments)
            seconds, cpu = time.perf_counter() - begun, _cpu_seconds() - cpu
        return Sample(seconds, cpu, before, self.cache.pages(plan.group.nbytes))

    def _compare_each(self, plan: _Plan, reference: Reference) -> None:
        """Move all bytes of a run by each way, and compare them with the reference."""
        group, buffer = plan.group, self._place.buffer
        pieces = [
            (self._place.start + at, at, min(BLOCK, group.nbytes - at))
            for at in range(0, group.nbytes, BLOCK)
        ]
        reads = group.direction == "read"
        wanted = [reference.read(offset, size) for offset, _, size in pieces] if reads else []
        for number, entry in enumerate(plan.entries):
            self._progress(f"comparing {group.title}, {entry.row.label}", 0, None)
            name = f"{group.title}:{number}"  # of the poison of a read, or the content of a write
            patterns = [self._patterns.at(name, offset, size) for offset, _, size in pieces]
            for (_, at, _), data in zip(pieces, patterns, strict=True):
                buffer.pwrite(data, at)
            sample = self._measure(plan, entry)
            entry.speed = group.nbytes / max(sample.seconds, 1e-6)
            if not reads:
                self.cache.drop(dirty=True)
            for (offset, at, size), expected in zip(pieces, wanted or patterns, strict=True):
                found = buffer.pread(size, at) if reads else reference.read(offset, size)
                self._check(entry, offset, found, expected)

    def _check(self, entry: _Entry, offset: int, found: bytes, expected: bytes) -> None:
        if found == expected:
            return
        at = offset + first_difference(found.ljust(len(expected), b"\0"), expected)
        text = (
            f"{entry.row.label} moved wrong bytes, the first at offset {at}: the way does not work "
            "or another program wrote; see dmabuf verify"
        )
        raise IntegrityError(text, self._place.name, offset=at)

    def _round(self, plan: _Plan, title: str) -> None:
        """Run each way once, and time single calls."""
        group = plan.group
        for entry in self._lot.sample(plan.entries, len(plan.entries)):
            self._progress(f"{title}, {entry.row.label}", self._done, self._total)
            entry.row.samples.append(self._measure(plan, entry))
            entry.row.registered = entry.way.registered
            self._done += group.nbytes
        ways = {entry.way.name: entry.way for entry in reversed(plan.entries)}
        segments = self._segments(group.block, min(_MOST_CALLS, self._place.size // group.block))
        most = self._share * _LATENCY_PART / len(ways)
        for name in self._lot.sample(sorted(ways), len(ways)):
            self.cache.drop(dirty=group.direction == "write")
            with ways[name].prepared(), ways[name].one() as one:
                group.latencies[name].extend(_time_calls(one, segments, most))


def _time_calls(
    one: Callable[[int, int], object], segments: array[int], most: float
) -> Iterator[float]:
    """Yield the seconds of at least one call, and of no more calls after `most` seconds."""
    end = time.perf_counter() + most
    for i in range(0, len(segments), 3):
        begun = time.perf_counter()
        one(segments[i], segments[i + 1])
        now = time.perf_counter()
        yield now - begun
        if now > end:
            return


def _cpu_seconds() -> float:
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
