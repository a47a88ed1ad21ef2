"""All of a measurement, and what programs are told of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dmabuf.bench.figures import Group, Row, headline, percentiles
from dmabuf.bench.run import Measured, Setting
from dmabuf.bench.ways import TODAY
from dmabuf.facts import PAGE

FORMAT = 1
"""Of the JSON: keys are only added to it; what would change a meaning counts this up."""


@dataclass(frozen=True, slots=True)
class Result:
    """What was measured, on what, and how."""

    machine: Mapping[str, Any]
    target: str
    kind: str
    filesystem: str | None
    device: str | None
    start: int
    size: int
    """Bytes of the range, and of the buffer that was used."""
    exporter: str
    exporter_reason: str
    huge_pages: str | None
    """The size of the buffer's pages, where they are huge ones."""
    setting: Setting
    measured: Measured
    seconds: float
    """How long all of it took."""

    @property
    def headlines(self) -> list[str]:
        """A sentence for each direction, about its largest blocks."""
        groups = {group.direction: group for group in self.measured.groups}  # the last wins
        cold = self.measured.warm is None
        return [line for group in groups.values() if (line := headline(group, cold))]

    def residency(self, row: Row, group: Group) -> float | None:
        """The part of a run's bytes that was in the page cache after it; the most of all rounds.

        None where the kernel does not show it.
        """
        if self.measured.unseen:
            return None
        return max(sample.after for sample in row.samples) * PAGE / group.nbytes


def as_json(result: Result) -> dict[str, Any]:
    """All of it for programs."""
    setting, measured = result.setting, result.measured
    lines = result.headlines
    return {
        "format": FORMAT,
        "headline": lines[0] if lines else None,
        "headlines": lines,
        "machine": dict(result.machine),
        "target": {
            "name": result.target,
            "kind": result.kind,
            "filesystem": result.filesystem,
            "device": result.device,
            "start": result.start,
            "size": result.size,
        },
        "buffer": {
            "exporter": result.exporter,
            "reason": result.exporter_reason,
            "huge_pages": result.huge_pages,
        },
        "rounds": measured.rounds,
        "seed": setting.seed,
        "random": setting.shuffled,
        "seconds": result.seconds,
        "cold": measured.warm is None,
        "why_not_cold": measured.warm,
        "page_cache_visible": measured.unseen is None,
        "why_not_visible": measured.unseen,
        "groups": [_group(result, group) for group in measured.groups],
    }


def _group(result: Result, group: Group) -> dict[str, Any]:
    return {
        "direction": group.direction,
        "block": group.block,
        "nbytes": group.nbytes,
        "ways": [_row(result, group, row) for row in group.rows],
        "latencies": [
            {
                "way": way,
                "depth": depth,
                "count": len(group.latencies[way, depth]),
                **percentiles(group.latencies[way, depth]),
            }
            for way, depth in group.timed
        ],
        "refused": dict(group.refused),
    }


def _row(result: Result, group: Group, row: Row) -> dict[str, Any]:
    speed, unseen = group.speed(row), result.measured.unseen
    return {
        "way": row.way,
        "today": row.today,
        "depth": row.depth,
        "registered": row.registered,
        "bytes_per_second": speed,
        "iops": speed / group.block,
        "cpu_seconds_per_gib": group.cpu(row),
        "sooner": {way: group.sooner(row, group.row(way)) for way in TODAY if way != row.way},
        "seconds": [sample.seconds for sample in row.samples],
        "cached_pages_before": None if unseen else max(sample.before for sample in row.samples),
        "cached_pages_after": None if unseen else max(sample.after for sample in row.samples),
    }
