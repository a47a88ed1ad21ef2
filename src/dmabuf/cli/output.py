"""What every command prints with: lines, tables, JSON, sizes, errors and progress.

Results go to standard output; notes, progress and errors to standard error. A line that contains a
name is escaped, because anyone may choose a name: it stays one line and moves no cursor.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, TextIO

FAILED, MISUSED = 1, 2
CLOSED_PIPE = 128 + signal.SIGPIPE
STDIN, STDOUT = "standard input", "standard output"

Row = Sequence[str]


def write(text: str, *, stream: TextIO | None = None) -> None:
    """Write text as it is to a stream, by default standard output. Raises OSError if that fails."""
    stream = stream or sys.stdout
    if stream is None:
        raise OSError(errno.EBADF, "is closed", STDOUT)
    try:
        binary = getattr(stream, "buffer", None)
        if binary is None:
            stream.write(text)
        else:
            stream.flush()
            binary.write(text.encode(stream.encoding, "backslashreplace"))  # ASCII in locale C
        stream.flush()
    except OSError as error:
        error.filename = error.filename or ("standard error" if stream is sys.stderr else STDOUT)
        raise


def say(line: str, *, stream: TextIO | None = None) -> None:
    """Write one line, with control characters escaped."""
    write(printable(line) + "\n", stream=stream)


def say_json(document: object, *, stream: TextIO | None = None, indent: int | None = 2) -> None:
    """Write a record for programs; see :func:`to_json`."""
    write(to_json(document, indent) + "\n", stream=stream)


def to_json(document: object, indent: int | None = 2) -> str:
    """Return a record for programs, in ASCII. A byte that is not UTF-8 is a lone surrogate.

    The record is a dataclass with `format: Literal["dmabuf-NAME/VERSION"]`; see CONTRIBUTING.md.
    """
    import json

    return json.dumps(document, indent=indent, default=_plain)


def _plain(value: object) -> dict[str, object]:
    return dict(value) if isinstance(value, Mapping) else fields_of(value)


def fields_of(record: Any) -> dict[str, Any]:
    """Return the fields of a dataclass by name, `format` first."""
    from dataclasses import fields

    names = sorted((one.name for one in fields(record)), key=lambda name: name != "format")
    return {name: getattr(record, name) for name in names}


def note(text: str) -> None:
    """Report what is worth knowing but not a result."""
    with suppress(OSError):  # the reader is gone
        say(text, stream=sys.stderr)


def error(text: str) -> None:
    """Report what went wrong."""
    note(f"error: {text}")


def flush(status: int) -> int:
    """Return the exit status once all output has been written or never will be.

    Otherwise Python would flush again at exit, complain, and exit with status 120.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            status = status or FAILED
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
    return status


def explain(problem: BaseException) -> str:
    """Return an exception as `what: why`, with advice for the command line."""
    text = str(problem) or type(problem).__name__
    if isinstance(problem, OSError) and problem.strerror:
        name = problem.filename
        name = os.fsdecode(name) if isinstance(name, bytes) else name
        text = problem.strerror if name is None else f"{name}: {problem.strerror}"
    for keyword, option in (("pass force=True", "give --force"), ("with size", "with --size")):
        text = text.replace(keyword, option)
    return text


def decimal(nbytes: float, suffix: str = "B") -> str:
    """Return a number of bytes in decimal units, as data sheets have them: `90.9 MB`."""
    for unit in ("", "k", "M", "G", "T"):
        if nbytes < 999.95 or unit == "T":
            break
        nbytes /= 1000
    return f"{nbytes:.1f} {unit}{suffix}" if unit else f"{nbytes:.0f} {suffix}"


def printable(text: str) -> str:
    """Return a text with everything escaped that could move a cursor or hide something."""
    return text if text.isprintable() and "\\" not in text else "".join(map(_visible, text))


def _visible(character: str) -> str:
    if character != "\\" and character.isprintable():
        return character
    if "\udc80" <= character <= "\udcff":  # a byte that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def table(
    head: Row,
    rows: Sequence[Row],
    *,
    left: Sequence[int] = (0,),
    title: str = "",
    width: int | None = None,
    spare: Sequence[int] = (),
) -> str:
    """Return an aligned table. Columns in `left` are text, the others figures.

    While lines are longer than `width` characters, the columns in `spare` are left out one after
    the other. No cell is cut: what is still too long wraps on a terminal.
    """
    cells = [list(head), *([printable(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    shown = list(range(len(head)))
    for column in spare:
        if width is None or sum(widths[at] + 2 for at in shown) - 2 <= width:
            break
        shown.remove(column)
    lines = [title] if title else []
    for row in cells:
        parts = (
            row[at].ljust(widths[at]) if at in left else row[at].rjust(widths[at]) for at in shown
        )
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines) + "\n"


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether a stream is a terminal that moves its cursor."""
    return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"


class Progress:
    """A line of progress on standard error, from one second after the start."""

    def __init__(self, wanted: bool | None) -> None:
        self._terminal = is_terminal(sys.stderr)
        self._shown = self._terminal if wanted is None else wanted
        self._begun = time.monotonic()
        self._next = self._begun + 1
        self._drawn = False

    def show(self, title: str, done: int, total: int | None) -> None:
        """Show that `done` of `total` bytes are done, unless that was shown a moment ago."""
        now = time.monotonic()
        if not self._shown or now < self._next:
            return
        self._next = now + (0.1 if self._terminal else 1)
        text = f"{title}: {decimal(done)}"
        if total:
            text += f" of {decimal(total)} ({100 * done // total}%)"
        text += f", {decimal(done / (now - self._begun), 'B/s')}"
        if not self._terminal:
            note(text)
            return
        self._drawn = True
        with suppress(OSError):
            width = os.get_terminal_size(sys.stderr.fileno()).columns or 80
            write(f"\r{printable(text)[: width - 1]}\x1b[K", stream=sys.stderr)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._drawn:
            with suppress(OSError):
                write("\r\x1b[K", stream=sys.stderr)
