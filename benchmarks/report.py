"""The table and the charts of beside_peers.py, from the figures that it measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common import GIB, Spread
from peers import PEERS, Peer

WHERE = {"zram": "ext4 over zram", "disk": "the disk"}
FIO = Peer(
    "fio, 1 MiB, depth 32", lambda path: lambda: path, True, False,
    "no load: 32 MiB of memory, used again and again; how fast the file can be read at all",
)  # fmt: skip


def peer(row: dict[str, Any]) -> Peer:
    """What a row is of."""
    return FIO if row["name"] == "fio" else PEERS[row["name"]]


def speed(row: dict[str, Any], size: int) -> Spread:
    """GB/s."""
    return Spread.of([size / seconds / 1e9 for seconds in row["seconds"]])


def cpu(row: dict[str, Any], size: int) -> float:
    """CPU seconds a GiB of the load."""
    return max(0.0, Spread.of(row["cpu_of_load"]).median) / (size / GIB)


def measured(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that were not skipped, fastest first."""
    found = [row for row in rows if "skipped" not in row]
    return sorted(found, key=lambda row: Spread.of(row["seconds"]).median)


def table(rows: list[dict[str, Any]], size: int) -> list[str]:
    """Markdown."""
    lines = [
        "| loader | memory | GB/s | CPU s/GiB of the load | CPU s of the process | peak MiB "
        "| pages left |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in measured(rows):
        about = peer(row)
        memory = "none kept" if about is FIO else "given" if about.prefaulted else "its own"
        lines.append(
            f"| {about.label} | {memory} | {speed(row, size).text()} | {cpu(row, size):.2f} "
            f"| {Spread.of(row['cpu']).median:.2f} "
            f"| {Spread.of(row['peak']).median / (1 << 20):.0f} "
            f"| {Spread.of(row['pages']).median:.0f} |"
        )
    return lines


def bars(place: str, rows: list[dict[str, Any]], size: int) -> list[str]:
    """What the comparison comes to: ours and the best of the others, by the kind of memory."""
    found = {row["name"]: row for row in measured(rows)}
    lines = []
    for kind, ours in ((True, "dmabuf-direct"), (False, "dmabuf-own")):
        others = [
            row for name, row in found.items()
            if name != "fio" and not name.startswith("dmabuf") and peer(row).prefaulted is kind
        ]  # fmt: skip
        if ours not in found or not others:
            continue
        best = others[0]
        ratio = speed(found[ours], size).median / speed(best, size).median
        memory = "memory that is given" if kind else "memory that the loader allocates"
        lines.append(
            f"- Into {memory}, on {WHERE[place]}: {ratio:.2f} times the speed of the best of the "
            f"others, {peer(best).label}."
        )
    cached = [
        cpu(row, size)
        for name, row in found.items()
        if peer(row).cached and not name.startswith("dmabuf")
    ]
    if "dmabuf-direct" in found and cached and min(cached):
        part = cpu(found["dmabuf-direct"], size) / min(cached)
        lines.append(
            f"- CPU of the load on {WHERE[place]}: {part:.2f} of that of the thriftiest of those "
            f"that read through the page cache."
        )
    return lines


def write(folder: Path, result: dict[str, Any]) -> None:
    """Write peers.md, and a chart for each place."""
    size = result["size"]
    text = [
        "# Beside other loaders", "",
        f"One file of {size / GIB:.0f} GiB, not in the page cache, into memory. Medians of "
        f"{result['runs']} interleaved runs, each a process of its own, with the lowest and the "
        "highest; `make benchmarks` measures it and writes this page.", "",
        "```", *result["machine"], "```", "",
    ]  # fmt: skip
    for place, rows in result["on"].items():
        name = f"peers-{place}.svg"
        chart(folder / name, place, rows, size)
        text += [f"## On {WHERE[place]}", "", f"![speed and CPU]({name})", ""]
        text += [*table(rows, size), "", *bars(place, rows, size), ""]
        text += [f"- {peer(row).label}: skipped: {row['skipped']}" for row in rows
                 if "skipped" in row]  # fmt: skip
        text.append("")
    text += ["## What is compared with what", "", *notes(), ""]
    (folder / "peers.md").write_text("\n".join(text))


def notes() -> list[str]:
    """What is not comparable, said plainly."""
    lines = [
        "*Memory*: where a library lets the destination be given, it is, and its pages are there "
        "before the clock starts (given). The rest allocate while they load, and pay for the first "
        "touch of each page (its own). Compare like with like: dmabuf is there in both kinds.", "",
        "*CPU s/GiB of the load* is by getrusage(2) around it (of fio: the process less one that "
        "reads next to nothing), *of the process* by wait4(2), with imports and preparation. "
        "Threads and io_uring's workers are in both, the kernel's own threads in neither.", "",
        "*Pages left* are pages of the file in the page cache when the process has ended. "
        "*Peak* is what was resident at most, pages of the file that are mapped included.", "",
    ]  # fmt: skip
    for about in (FIO, *PEERS.values()):
        cached = "through the page cache" if about.cached else "past the page cache"
        lines.append(f"- {about.label}: {about.note}; {cached}.")
    return lines


def chart(path: Path, place: str, rows: list[dict[str, Any]], size: int) -> None:
    """Speed and CPU of each loader, side by side."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams |= {"svg.hashsalt": "dmabuf", "font.size": 9}
    shown = measured(rows)[::-1]
    labels = [
        f"{peer(row).label}{'' if peer(row).prefaulted else ' *'}" for row in shown
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
        "   (* allocates while it loads)"
    )
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
