"""Charts of a measurement, by matplotlib, which is loaded when one is asked for.

A row for each direction and size of block; beside each other how fast, how much sooner than the way
that all are compared with, and how long single calls take. Our routes have colours that people with
any colour vision tell apart (Okabe and Ito's), the ways of today are grey.
"""

from __future__ import annotations

import errno
import os
import textwrap
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from dmabuf.bench.figures import Group, percentiles
from dmabuf.errors import os_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from dmabuf.bench.result import Result

FORMATS = (".png", ".svg", ".html")
_COLOURS = {
    "native": "#009E73",
    "direct": "#0072B2",
    "staged": "#56B4E9",
    "buffered": "#E69F00",
    "copy": "#5F5F5F",
    "bounce": "#8C8C8C",
    "mmap": "#B5B5B5",
}
_MARKS = {"p50": "o", "p99": "D", "p99.9": "s", "p100": "|"}
_LATENCY = (
    "latency of one call: \N{BLACK CIRCLE} p50  \N{BLACK DIAMOND} p99  "
    "\N{BLACK SQUARE} p99.9  | p100"
)
_FURTHEST = -1.0  # what is later than this is told by its figure alone
_INK, _FAINT = "#222222", "#DDDDDD"


def format_of(path: str) -> str | None:
    """What a chart's name says that it is to be: one of FORMATS."""
    suffix = os.path.splitext(path)[1].lower()
    return suffix if suffix in FORMATS else None


def check_installed() -> None:
    """Raise OSError (ENOPKG) where there is no matplotlib."""
    if find_spec("matplotlib") is None:
        text = "charts are drawn by matplotlib, which is not installed: pip install 'dmabuf[plot]'"
        raise os_error(errno.ENOPKG, text)


def draw(result: Result, file: Any, image: str) -> None:
    """Put the charts into a file.

    Args:
        result: what was measured.
        file: a path, or a binary file object.
        image: "png" or "svg".
    """
    import matplotlib
    from matplotlib.figure import Figure

    groups = result.measured.groups
    heights = [len(group.rows) + 1.6 for group in groups]
    style: Any = {
        "font.size": 9,
        "axes.edgecolor": _FAINT,
        "text.color": _INK,
        "svg.hashsalt": "dmabuf",
    }
    with matplotlib.rc_context(style):
        head = 1.1
        figure = Figure(figsize=(12.5, 0.27 * sum(heights) + head + 0.4), layout="constrained")
        figure.get_layout_engine().set(rect=(0, 0, 1, 1 - head / figure.get_figheight()))  # type: ignore[union-attr,call-arg]
        figure.text(
            0.012,
            1 - 0.12 / figure.get_figheight(),
            "\n".join(textwrap.wrap(_title(result), 125)),
            va="top",
            fontsize=11,
            fontweight="bold",
        )
        figure.text(
            0.012,
            1 - (head - 0.18) / figure.get_figheight(),
            _subtitle(result),
            va="top",
            color="#666666",
        )
        axes = figure.subplots(
            len(groups), 3, squeeze=False, height_ratios=heights, width_ratios=(5, 4, 5)
        )
        for group, (speed, sooner, latency) in zip(groups, axes, strict=True):
            _throughput(speed, group)
            _sooner(sooner, group)
            _latency(latency, group)
        metadata = {"Date": None} if image == "svg" else {}
        figure.savefig(file, format=image, dpi=110, metadata=metadata)


def _title(result: Result) -> str:
    lines = result.headlines
    return lines[0] if lines else f"{result.target}: how fast"


def _subtitle(result: Result) -> str:
    machine = result.machine
    device = f", device {result.device}" if result.device else ""
    where = f" on {result.filesystem}" if result.filesystem else ""
    return (
        f"{result.target}{where}{device}; buffer: {result.exporter}; {machine['cpus']} x "
        f"{machine['cpu']}, Linux {machine['kernel']}, dmabuf {machine['dmabuf']}; medians of "
        f"{result.measured.rounds} rounds; x32 is 32 requests in flight"
    )


def _prepare(axes: Axes, group: Group, title: str) -> list[float]:
    """An axis with a place for each row, the first at the top."""
    places = [-float(number) for number in range(len(group.rows))]
    axes.set_ylim(places[-1] - 0.6, 0.6)
    axes.set_title(title, loc="left", fontsize=9.5, fontweight="bold", color=_INK)
    axes.tick_params(length=0, colors=_INK)
    axes.set_axisbelow(True)
    axes.grid(axis="x", color=_FAINT, linewidth=0.7)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    return places


def _label_rows(axes: Axes, group: Group, places: list[float]) -> None:
    axes.set_yticks(places, [row.label for row in group.rows])


def _throughput(axes: Axes, group: Group) -> None:
    places = _prepare(axes, group, f"{group.title}: throughput")
    _label_rows(axes, group, places)
    speeds = [group.speed(row) for row in group.rows]
    scale, unit = (1e9, "GB/s") if max(speeds) >= 1e9 else (1e6, "MB/s")
    values = [speed / scale for speed in speeds]
    axes.barh(places, values, height=0.66, color=[_COLOURS[row.way] for row in group.rows])
    for place, value, speed in zip(places, values, speeds, strict=True):
        text = f" {value:.3g} {unit}, {speed / group.block:,.0f} IOPS"
        axes.text(value, place, text, va="center", fontsize=8)
    axes.set_xlim(0, max(values) * 1.5)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.axvline(0, color="#999999", linewidth=0.8)


def _sooner(axes: Axes, group: Group) -> None:
    places = _prepare(axes, group, "sooner than copy, and spread")
    axes.set_yticks([])
    axes.set_xlim(_FURTHEST, 1)
    axes.set_xticks([-1, -0.5, 0, 0.5, 1], ["-100%", "-50%", "0", "50%", "100%"])
    axes.axvline(0, color="#999999", linewidth=0.8)
    for place, row in zip(places, group.rows, strict=True):
        known = group.sooner(row, group.base)
        if known is None or row is group.base:
            continue
        median, low, high = known
        colour = _COLOURS[row.way]
        axes.plot([max(low, _FURTHEST), max(high, _FURTHEST)], [place] * 2, color=colour, lw=2.2)
        if median >= _FURTHEST:
            axes.plot([median], [place], "o", color=colour, markersize=6)
        else:
            axes.plot([_FURTHEST], [place], "<", color=colour, markersize=6, clip_on=False)
        axes.text(
            1.14,
            place,
            f"{100 * median:.0f}%",
            va="center",
            ha="right",
            fontsize=8,
            transform=axes.get_yaxis_transform(),
        )


def _latency(axes: Axes, group: Group) -> None:
    places = _prepare(axes, group, _LATENCY)
    axes.set_yticks([])
    axes.set_xscale("log")
    seen: set[str] = set()
    for place, row in zip(places, group.rows, strict=True):
        seconds = group.latencies.get(row.way, ())
        if row.way in seen or not seconds:
            continue
        seen.add(row.way)
        known = {name: value for name, value in percentiles(seconds).items() if value is not None}
        values = [1e6 * value for value in known.values()]
        colour = _COLOURS[row.way]
        axes.plot([values[0], values[-1]], [place] * 2, color=colour, linewidth=1.4, alpha=0.6)
        for name, value in zip(known, values, strict=True):
            axes.plot([value], [place], _MARKS[name], color=colour, markersize=_size(name))
    axes.xaxis.set_major_formatter(lambda value, _: _microseconds(value))
    axes.xaxis.set_minor_formatter(lambda value, _: "")
    axes.tick_params(which="minor", length=0)


def _size(name: str) -> float:
    return 9 if _MARKS[name] == "|" else 5


def _microseconds(value: float) -> str:
    for unit, scale in (("s", 1e6), ("ms", 1e3)):
        if value >= scale:
            return f"{value / scale:g} {unit}"
    return f"{value:g} µs"
