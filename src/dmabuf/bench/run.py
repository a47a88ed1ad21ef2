"""The runs: interleaved rounds within a bound of time, every byte compared once before them.

A machine with neighbours is never quiet, so nothing is measured in one go: in every round every
way runs once, in an order drawn by lot, and a way's time is compared with the times of the others
in the same round.
"""

from __future__ import annotations

import random
import resource
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from dmabuf import facts
from dmabuf.bench.cache import PageCache
from dmabuf.bench.figures import Group, Row, Sample
from dmabuf.bench.ways import ByRoute, Place, Timed, Way, by_route, today
from dmabuf.compare import first_difference
from dmabuf.errors import IntegrityError, RouteUnavailable
from dmabuf.file import File
from dmabuf.reference import BLOCK, Reference
from dmabuf.route import Direction, Route
from dmabuf.verify import Patterns

_PILOT_SECONDS = 0.04
_PILOT_RUNS = 2
"""First runs that come to as much, and are as many, tell a way's speed well enough to plan with."""
_LATENCY_PART = 0.25
"""Of a round's time, for single calls."""
_MOST_CALLS = 2000
"""Single calls of a way in a round."""
_MOST_KEPT = 100_000
"""Latencies of requests that are kept of a run, evenly spread."""

Clock = Callable[[], float]
Progress = Callable[[str, int, int], object]


@dataclass(frozen=True, slots=True)
class Setting:
    """What is measured."""

    directions: tuple[Direction, ...]
    blocks: tuple[int, ...]
    depths: tuple[int, ...]
    rounds: int
    deadline: float
    """When to end, by time.monotonic; one round is always done."""
    seed: int = 0
    shuffled: bool = False
    """Whether the blocks are visited in random order."""


@dataclass(slots=True)
class Measured:
    """All that was found."""

    groups: list[Group]
    rounds: int
    """Whole rounds."""
    warm: str | None
    """Why no run was a cold one, where that is so."""
    unseen: str | None = None
    """Why nothing is known of what is in the page cache, where that is so."""


@dataclass(slots=True)
class _Entry:
    row: Row
    way: Way
    speed: float = 0.0


@dataclass(slots=True)
class _Plan:
    group: Group
    entries: list[_Entry] = field(default_factory=list)
    segments: array[int] = field(default_factory=lambda: array("Q"))
    """What a run moves."""


class Bench:
    """Measures one target and one buffer."""

    def __init__(
        self, place: Place, setting: Setting, progress: Progress, clock: Clock = time.monotonic
    ) -> None:
        self._place = place
        self._setting = setting
        self._progress = progress
        self._clock = clock
        self._lot = random.Random(setting.seed)
        self._patterns = Patterns(setting.seed)
        self._cache = PageCache(place.file.fileno(), place.start, place.size, place.path)
        self._cache.stays = why_warm(place.file)
        self._done = self._total = 0

    def run(self) -> Measured:
        """All of it.

        Raises:
            OSError: what the kernel refused; IntegrityError where a way moved the wrong bytes.
        """
        self._cache.drop(dirty=True)
        with ExitStack() as stack:
            plans = self._plans(stack)
            self._try_each(plans)
            for plan in plans:
                plan.group.nbytes = self._place.size
            # The warm-up poisons, moves and compares: as much as two rounds.
            self._share_time(plans, self._setting.rounds + 2)
            with self._place.file._target.reference() as reference:
                for plan in plans:
                    self._warm_up(plan, reference)
            self._share_time(plans, self._setting.rounds)
            rounds = self._rounds(plans)
        groups = [plan.group for plan in plans]
        return Measured(groups, rounds, self._cache.stays, self._cache.unseen)

    # -- before

    def _plans(self, stack: ExitStack) -> list[_Plan]:
        setting, place = self._setting, self._place
        engines = {
            (depth, block): stack.enter_context(Timed(queue_depth=depth, block_size=block))
            for depth in setting.depths
            for block in setting.blocks
        }
        plans = []
        for direction in setting.directions:
            for block in setting.blocks:
                plan = _Plan(Group(direction, block))
                for depth in setting.depths:
                    ways, refused = by_route(place, direction, block, engines[depth, block])
                    self._enter(stack, plan, ways, depth)
                    plan.group.refused |= refused
                plan.entries.sort(key=lambda entry: list(Route).index(Route(entry.row.way)))
                usual, refused = today(place, direction, block)
                self._enter(stack, plan, usual, 1)
                plan.group.refused |= refused
                plans.append(plan)
        return plans

    def _enter(self, stack: ExitStack, plan: _Plan, ways: Sequence[Way], depth: int) -> None:
        for way in ways:
            stack.callback(way.close)
            plan.entries.append(_Entry(Row(way.name, depth), way))

    def _try_each(self, plans: Sequence[_Plan]) -> None:
        """How fast each way is, about, and whether it is one at all."""
        for plan in plans:
            group, possible = plan.group, []
            for entry in plan.entries:
                self._progress(f"trying {group.title}, {entry.row.label}", 0, 0)
                try:
                    after = self._find_speed(plan, entry)
                except RouteUnavailable as refusal:
                    group.refused[entry.row.way] = refusal.reason
                    continue
                possible.append(entry)
                if not after and (group.direction, entry.row.way) == ("read", "copy"):
                    nothing = "the kernel shows no page of it after a buffered read"
                    self._cache.unseen = self._cache.unseen or nothing
            plan.entries = possible
            group.rows = [entry.row for entry in possible]

    def _find_speed(self, plan: _Plan, entry: _Entry) -> int:
        group = plan.group
        count, most = 1, self._place.size // group.block
        spent, runs = 0.0, 0
        while True:
            self._set_count(plan, count)
            sample = self._measure(plan, entry)
            spent, runs = spent + sample.seconds, runs + 1
            # The best of all: a machine's hiccup in a small one says nothing about the speed.
            entry.speed = max(entry.speed, group.nbytes / max(sample.seconds, 1e-6))
            if runs >= _PILOT_RUNS and (spent >= _PILOT_SECONDS or count == most):
                return sample.after
            if spent < _PILOT_SECONDS:
                count = min(4 * count, most)

    def _share_time(self, plans: Sequence[_Plan], rounds: int) -> None:
        """Cut down the bytes that a run moves, so that as many rounds end in time."""
        left = max(0.0, self._setting.deadline - self._clock())
        self._share = left / len(plans) / rounds
        self._total = 0
        for plan in plans:
            group = plan.group
            cost = sum(1 / entry.speed for entry in plan.entries)
            possible = int(self._share * (1 - _LATENCY_PART) / cost)
            self._set_count(plan, max(1, min(possible, group.nbytes) // group.block))
            self._total += group.nbytes * len(plan.entries) * self._setting.rounds

    def _set_count(self, plan: _Plan, count: int) -> None:
        """Have a run move so many blocks."""
        plan.group.nbytes = count * plan.group.block
        plan.segments = self._segments(plan.group.block, count)

    def _segments(self, block: int, count: int) -> array[int]:
        """The first blocks of the range, in order or shuffled."""
        places = list(range(count))
        if self._setting.shuffled:
            random.Random(f"{self._setting.seed}:{block}").shuffle(places)
        segments = array("Q")
        for place in places:
            segments.extend((self._place.start + place * block, place * block, block))
        return segments

    # -- every byte, once

    def _warm_up(self, plan: _Plan, reference: Reference) -> None:
        group = plan.group
        wanted: list[bytes] = []
        if group.direction == "read":
            wanted = [reference.read(offset, size) for offset, _, size in self._pieces(group)]
        for number, entry in enumerate(plan.entries):
            self._progress(f"comparing {group.title}, {entry.row.label}", 0, 0)
            name = f"{group.title}:{number}"
            for offset, at, size in self._pieces(group):  # poison of a read, content of a write
                self._place.buffer.pwrite(self._patterns.at(name, offset, size), at)
            sample = self._measure(plan, entry)
            entry.speed = group.nbytes / max(sample.seconds, 1e-6)  # better known than before
            if group.direction == "read":
                self._compare_read(entry, group, wanted)
            else:
                self._compare_write(entry, group, name, reference)

    def _compare_read(self, entry: _Entry, group: Group, wanted: Sequence[bytes]) -> None:
        for (offset, at, size), expected in zip(self._pieces(group), wanted, strict=True):
            self._check(entry, offset, self._place.buffer.pread(size, at), expected)

    def _compare_write(self, entry: _Entry, group: Group, name: str, reference: Reference) -> None:
        self._cache.drop(dirty=True)
        for offset, _, size in self._pieces(group):
            expected = self._patterns.at(name, offset, size)
            self._check(entry, offset, reference.read(offset, size), expected)

    def _pieces(self, group: Group) -> Iterator[tuple[int, int, int]]:
        """File offset, buffer offset and size of what is compared at once."""
        for at in range(0, group.nbytes, BLOCK):
            yield self._place.start + at, at, min(BLOCK, group.nbytes - at)

    def _check(self, entry: _Entry, offset: int, found: bytes, expected: bytes) -> None:
        if found == expected:
            return
        at = offset + first_difference(found.ljust(len(expected), b"\0"), expected)
        text = (
            f"{entry.row.label} moved the wrong bytes, the first at offset {at}: a way that does "
            "not work is not measured (`dmabuf verify` tells more; or was it written to meanwhile?)"
        )
        raise IntegrityError(text, self._place.path, offset=at)

    # -- the rounds

    def _rounds(self, plans: Sequence[_Plan]) -> int:
        setting = self._setting
        longest = 0.0
        for number in range(setting.rounds):
            begun = self._clock()
            if number and begun + longest > setting.deadline:
                return number
            for plan in self._lot.sample(plans, len(plans)):
                title = f"round {number + 1} of {setting.rounds}: {plan.group.title}"
                self._round(plan, title)
                self._single_calls(plan)
            longest = max(longest, self._clock() - begun)
        return setting.rounds

    def _round(self, plan: _Plan, title: str) -> None:
        group = plan.group
        for entry in self._lot.sample(plan.entries, len(plan.entries)):
            self._progress(f"{title}, {entry.row.label}", self._done, self._total)
            entry.row.samples.append(self._measure(plan, entry))
            self._done += group.nbytes
            if isinstance(entry.way, ByRoute):
                entry.row.registered = entry.way.registered
                if entry.row.depth > 1:
                    latencies = entry.way.latencies
                    kept = latencies[:: -(-len(latencies) // _MOST_KEPT)]
                    group.add_latencies(entry.row.way, entry.row.depth, (ns / 1e9 for ns in kept))

    def _measure(self, plan: _Plan, entry: _Entry) -> Sample:
        with self._cold(plan.group, entry.way) as before:
            cpu, begun = _cpu_seconds(), time.perf_counter()
            entry.way.run(plan.segments)
            seconds, cpu = time.perf_counter() - begun, _cpu_seconds() - cpu
        return Sample(seconds, cpu, before, self._cache.pages(plan.group.nbytes))

    @contextmanager
    def _cold(self, group: Group, way: Way) -> Iterator[int]:
        """Nothing in the page cache, and the way made ready; the pages that are there."""
        before = self._cache.drop(dirty=group.direction == "write")
        way.begin()
        try:
            yield before
        finally:
            way.end()

    def _single_calls(self, plan: _Plan) -> None:
        """The latency of one call of one block, way by way, and so one in flight."""
        group = plan.group
        ways = {entry.way.name: entry.way for entry in reversed(plan.entries)}
        segments = self._segments(group.block, min(_MOST_CALLS, self._place.size // group.block))
        most = self._share * _LATENCY_PART / len(ways)
        for name in self._lot.sample(sorted(ways), len(ways)):
            with self._cold(group, ways[name]), ways[name].single() as one:
                group.add_latencies(name, 1, _time_calls(one, segments, most))


def _time_calls(
    one: Callable[[int, int], None], segments: array[int], most: float
) -> Iterator[float]:
    """Seconds of at least one call, and of no more after `most` seconds."""
    end = time.perf_counter() + most
    for i in range(0, len(segments), 3):
        begun = time.perf_counter()
        one(segments[i], segments[i + 1])
        now = time.perf_counter()
        yield now - begun
        if now > end:
            return


def why_warm(file: File) -> str | None:
    """Why no run can be a cold one, where that is so."""
    name = file.kind == "file" and facts.kept_in_memory(file.fileno())
    return f"{name} keeps its files in the page cache, so nothing is cold" if name else None


def _cpu_seconds() -> float:
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
