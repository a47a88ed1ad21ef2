"""`dmabuf top`: who holds dma-bufs on this machine, again and again, and how that grows."""

from __future__ import annotations

import json as json_module
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, TypeVar

import typer

from dmabuf.cli import _options, _output, _system, _table
from dmabuf.sizes import format_size
from dmabuf.system import Census, Process, Total

_HELP = """\
Look at every dma-buf on the machine that this user may see, again and again, until Ctrl-C.

A line for each process: how many buffers it holds, how large they are, each counted once, its
share where several hold one, and how much that has grown since the last look and since the first.
Below, the same by exporter. "kernel" are buffers that no process holds. With --sort first, what
leaks comes first.

It is read from /proc and debugfs, and no buffer is touched; what this user may not see is told. On
a terminal the lines stay in place; elsewhere each look is printed below the one before, and with
--json as one line. The exit status is 0 after --count looks, and 130 after Ctrl-C.
"""

_EXAMPLES = """\
Examples:

\b
  sudo dmabuf top
  sudo dmabuf top --sort first --interval 10
  dmabuf top --process 4711 --count 2 --interval 60 --json | jq .total.since_last
"""


_Key = TypeVar("_Key", bound=Hashable)


class Row(NamedTuple):
    """A process or exporter: what it has, and how much more than before."""

    total: Total
    last: Total
    """More than at the last look."""
    first: Total
    """More than at the first."""


_ORDERS: dict[str, Callable[[Row], int]] = {
    "size": lambda row: row.total.nbytes,
    "share": lambda row: row.total.share,
    "buffers": lambda row: row.total.buffers,
    "last": lambda row: row.last.nbytes,
    "first": lambda row: row.first.nbytes,
}


@dataclass(frozen=True, slots=True)
class Options:
    """The command line, as it was understood."""

    interval: float = 2.0
    count: int | None = None
    sort: str = "size"
    process: str | None = None
    exporter: str | None = None
    json: bool = False


def add_to(app: typer.Typer) -> None:
    """Add the command to the parser."""
    app.command("top", help=_HELP, epilog=_EXAMPLES)(_command)


def _command(
    interval: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.1, max=86400, help="Between two looks.")
    ] = 2.0,
    count: Annotated[
        int | None,
        typer.Option("--count", "-n", metavar="N", min=1, help="Looks. [default: until Ctrl-C]"),
    ] = None,
    sort: Annotated[
        str, typer.Option(metavar="|".join(_ORDERS), help="What comes first is the most of it.")
    ] = "size",
    process: _options.Process = None,
    exporter: _options.Made = None,
    json: _options.Json = False,
) -> None:
    if sort not in _ORDERS:
        raise typer.BadParameter(f"--sort {sort}: one of {', '.join(_ORDERS)}")
    with _output.orderly():
        run(Options(interval, count, sort, process, exporter, json))


@dataclass(frozen=True, slots=True)
class Round:
    """A look, and what has grown."""

    number: int
    seconds: float
    """Since the first look."""
    census: Census
    total: Row
    processes: dict[Process | None, Row]
    exporters: dict[str | None, Row]


class Watch:
    """Look after look."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._number = 0
        self._begun = 0.0
        self._first: Census | None = None
        self._last: Census | None = None

    def look(self) -> Round:
        """One more."""
        options = self._options
        census = _system.look(options.process, options.exporter)
        now = time.monotonic()
        if self._first is None or self._last is None:
            self._first = self._last = census
            self._begun = now
        self._number += 1
        first, last = self._first, self._last
        self._last = census
        processes = self._ordered(_rows(*(one.by_process() for one in (census, last, first))))
        return Round(
            self._number,
            now - self._begun,
            census,
            Row(census.total, census.total - last.total, census.total - first.total),
            {
                process: row
                for process, row in processes.items()
                if _system.is_meant(process, options.process)
            },
            self._ordered(_rows(*(one.by_exporter() for one in (census, last, first)))),
        )

    def _ordered(self, rows: dict[_Key, Row]) -> dict[_Key, Row]:
        order = _ORDERS[self._options.sort]
        return dict(sorted(rows.items(), key=lambda item: -order(item[1])))


def _rows(
    now: dict[_Key, Total], last: dict[_Key, Total], first: dict[_Key, Total]
) -> dict[_Key, Row]:
    none = Total()
    return {
        key: Row(total, total - last.get(key, none), total - first.get(key, none))
        for key, total in now.items()
    }


def run(options: Options) -> None:
    """Look and tell, until there were enough looks.

    Raises:
        OSError: there is nothing to look at.
        KeyboardInterrupt: Ctrl-C, the end where `count` is none.
    """
    watch = Watch(options)
    with _display(options) as show:
        while True:
            found = watch.look()
            show(found)
            if found.number == options.count:
                break
            time.sleep(options.interval)


@contextmanager
def _display(options: Options) -> Iterator[Callable[[Round], None]]:
    """What shows a round: in place on a terminal, else one below the other."""
    with ExitStack() as stack:
        if options.json:
            yield lambda found: _output.say(json_module.dumps(as_json(found)))
        elif sys.stdout is not None and sys.stdout.isatty():
            yield _in_place(stack)
        else:
            yield _print


def _print(found: Round) -> None:
    if found.number > 1:
        _output.say("")
    _output.say(headline(found))
    for table in _tables(found):
        _output.say("\n" + _table.drawn(*table))
    if found.number == 1:
        _system.tell_refusals(found.census)


def _in_place(stack: ExitStack) -> Callable[[Round], None]:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    console = Console(highlight=False)
    live = stack.enter_context(Live(console=console, auto_refresh=False))

    def show(found: Round) -> None:
        notes = [Text(f"note: {_output.printable(one)}") for one in found.census.refusals]
        taken = sum(len(console.render_lines(note)) for note in notes)
        below = 5 + len(found.exporters)  # title, head and their rule, and an empty line above
        room = max(1, console.height - 7 - below - taken)
        tables = [_table.table(*one) for one in _tables(found, room)]
        live.update(Group(Text(headline(found)), *tables, *notes), refresh=True)

    return show


def headline(found: Round) -> str:
    """What it all comes to."""
    text = _system.headline(found.census)
    if found.number == 1:
        return text
    last, first = _grown(found.total.last), _grown(found.total.first)
    return f"{text}; since the last look {last}, since the first {first} in {found.seconds:.1f} s"


def _tables(found: Round, room: int | None = None) -> Iterator[_table.Content]:
    """By process, `room` lines of them at most, and by exporter."""
    if not found.census.buffers:
        return
    census = found.census
    rows = [
        (_system.process_of(process, census), *_cells(row, census, shared=True))
        for process, row in found.processes.items()
    ]
    if room is not None and len(rows) > room:
        rows[room - 1 :] = [(f"and {len(rows) - room + 1} more", *[""] * 5)]
    grown = ("last look", "first look")
    yield "by process", ("process", "buffers", "size", "share", *grown), rows
    rows = [
        (_system.exporter_of(exporter), *_cells(row, census))
        for exporter, row in found.exporters.items()
    ]
    yield "by exporter", ("exporter", "buffers", "size", *grown), rows


def _cells(row: Row, census: Census, *, shared: bool = False) -> Sequence[str]:
    share = [_system.size(row.total.share, census)] if shared else []
    grown = [_grown(row.last), _grown(row.first)]
    return *_system.figures(row.total, census), *share, *grown


def _grown(total: Total) -> str:
    """A growth, for people: bytes, and buffers."""
    if total == Total():
        return "0"
    sign = "+" if total.nbytes >= 0 else ""
    return f"{sign}{format_size(total.nbytes)} ({total.buffers:+d})"


def as_json(found: Round) -> dict[str, Any]:
    """A round, for programs."""
    return {
        "format": _system.FORMAT,
        "look": found.number,
        "seconds": found.seconds,
        "total": _row_as_json(found.total),
        "by_process": [
            _system.process_as_json(process) | _row_as_json(row)
            for process, row in found.processes.items()
        ],
        "by_exporter": [
            {"exporter": exporter} | _row_as_json(row) for exporter, row in found.exporters.items()
        ],
        **_system.seen_as_json(found.census),
    }


def _row_as_json(row: Row) -> dict[str, Any]:
    return _system.total_as_json(row.total) | {
        "since_last": _system.total_as_json(row.last),
        "since_first": _system.total_as_json(row.first),
    }
