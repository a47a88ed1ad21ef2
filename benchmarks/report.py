"""The table and charts of beside_peers.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import GIB, SkippedError, Spread
from peers import GIVEN, OWN, PEERS, Peer

Sample = Mapping[str, float]
"""The figures and the cost of one process, by KEYS."""
KEYS = ("seconds", "cpu_of_load", "cpu", "peak", "pages")
WHERE = {"zram": "ext4 over zram", "disk": "the disk"}
FIO = Peer(
    "fio, 1 MiB, depth 32", lambda path: lambda: path, "none kept", False,
    "no load, but how fast the file can be read at all: 32 MiB of memory, used again and again",
)  # fmt: skip


def peer(row: dict[str, Any]) -> Peer:
    """Return the loader of a row."""
    return FIO if row["name"] == "fio" else PEERS[row["name"]]


def speed(row: dict[str, Any], size: int) -> Spread:
    """Return the speed in GB/s."""
    return Spread.of([size / seconds / 1e9 for seconds in row["seconds"]])


def cpu(row: dict[str, Any], size: int) -> float:
    """Return the CPU seconds of the load for each GiB."""
    return max(0.0, Spread.of(row["cpu_of_load"]).median) / (size / GIB)


def measured(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows that were not skipped, fastest first."""
    found = [row for row in rows if "skipped" not in row]
    return sorted(found, key=lambda row: Spread.of(row["seconds"]).median)


def of_the_device(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Return the speed as a percentage of fio's in the same round."""
    limit = next((one["seconds"] for one in measured(rows) if one["name"] == "fio"), None)
    if limit is None:
        return ""
    pairs = zip(limit, row["seconds"], strict=True)
    return f"{100 * Spread.of([fio / seconds for fio, seconds in pairs]).median:.0f} %"


def table(rows: list[dict[str, Any]], size: int) -> list[str]:
    """Return the table in Markdown."""
    lines = [
        "| loader | memory | GB/s | of the device | CPU s/GiB of the load | CPU s of the process "
        "| peak MiB | pages left |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in measured(rows):
        about = peer(row)
        lines.append(
            f"| {about.label} | {about.memory} | {speed(row, size)} | {of_the_device(row, rows)} "
            f"| {cpu(row, size):.2f} "
            f"| {Spread.of(row['cpu']).median:.2f} "
            f"| {Spread.of(row['peak']).median / (1 << 20):.0f} "
            f"| {Spread.of(row['pages']).median:.0f} |"
        )
    return lines


def sooner(one: Mapping[str, Sample], ours: str = "dmabuf-direct") -> tuple[float, float]:
    """Return the seconds of dmabuf and of the fastest other loader in one round.

    The others include loaders that allocate, and are only those if dmabuf allocates too. A loader
    that maps the file loads nothing, and is excluded.
    """
    memory = (OWN,) if ours == "dmabuf-own" else (GIVEN, OWN)
    others = [
        one[name]["seconds"] for name, peer in PEERS.items() if name in one
        and not name.startswith("dmabuf") and peer.memory in memory
    ]  # fmt: skip
    if not others:
        raise SkippedError("no loader to compare with could run")
    return one[ours]["seconds"], min(others)


def cheaper(one: Mapping[str, Sample]) -> tuple[float, float]:
    """Return the CPU seconds of dmabuf and of the cheapest cached loader in one round."""
    others = [
        one[name]["cpu_of_load"] for name, peer in PEERS.items() if name in one
        and not name.startswith("dmabuf") and peer.cached
    ]  # fmt: skip
    if not others:
        raise SkippedError("no loader that reads through the page cache could run")
    return one["dmabuf-direct"]["cpu_of_load"], min(others)


def rounds(rows: list[dict[str, Any]]) -> list[dict[str, Sample]]:
    """Return the figures, round by round."""
    found = measured(rows)
    return [
        {row["name"]: {key: row[key][number] for key in KEYS} for row in found}
        for number in range(len(found[0]["seconds"]) if found else 0)
    ]


def comparison(rows: list[dict[str, Any]], size: int) -> list[str]:
    """Return the comparisons of dmabuf with the best other loader of each round."""
    names = [row["name"] for row in measured(rows)]
    lines = []
    for ours, words in (
        ("dmabuf-direct", "Into memory that is there, direct"),
        ("dmabuf-own", "Allocating while it loads, direct"),
    ):
        try:
            pairs = [sooner(one, ours) for one in rounds(rows) if ours in names]
        except SkippedError:
            continue
        if pairs:
            ratio = Spread.of([theirs / mine for mine, theirs in pairs])
            lines.append(f"- {words} has {ratio} times the speed of the fastest of the others.")
    try:
        used = [cheaper(one) for one in rounds(rows) if "dmabuf-direct" in names]
    except SkippedError:
        used = []
    if used:
        mine, theirs = (Spread.of([each / (size / GIB) for each in side])
                        for side in zip(*used, strict=True))  # fmt: skip
        lines.append(
            f"- Direct takes {mine} CPU s/GiB, the cheapest of those that read through the page "
            f"cache {theirs}."
        )
    return lines


def write(folder: Path, result: dict[str, Any]) -> None:
    """Write peers.md, and a chart for each place."""
    size = result["size"]
    text = [
        "# Beside other loaders", "",
        f"One file of {size / GIB:.0f} GiB, not in the page cache, into memory. Medians of "
        f"{result['runs']} interleaved runs, each a process of its own, with the lowest and the "
        "highest. `make benchmarks` measures it and writes this page.", "",
        "```", *result["machine"], "```", "",
    ]  # fmt: skip
    for place, rows in result["on"].items():
        name = f"peers-{place}.svg"
        chart(folder / name, place, rows, size)
        text += [f"## On {WHERE[place]}", "", f"![speed and CPU]({name})", ""]
        text += [*table(rows, size), "", *comparison(rows, size), ""]
        text += [f"- {peer(row).label}: skipped: {row['skipped']}" for row in rows
                 if "skipped" in row]  # fmt: skip
        text.append("")
    text += ["## What is compared with what", "", *notes(), ""]
    (folder / "peers.md").write_text("\n".join(text))


def notes() -> list[str]:
    """Return the notes on what is not comparable."""
    lines = [
        "*Memory*: \"given\" is memory that the caller allocates and touches before the "
        "measurement, if the library accepts such memory. \"Its own\" is allocated during the "
        "load, so the first touch of each page counts. Compare rows with the same word; dmabuf has "
        "both. Only dmabuf's buffers can be passed to devices and to other processes.",
        "",
        "*Of the device*: the speed as a percentage of fio's in the same round, the median of the "
        "rounds. fio reads into the same 32 MiB again and again, and loads nothing.",
        "",
        "*CPU s/GiB of the load* is measured by getrusage(2) around the load. For fio it is the "
        "process, less a process that reads almost nothing. *CPU s of the process* is measured by "
        "wait4(2), and includes imports and preparation. Both include threads and io_uring's "
        "workers, and neither includes the kernel's own threads.", "",
        "*Pages left* are pages of the file in the page cache after the process. *Peak* is the "
        "most resident memory, mapped pages of the file included.", "",
    ]  # fmt: skip
    for about in (FIO, *PEERS.values()):
        cached = "through the page cache" if about.cached else "past the page cache"
        lines.append(f"- {about.label}: {about.note + '; ' if about.note else ''}{cached}.")
    lines.append("- InstantTensor 0.2.2 is not in the tables: it loads to CUDA devices only.")
    return lines


def chart(path: Path, place: str, rows: list[dict[str, Any]], size: int) -> None:
    """Draw the speed and CPU of each loader side by side."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams |= {"svg.hashsalt": "dmabuf", "font.size": 9}
    shown = measured(rows)[::-1]
    labels = [
        f"{peer(row).label}{'' if peer(row).memory == GIVEN else ' *'}" for row in shown
    ]  # fmt: skip
    colours = [
        "#1f77b4" if row["name"].startswith("dmabuf") else "#bbbbbb" if row["name"] == "fio"
        else "#e6a15c" for row in shown
    ]  # fmt: skip
    figure, (left, right) = pyplot.subplots(
        1, 2, sharey=True, figsize=(9, 1.2 + 0.3 * len(shown)), layout="constrained"
    )
    speeds = [speed(row, size) for row in shown]
    ends = [[s.median - s.low for s in speeds], [s.high - s.median for s in speeds]]
    left.barh(labels, [s.median for s in speeds], xerr=ends, color=colours, ecolor="#555555")
    left.set_xlabel("GB/s, median, lowest and highest")
    used = right.barh(labels, [cpu(row, size) for row in shown], color=colours)
    right.bar_label(used, fmt="%.2f", padding=3)
    right.margins(x=0.15)
    right.set_xlabel("CPU seconds a GiB of the load")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"A cold file of {size / GIB:.0f} GiB on {WHERE[place]}, into memory"
        "   (* not into memory that was there)"
    )
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
