"""Charts of a benchmark by matplotlib: throughput with its spread, and latency.

matplotlib is imported only when a chart is made, since that may take seconds.
"""

from __future__ import annotations

import errno
import statistics
import textwrap
from typing import TYPE_CHECKING

from dmabuf.errors import os_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from dmabuf.inspect.bench import Group, Result

CHART_FORMATS = ("png", "svg")
"""The endings of files that `draw_chart` writes, without the dot."""
# Okabe and Ito's colours, which people with any colour vision tell apart; grey for today's ways.
_COLOURS = {"native": "#009E73", "direct": "#0072B2", "staged": "#56B4E9", "buffered": "#E69F00"}
_TODAY = "#8C8C8C"
_MARKS = {"p50": "o", "p99": "D", "p100": "|"}


def load_matplotlib() -> None:
    """Import matplotlib.

    Raises:
        OSError: ENOPKG, it is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        text = f"a chart needs matplotlib: {error}; pip install 'dmabuf[plot]'"
        raise os_error(errno.ENOPKG, text) from None


def draw_chart(result: Result, path: str, image: str) -> None:
    """Write a chart to a file; `image` is "png" or "svg"."""
    from matplotlib.figure import Figure

    rows = [len(group.rows) for group in result.groups]
    title = [part for line in result.headlines for part in textwrap.wrap(line, 120)]
    height = 0.9 + 0.22 * len(title) + sum(0.28 * count + 0.7 for count in rows)
    figure = Figure(figsize=(12, height), layout="constrained")
    figure.suptitle("\n".join(title), fontsize=9, x=0.01, ha="left")
    axes = figure.subplots(
        len(rows), 2, squeeze=False, gridspec_kw={"height_ratios": rows, "width_ratios": (3, 2)}
    )
    for group, (left, right) in zip(result.groups, axes, strict=True):
        _throughput(left, group)
        _latency(right, group)
    metadata = {"Date": None} if image == "svg" else {}
    figure.savefig(path, format=image, dpi=110, metadata=metadata)


def _throughput(axes: Axes, group: Group) -> None:
    labels = [row.label for row in group.rows]
    speeds = [[group.nbytes / sample.seconds / 1e6 for sample in row.samples] for row in group.rows]
    medians = [statistics.median(each) for each in speeds]
    low = [median - min(each) for median, each in zip(medians, speeds, strict=True)]
    high = [max(each) - median for median, each in zip(medians, speeds, strict=True)]
    colours = [_COLOURS.get(row.way, _TODAY) for row in group.rows]
    axes.barh(labels, medians, color=colours, xerr=[low, high], ecolor="#444444", capsize=2)
    axes.set_title(f"{group.title}: MB/s, median and range", loc="left", fontsize=9)
    axes.invert_yaxis()


def _latency(axes: Axes, group: Group) -> None:
    ways = list(group.latencies)
    for name, mark in _MARKS.items():
        known = [
            (at, value) for at, way in enumerate(ways) if (value := group.percentiles(way)[name])
        ]
        if known:
            places, values = zip(*known, strict=True)
            colours = [_COLOURS.get(ways[at], _TODAY) for at in places]
            microseconds = [value * 1e6 for value in values]
            axes.scatter(microseconds, places, marker=mark, c=colours, label=name, s=36)
    axes.set_xscale("log")
    axes.set_yticks(range(len(ways)), ways)
    axes.set_title("latency of a call, \N{MICRO SIGN}s", loc="left", fontsize=9)
    axes.legend(fontsize=7)
    axes.invert_yaxis()
