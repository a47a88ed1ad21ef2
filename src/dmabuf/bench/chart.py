"""Charts of a measurement, by matplotlib, which is loaded when one is asked for.

A row for each direction and size of block; beside each other how fast, how much sooner than the way
that all are compared with, what it costs the CPU, and how long single blocks take. Our routes have
colours that people with any colour vision tell apart (Okabe and Ito's), the ways of today are grey.
"""

from __future__ import annotations

import errno
import os
import textwrap
from typing import TYPE_CHECKING, Any

from dmabuf.bench.figures import Group, Row, percentiles
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
_LATENCY = "latency: \N{BLACK CIRCLE} p50  \N{BLACK DIAMOND} p99  \N{BLACK SQUARE} p99.9  | slowest"
_FURTHEST = -1.0  # what is later than this is told by its figure alone
_INK, _FAINT, _BAND, _QUIET = "#222222", "#DDDDDD", "#F6F6F6", "#666666"
_WIDTH, _LEFT, _RIGHT = 15.0, 1.0, 0.2  # inches: all, and what is left free beside the panels
_ROW, _LINE, _GAP, _FOOT = 0.27, 0.19, 0.6, 0.35  # a bar, a line of the head, between, below


def format_of(path: str) -> str | None:
    """What a chart's name says that it is to be: one of FORMATS."""
    suffix = os.path.splitext(path)[1].lower()
    return suffix if suffix in FORMATS else None


def load() -> None:
    """Import matplotlib, which may take seconds.

    Raises:
        OSError: ENOPKG, there is none.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        text = f"charts are drawn by matplotlib ({error}): pip install 'matplotlib>=3.8'"
        raise os_error(errno.ENOPKG, text) from None


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
    rows = [len(group.rows) for group in groups]
    title = _wrapped(result.headlines or [f"{result.target}: how fast"], 150)
    subtitle = _wrapped(_subtitle(result), 175)
    head = 0.6 + _LINE * (len(title) + len(subtitle))
    height = head + _ROW * sum(rows) + _GAP * (len(rows) - 1) + _FOOT
    style: Any = {
        "font.size": 9,
        "axes.edgecolor": _FAINT,
        "text.color": _INK,
        "svg.hashsalt": "dmabuf",
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(_WIDTH, height))
        for number, line in enumerate(title + subtitle):
            bold: Any = {"fontsize": 10.5, "fontweight": "bold"}
            how = bold if number < len(title) else {"color": _QUIET}
            gap = 0.12 if number < len(title) else 0.18
            figure.text(0.008, 1 - (gap + _LINE * number) / height, line, va="top", **how)
        places = {
            "left": _LEFT / _WIDTH,
            "right": 1 - _RIGHT / _WIDTH,
            "top": 1 - head / height,
            "bottom": _FOOT / height,
            "wspace": 0.16,
            "hspace": _GAP / (_ROW * sum(rows) / len(rows)),
            "height_ratios": rows,
            "width_ratios": (5, 4, 2.6, 4.4),
        }
        axes = figure.subplots(len(groups), 4, squeeze=False, gridspec_kw=places)
        for group, panels in zip(groups, axes, strict=True):
            for panel, put in zip(panels, (_throughput, _sooner, _cpu, _latency), strict=True):
                put(panel, group)
        metadata = {"Date": None} if image == "svg" else {}
        figure.savefig(file, format=image, dpi=110, metadata=metadata)


def _wrapped(lines: list[str], width: int) -> list[str]:
    return [part for line in lines for part in textwrap.wrap(line, width)]


def _subtitle(result: Result) -> list[str]:
    machine = result.machine
    device = f", device {result.device}" if result.device else ""
    where = f" on {result.filesystem}" if result.filesystem else ""
    pages = f" of {result.huge_pages} pages" if result.huge_pages else ""
    return [
        f"{machine['cpus']} x {machine['cpu']}, Linux {machine['kernel']}, dmabuf "
        f"{machine['dmabuf']}, Python {machine['python']}; {result.target}{where}{device}; buffer: "
        f"{result.exporter}{pages}; medians of {result.measured.rounds} interleaved rounds; x32 is "
        "32 requests in flight"
    ]


def _prepare(axes: Axes, group: Group, title: str) -> list[tuple[float, Row]]:
    """An axis with a place for each row, the first at the top, every other on a band."""
    places = [(-float(number), row) for number, row in enumerate(group.rows)]
    axes.set_ylim(places[-1][0] - 0.5, 0.5)
    axes.set_title(title, loc="left", fontsize=9.5, fontweight="bold", color=_INK)
    axes.tick_params(length=0, colors=_INK)
    axes.tick_params(which="minor", length=0)
    axes.set_axisbelow(True)
    axes.grid(axis="x", color=_FAINT, linewidth=0.7)
    axes.set_yticks([])
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    for place, _ in places[::2]:
        axes.axhspan(place - 0.5, place + 0.5, color=_BAND, linewidth=0, zorder=0)
    return places


def _bars(
    axes: Axes, places: list[tuple[float, Row]], values: list[float], texts: list[str], room: float
) -> None:
    """Bars from a line at 0, each with its figure behind it; `room` for those, times the longest.

    There is no axis: the figures stand there.
    """
    colours = [_COLOURS[row.way] for _, row in places]
    axes.barh([place for place, _ in places], values, height=0.66, color=colours)
    for (place, _), value, text in zip(places, values, texts, strict=True):
        axes.text(value, place, f" {text}", va="center", fontsize=8)
    axes.set_xlim(0, (max(values) or 1) * room)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.axvline(0, color="#999999", linewidth=0.8)


def _throughput(axes: Axes, group: Group) -> None:
    places = _prepare(axes, group, f"{group.title}: throughput")
    axes.set_yticks([place for place, _ in places], [row.label for _, row in places])
    speeds = [group.speed(row) for _, row in places]
    texts = [f"{_speed(speed)}, {speed / group.block:,.0f} IOPS" for speed in speeds]
    _bars(axes, places, speeds, texts, 1.55)


def _cpu(axes: Axes, group: Group) -> None:
    places = _prepare(axes, group, "CPU seconds a GiB")
    values = [group.cpu(row) for _, row in places]
    _bars(axes, places, values, [f"{value:.2f}" for value in values], 1.3)


def _sooner(axes: Axes, group: Group) -> None:
    places = _prepare(axes, group, "sooner than copy: median, spread")
    axes.set_xlim(_FURTHEST, 1)
    axes.set_xticks([-1, -0.5, 0, 0.5, 1], ["-100%", "-50%", "0", "50%", "100%"])
    axes.axvline(0, color="#999999", linewidth=0.8)
    known = [
        (place, _COLOURS[row.way], figures)
        for place, row in places
        if row is not group.base and (figures := group.sooner(row, group.base)) is not None
    ]
    lines = [(max(low, _FURTHEST), max(high, _FURTHEST)) for _, _, (_, low, high) in known]
    _lines(axes, [place for place, _, _ in known], lines, [colour for _, colour, _ in known], 2.2)
    for mark in ("o", "<"):
        _marks(
            axes,
            mark,
            36,
            [
                (max(median, _FURTHEST), place, colour)
                for place, colour, (median, _, _) in known
                if (mark == "o") == (median >= _FURTHEST)
            ],
        )
    where = axes.get_yaxis_transform()
    for place, _, (median, _, _) in known:
        text = f"{round(100 * median)}%"
        axes.text(1.12, place, text, va="center", ha="right", fontsize=8, transform=where)


def _latency(axes: Axes, group: Group) -> None:
    from matplotlib.ticker import LogLocator

    places = _prepare(axes, group, _LATENCY)
    axes.set_xscale("log")
    known = []
    for place, row in places:
        found = percentiles(group.latencies.get((row.way, row.depth), []))
        values = {name: value for name, value in found.items() if value is not None}
        if values:
            known.append((place, _COLOURS[row.way], values))
    lines = [(min(values.values()), max(values.values())) for _, _, values in known]
    _lines(axes, [place for place, _, _ in known], lines, [colour for _, colour, _ in known], 1.2)
    for name, mark in _MARKS.items():
        marked = [(values[name], place, c) for place, c, values in known if name in values]
        _marks(axes, mark, 70 if name == "p100" else 25, marked)
    low, high = min(low for low, _ in lines), max(high for _, high in lines)
    axes.set_xlim(low / 1.5, high * 1.5)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 50 else (1,)))
    axes.xaxis.set_major_formatter(lambda value, _: _duration(value))
    axes.xaxis.set_minor_formatter(lambda value, _: "")


def _lines(
    axes: Axes,
    places: list[float],
    ends: list[tuple[float, float]],
    colours: list[str],
    width: float,
) -> None:
    low, high = [low for low, _ in ends], [high for _, high in ends]
    axes.hlines(places, low, high, colors=colours, linewidth=width)


def _marks(axes: Axes, mark: str, size: float, marks: list[tuple[float, float, str]]) -> None:
    """`marks` are triples of x, place and colour."""
    if marks:
        x, y, colours = zip(*marks, strict=True)
        axes.scatter(x, y, s=size, c=colours, marker=mark, clip_on=False, zorder=3)


def _speed(value: float) -> str:
    """`559 MB/s`, `1.08 GB/s`."""
    for unit, scale in (("kB/s", 1e3), ("MB/s", 1e6)):
        if value < 999.5 * scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e9:.3g} GB/s"


def _duration(seconds: float) -> str:
    for unit, scale in (("\N{MICRO SIGN}s", 1e6), ("ms", 1e3)):
        if seconds * scale < 999.5:
            return f"{seconds * scale:g} {unit}"
    return f"{seconds:g} s"
