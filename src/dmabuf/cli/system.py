"""`dmabuf top`, and `dmabuf ls --system`: every dma-buf on the machine and who holds it."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Hashable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

from dmabuf import inspect
from dmabuf.cli import output
from dmabuf.cli.parser import Command, Parser, Stopped, number
from dmabuf.inspect import Census, Holder, Process, SystemBuffer, Total
from dmabuf.sizes import format_size

_MOST_FDS = 8  # descriptors of one process that a table shows

_Key = TypeVar("_Key", bound=Hashable)
_Rows = list[tuple[str, ...]]


def _look(process: str | None, exporter: str | None) -> Census:
    """Take a census, of the buffers that `process` holds or `exporter` made."""
    found = inspect.take_census()
    if process is not None:
        found = found.of(lambda one: any(_is_meant(by.process, process) for by in one.holders))
    if exporter is not None:
        found = found.of(lambda one: one.exporter == exporter)
    return found


def _is_meant(process: Process | None, wanted: str | None) -> bool:
    """Return whether `wanted`, a pid or a command, means the process; None means any."""
    if process is None or wanted is None:
        return wanted is None
    return wanted in (str(process.pid), process.command)


# -- ls --system


def list_system(args: Namespace) -> None:
    """Carry out `ls --system`."""
    found = _look(args.process, args.exporter)
    if args.json:
        listed = [
            ListedBuffer(**output.fields_of(one), unseen_references=one.unseen)
            for one in found.buffers
        ]
        by_process = [ProcessTotal(*item) for item in found.by_process().items()]
        by_exporter = [ExporterTotal(*item) for item in found.by_exporter().items()]
        told = SystemListing(
            **_seen(found), buffers=listed, by_process=by_process, by_exporter=by_exporter
        )
        output.say_json(told)
        return
    if found.buffers:
        rows: _Rows = [_buffer_row(buffer, found) for buffer in found.buffers]
        output.write(
            output.table(
                ("inode", "size", "exporter", "name", "held by", "attached devices"),
                rows,
                left=(2, 3, 4, 5),
            )
            + "\n"
        )
        rows = [
            (_process(process, found), *_figures(total, found), _size(total.share, found))
            for process, total in found.by_process().items()
        ]
        output.write(
            output.table(("process", "buffers", "size", "share"), rows, title="by process") + "\n"
        )
        exporters = [
            (exporter or "?", *_figures(total, found))
            for exporter, total in found.by_exporter().items()
        ]
        output.write(
            output.table(("exporter", "buffers", "size"), exporters, title="by exporter") + "\n"
        )
    output.say(_headline(found))
    _note_refusals(found)


def _headline(found: Census) -> str:
    return f"{_count(len(found.buffers), 'dma-buf')}, {_size(found.total.nbytes, found)}"


def _note_refusals(found: Census) -> None:
    for refusal in found.refusals:
        output.note(f"note: {refusal}")


def _buffer_row(buffer: SystemBuffer, found: Census) -> tuple[str, ...]:
    held = [f"{by.process} ({_by_what(by)})" for by in buffer.holders]
    if buffer.unseen or not held:
        held.append(f"{_process(None, found)} ({buffer.unseen or '?'})")
    return (
        str(buffer.inode),
        ("" if buffer.exact else ">=") + format_size(buffer.size),
        buffer.exporter or "?",
        buffer.name or "",
        ", ".join(held),
        "?" if buffer.devices is None else ", ".join(buffer.devices),
    )


def _by_what(holder: Holder) -> str:
    more = len(holder.fds) - _MOST_FDS
    shown = " ".join(map(str, holder.fds[:_MOST_FDS])) + (f" and {more} more" if more > 0 else "")
    parts = [f"fd {shown}"] if holder.fds else []
    parts += [_count(len(holder.mappings), "mapping")] if holder.mappings else []
    return ", ".join(parts)


def _count(many: int, what: str) -> str:
    return f"{many} {what}" + ("" if many == 1 else "s")


def _process(process: Process | None, found: Census) -> str:
    """Return a process's name; None stands for references of no visible process."""
    if process is None:
        return "kernel" if found.complete else "not seen"
    return str(process)


def _figures(total: Total, found: Census) -> tuple[str, str]:
    return str(total.buffers), _size(total.nbytes, found)


def _size(nbytes: int, found: Census) -> str:
    return ("" if all(one.exact for one in found.buffers) else ">=") + format_size(nbytes)


@dataclass(frozen=True, slots=True)
class ProcessTotal:
    """What a process holds."""

    process: Process | None
    """Null stands for references of no visible process."""
    total: Total
    since_last: Total | None = None
    """The growth since the last look of `top`."""
    since_first: Total | None = None
    """The growth since the first look of `top`."""


@dataclass(frozen=True, slots=True)
class ExporterTotal:
    """What an exporter made."""

    exporter: str | None
    total: Total
    since_last: Total | None = None
    since_first: Total | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedBuffer(SystemBuffer):
    """A dma-buf of any process or driver on the machine."""

    unseen_references: int
    """The number of references that belong to no visible process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """What the documents of `ls --system` and `top` have in common."""

    total: Total
    by_process: list[ProcessTotal]
    by_exporter: list[ExporterTotal]
    processes: int
    """The number of processes, kernel threads excluded."""
    hidden: int
    """The number of processes that could not be examined."""
    complete: bool
    """Whether every process was examined: then `unseen_references` are the kernel's."""
    refusals: tuple[str, ...]
    """What could not be seen: cause and fix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemListing(Totals):
    """The result of `dmabuf ls --system`."""

    buffers: list[ListedBuffer]
    format: Literal["dmabuf-ls-system/1"] = "dmabuf-ls-system/1"


def _seen(found: Census) -> dict[str, Any]:
    """Return the fields of Totals that a census has as they are."""
    names = ("total", "processes", "hidden", "complete", "refusals")
    return {name: getattr(found, name) for name in names}


# -- top


class _Growth(NamedTuple):
    """What a process or exporter has, and the growth since the last and the first look."""

    total: Total
    last: Total
    first: Total


class _Round(NamedTuple):
    """One look, with what has grown."""

    number: int
    seconds: float
    """Seconds since the first look."""
    census: Census
    total: _Growth
    processes: dict[Process | None, _Growth]
    exporters: dict[str | None, _Growth]

    def sorted(self, order: str) -> _Round:
        """Return it with the largest in a column first; `order` is one of `_ORDERS`."""
        return self._replace(
            processes=_largest_first(self.processes, order),
            exporters=_largest_first(self.exporters, order),
        )


_ORDERS: dict[str, Callable[[_Growth], int]] = {
    "size": lambda row: row.total.nbytes,
    "share": lambda row: row.total.share,
    "buffers": lambda row: row.total.buffers,
    "last": lambda row: row.last.nbytes,
    "first": lambda row: row.first.nbytes,
}
_KEYS = {"s": "size", "h": "share", "b": "buffers", "l": "last", "f": "first"}
_HELP = "sort by: s size, h share, b buffers, l last look, f first look; q quits"


def _top_arguments(parser: Parser) -> None:
    seconds = number(0.1, 86400, float)
    parser.option("--interval", "SECONDS", "Between two looks. [default: 2]", seconds, 2.0)
    text = "The number of looks. [default: until Ctrl-C]"
    parser.option("-n --count", "N", text, number(1, 10**9))
    text = "The column to sort by. [default: size]"
    parser.option("--sort", "", text, default="size", choices=[*_ORDERS])
    parser.shared("process", "of-exporter", "json")


def _top(args: Namespace) -> int:
    terminal = output.is_terminal(sys.stdout) and not args.json
    show = _print_json if args.json else _print
    first = last = None
    begun = time.monotonic()
    looks = 0
    try:
        with _Screen() if terminal else nullcontext() as screen:
            while True:
                census = _look(args.process, args.exporter)
                first, last = first or census, last or census
                looks += 1
                found = _compare(args, looks, time.monotonic() - begun, census, last, first)
                if screen is None:
                    show(found)
                else:
                    screen.show(found)
                if looks == args.count:
                    return 0
                if screen is None:
                    time.sleep(args.interval)
                else:
                    end = time.monotonic() + args.interval
                    while (key := screen.key(end - time.monotonic())) is not None:
                        if key == "q":
                            return 0
                        args.sort = _KEYS.get(key, args.sort)
                        screen.show(found := found.sorted(args.sort))
                last = census
    except Stopped as stopped:
        if stopped.number != signal.SIGINT:
            raise
        return 128 + signal.SIGINT  # the usual end, so without a word


def _compare(
    args: Namespace, looks: int, seconds: float, census: Census, last: Census, first: Census
) -> _Round:
    every = (census, last, first)
    processes = _grow(*(one.by_process() for one in every))
    total = _Growth(census.total, census.total - last.total, census.total - first.total)
    return _Round(
        looks,
        seconds,
        census,
        total,
        {who: row for who, row in processes.items() if _is_meant(who, args.process)},
        _grow(*(one.by_exporter() for one in every)),
    ).sorted(args.sort)


def _grow(
    now: dict[_Key, Total], last: dict[_Key, Total], first: dict[_Key, Total]
) -> dict[_Key, _Growth]:
    none = Total()
    return {
        key: _Growth(total, total - last.get(key, none), total - first.get(key, none))
        for key, total in now.items()
    }


def _largest_first(rows: dict[_Key, _Growth], order: str) -> dict[_Key, _Growth]:
    return dict(sorted(rows.items(), key=lambda item: -_ORDERS[order](item[1])))


@dataclass(frozen=True, slots=True, kw_only=True)
class Look(Totals):
    """One look of `dmabuf top`, in one line."""

    look: int
    """The number of the look, from 1."""
    seconds: float
    """Time since the first look."""
    since_last: Total
    """The growth of the total since the last look."""
    since_first: Total
    """The growth of the total since the first look."""
    format: Literal["dmabuf-top/1"] = "dmabuf-top/1"


def _print_json(found: _Round) -> None:
    look = Look(
        **_seen(found.census),
        look=found.number,
        seconds=found.seconds,
        since_last=found.total.last,
        since_first=found.total.first,
        by_process=[ProcessTotal(process, *row) for process, row in found.processes.items()],
        by_exporter=[ExporterTotal(exporter, *row) for exporter, row in found.exporters.items()],
    )
    output.say_json(look, indent=None)


def _print(found: _Round) -> None:
    output.write(("\n" if found.number > 1 else "") + _text(found))
    if found.number == 1:
        _note_refusals(found.census)


class _Screen:
    """Shows each look in place of the one before, as much as there is room for, and reads keys."""

    def __init__(self) -> None:
        self._lines = 0
        self._fd = -1
        self._before: list[Any] = []

    def __enter__(self) -> _Screen:
        import termios
        import tty

        with suppress(OSError, ValueError, AttributeError, termios.error):
            fd = sys.stdin.fileno()
            if os.tcgetpgrp(fd) == os.getpgrp():  # a job in the background may not set it
                self._before = termios.tcgetattr(fd)
                tty.setcbreak(fd)
                self._fd = fd
        return self

    def __exit__(self, *exc: object) -> None:
        import termios

        if self._fd >= 0:
            with suppress(termios.error):
                termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)

    def key(self, seconds: float) -> str | None:
        """Wait for a key and return it; None if none came in time."""
        if self._fd < 0:
            time.sleep(max(seconds, 0))
            return None
        if not select.select([self._fd], [], [], max(seconds, 0))[0]:
            return None
        pressed = os.read(self._fd, 1)
        return pressed.decode("ascii", "replace") if pressed else "q"  # the terminal is gone

    def show(self, found: _Round) -> None:
        """Draw a look."""
        size = os.terminal_size((80, 24))
        with suppress(OSError):
            size = os.get_terminal_size(sys.stdout.fileno())
        notes = [output.printable(f"note: {one}") for one in found.census.refusals]
        if self._fd >= 0:
            notes.append(_HELP)
        for most in range(min(len(found.processes), size.lines), -1, -1):
            lines = _text(found, max(most, 1), size.columns).splitlines() + notes
            rows = sum(max(1, -(-len(line) // max(size.columns, 1))) for line in lines)
            if rows < size.lines:
                break
        up = f"\x1b[{self._lines}A" if self._lines else ""
        output.write(up + "\r\x1b[J" + "\n".join(lines) + "\n")
        self._lines = rows


def _text(found: _Round, most: int | None = None, width: int | None = None) -> str:
    """Return a look: by process, `most` of them at most, and by exporter.

    Where a line has at most `width` characters, the least important columns are left out.
    """
    census = found.census
    text = _headline(census)
    if found.number > 1:
        last, first = _grown(found.total.last), _grown(found.total.first)
        text += f"; since the last look {last}, since the first {first} in {found.seconds:.1f} s"
    if not census.buffers:
        return text + "\n"
    grown = ("last look", "first look")
    rows: _Rows = [
        (
            _process(process, census),
            *_figures(row.total, census),
            _size(row.total.share, census),
            _grown(row.last),
            _grown(row.first),
        )
        for process, row in found.processes.items()
    ]
    if most is not None and len(rows) > most:
        rows[most - 1 :] = [(f"and {len(rows) - most + 1} more", *[""] * 5)]
    text += "\n\n"
    head = ("process", "buffers", "size", "share", *grown)
    text += output.table(head, rows, title="by process", width=width, spare=(4, 3, 1, 5))
    rows = [
        (exporter or "?", *_figures(row.total, census), _grown(row.last), _grown(row.first))
        for exporter, row in found.exporters.items()
    ]
    columns = ("exporter", "buffers", "size", *grown)
    text += "\n"
    return text + output.table(columns, rows, title="by exporter", width=width, spare=(3, 1, 4))


def _grown(total: Total) -> str:
    """Return a growth in bytes and buffers."""
    if total == Total():
        return "0"
    sign = "+" if total.nbytes >= 0 else ""
    return f"{sign}{format_size(total.nbytes)} ({total.buffers:+d})"


TOP = Command(
    """\
Show every dma-buf on the machine that this user may see, again and again, until Ctrl-C.

A line for each process has the number and size of the buffers that it holds, each counted once, its
share of buffers that several hold, and the growth since the last look and since the first. Below,
the same by exporter. "kernel" are buffers that no process holds. --sort first puts leaks first.

Everything is read from /proc and debugfs; no buffer is touched. Notes name what this user may not
see. On a terminal the lines stay in place, columns that do not fit are left out, and keys sort: s
by size, h by share, b by buffers, l by the last look, f by the first; q quits. Elsewhere each look
is printed below the last, and with --json as one line. The exit status is 0 after --count looks or
q, and 130 after Ctrl-C.""",
    _top_arguments,
    _top,
    """\
  sudo dmabuf top
  sudo dmabuf top --sort first --interval 10
  dmabuf top --process 4711 --count 2 --interval 60 --json | jq .since_last""",
)
