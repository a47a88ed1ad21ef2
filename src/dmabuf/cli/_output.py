"""What the commands have in common: saying things, counting bytes, and ending in order.

Results go to standard output; notes, progress and errors to standard error.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn, TextIO

import typer

FAILED = 1
CLOSED_PIPE = 128 + signal.SIGPIPE


def say(text: str, *, stream: TextIO | None = None) -> None:
    """A result. Names that are not UTF-8 come out as the bytes they are."""
    stream = stream or sys.stdout
    if stream is None:  # closed by whoever started us
        return
    binary = getattr(stream, "buffer", None)
    if binary is None:
        stream.write(text + "\n")
    else:
        stream.flush()
        binary.write(os.fsencode(text + "\n"))
    stream.flush()


def say_json(value: Any, *, stream: TextIO | None = None) -> None:
    """A result for programs, in ASCII: a name's byte that is not UTF-8 is a lone surrogate."""
    say(json.dumps(value, indent=2), stream=stream)


def note(text: str) -> None:
    """Something worth knowing that is no result."""
    _complain(text)


def error(text: str) -> None:
    """What went wrong and why."""
    _complain(f"error: {text}")


def _complain(text: str) -> None:
    with suppress(OSError):  # nobody listens
        say(text, stream=sys.stderr)


def settled(status: int) -> int:
    """The exit status, when all that was said has been written, or never will be.

    Python would try it again at its end, complain, and end with a status of its own: 120.
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
    """An exception as `what: why`."""
    if isinstance(problem, OSError) and problem.strerror:
        name = problem.filename
        if isinstance(name, bytes):
            name = os.fsdecode(name)
        text = _as_options(problem.strerror)
        return text if name is None else f"{name}: {text}"
    return _as_options(str(problem)) or type(problem).__name__


def _as_options(text: str) -> str:
    """Advice for Python programs as advice for the command line."""
    for keyword, option in (("pass force=True", "give --force"), ("with size", "with --size")):
        text = text.replace(keyword, option)
    return text


def decimal(nbytes: float, suffix: str = "B") -> str:
    """A number of bytes as people compare them with a device's data sheet: `90.9 MB`."""
    for unit in ("", "k", "M", "G", "T"):
        if nbytes < 999.95 or unit == "T":
            break
        nbytes /= 1000
    return f"{nbytes:.1f} {unit}{suffix}" if unit else f"{nbytes:.0f} {suffix}"


def printable(text: str) -> str:
    """A name that anyone may have chosen, as one line that moves no cursor and hides nothing."""
    return "".join(map(_visible, text))


def _visible(character: str) -> str:
    if character != "\\" and character.isprintable():
        return character
    if "\udc80" <= character <= "\udcff":  # a byte that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


class Stopped(KeyboardInterrupt):
    """SIGINT, SIGTERM or SIGHUP came."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def orderly() -> Iterator[None]:
    """Turn signals into an exception, so that all is tidied, and exceptions into an exit status.

    Only the first signal does: what tidies up is not to be interrupted.
    """
    before: dict[signal.Signals, Any] = {}

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        for known in before:
            signal.signal(known, signal.SIG_IGN)
        raise Stopped(number)

    try:
        try:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                    before[number] = signal.signal(number, stop)
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    except KeyboardInterrupt as stopped:
        number = getattr(stopped, "number", signal.SIGINT)
        error(f"stopped by {signal.Signals(number).name}")
        raise typer.Exit(128 + number) from None
    except OSError as problem:
        if problem.errno == errno.EPIPE and problem.filename in (None, STDOUT):
            raise typer.Exit(CLOSED_PIPE) from None
        error(explain(problem))
        raise typer.Exit(FAILED) from None
    except (ValueError, EOFError, BufferError, ImportError) as problem:
        error(explain(problem))
        raise typer.Exit(FAILED) from None


STDOUT = "standard output"
"""What errors call descriptor 1."""
STDIN = "standard input"
"""What errors call descriptor 0."""
