"""Parses the command line of one command, and runs it with signals and errors in order."""

from __future__ import annotations

import argparse
import errno
import os
import shutil
import signal
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from textwrap import fill
from types import FrameType
from typing import Any, Literal, NoReturn

from dmabuf.cli import output
from dmabuf.sizes import OFFSET_MAX, parse_size


@dataclass(frozen=True, slots=True)
class Command:
    """A command: its help, its arguments, and the function that carries it out."""

    help: str
    arguments: Callable[[Parser], None]
    run: Callable[[Namespace], int | None]
    """Returns the exit status; None is 0."""
    examples: str = ""


@dataclass(frozen=True, slots=True)
class Failure:
    """An error, as --json prints it: one line on standard error."""

    message: str
    """What was attempted, the cause, and the fix if there is one."""
    errno: str | None
    """The name of the kernel's error, such as ENOENT; null if it was none of the kernel's."""
    path: str | None
    """The file, device or name that the error is about."""
    format: Literal["dmabuf-error/1"] = "dmabuf-error/1"


class Misuse(Exception):
    """The command line is invalid; the text has the cause."""


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Fills paragraphs to the width of the terminal, but for those with indented lines."""

    def __init__(self, prog: str) -> None:
        width = max(40, min(shutil.get_terminal_size().columns, 100))
        super().__init__(prog, max_help_position=28, width=width)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        parts = (
            one if "\n  " in one else fill(one, width, break_on_hyphens=False)
            for one in text.split("\n\n")
        )
        return "\n\n".join(parts)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises Misuse, with the options that several commands share."""

    def __init__(self, prog: str, command: Command, color: bool = False) -> None:
        # Subparsers of Python 3.14 and later pass `color`. Help is the same on each Python.
        super().__init__(
            prog,
            description=command.help,
            epilog=f"examples:\n{command.examples}" if command.examples else None,
            formatter_class=_Formatter,
            allow_abbrev=False,
            add_help=False,
        )
        self.color = color
        self.add_argument("-h", "--help", action="help", help="Show this text.")
        command.arguments(self)

    def error(self, message: str) -> NoReturn:
        """Raise Misuse."""
        raise Misuse(message)

    def print_help(self, file: object = None) -> None:
        """Write the help to standard output."""
        output.write(self.format_help())

    def option(
        self,
        names: str,
        metavar: str,
        help: str,  # noqa: A002 - the name that argparse uses
        parse: Callable[[str], Any] = str,
        default: object = None,
        choices: Sequence[str] | None = None,
    ) -> argparse.Action:
        """Add an option with a value; `names` are separated by a space."""
        shown = "|".join(choices) if choices else metavar
        return self.add_argument(
            *names.split(), metavar=shown, help=help, type=parse, default=default, choices=choices
        )

    def flag(self, names: str, help: str) -> None:  # noqa: A002
        """Add an option without a value."""
        self.add_argument(*names.split(), action="store_true", help=help)

    def shared(self, *names: str) -> None:
        """Add options that several commands share, by their names."""
        for name in names:
            if name in _SHARED_FLAGS:
                self.flag(*_SHARED_FLAGS[name])
            elif name == "progress":
                action = argparse.BooleanOptionalAction
                text = "Show progress after a second. [default: on a terminal]"
                self.add_argument("--progress", action=action, default=None, help=text)
            else:
                option = self.option(*_SHARED_OPTIONS[name])
                if name == "exporter":
                    complete_by(option, _exporters)


def complete_by(action: argparse.Action, values: Callable[[Namespace], Iterable[str]]) -> None:
    """Have shells complete an argument; `values` gets the arguments before it.

    argcomplete completes `choices` without this. No OSError of `values` reaches the terminal.
    """

    def complete(parsed_args: Namespace, **rest: object) -> list[str]:
        with suppress(OSError):
            return list(values(parsed_args))
        return []

    setattr(action, "completer", complete)  # noqa: B010 - the attribute is argcomplete's


def _exporters(args: Namespace) -> list[str]:
    heaps = os.listdir("/dev/dma_heap") if os.path.isdir("/dev/dma_heap") else []
    return ["auto", "udmabuf", "memfd", *heaps]


def size(text: str) -> int:
    """Parse a size, for `type=`."""
    try:
        return parse_size(text, "size")
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def number(least: float, most: float, kind: type[int] | type[float] = int) -> Callable[[str], Any]:
    """Return a parser of numbers from `least` to `most`, for `type=`."""

    def parse(text: str) -> float:
        with suppress(ValueError):
            if least <= kind(text) <= most:
                return kind(text)
        raise ArgumentTypeError(f"invalid number '{text}': use one from {least} to {most}")

    return parse


def _region(text: str) -> tuple[int, int]:
    offset, _, length = text.partition("+")
    with suppress(ValueError):
        region = parse_size(offset), parse_size(length)
        if region[1] and sum(region) <= OFFSET_MAX:
            return region
    raise ArgumentTypeError(f"invalid region '{text}': use OFFSET+SIZE, such as 1GiB+64MiB")


_SHARED_FLAGS = {
    "json": ("--json", "Print the result, and an error, as JSON."),
    "quiet": ("-q --quiet", "Print only errors."),
    "sync": ("--sync", "Return when the bytes are on the medium."),
    "force": ("-f --force", "Write to a mounted device; replace a file without permission."),
    "destroy": ("--destroy", "Overwrite the region; test writes too."),
}
_SHARED_OPTIONS: dict[str, tuple[Any, ...]] = {
    "exporter": (
        "--exporter", "NAME", "What makes the buffer: auto, udmabuf, memfd or a heap.", str, "auto"
    ),
    "size": ("--size", "SIZE", "The most bytes, as 4096 or 1GiB.", size),
    "region": ("--region", "OFFSET+SIZE", "The part to overwrite.", _region),
    "socket": (
        "--socket", "PATH",
        "The store's. [default: $XDG_RUNTIME_DIR/dmabuf.sock; root: /run/dmabuf.sock]",
    ),
    "process": ("--process", "PID|COMMAND", "Only buffers that this process holds."),
    "of-exporter": ("--exporter", "NAME", "Only buffers of this exporter."),
}  # fmt: skip


def region(args: Namespace) -> tuple[int, int] | None:
    """Return the region to overwrite; raise Misuse unless --region and --destroy come together."""
    if args.destroy != (args.region is not None):
        missing = "--region OFFSET+SIZE" if args.destroy else "--destroy"
        given = "--destroy" if args.destroy else "--region"
        raise Misuse(f"{given} needs {missing}: nothing is overwritten unless both are given")
    wanted: tuple[int, int] | None = args.region
    return wanted


def run(command: Command, name: str, words: Sequence[str]) -> int:
    """Parse the words after the command's name, carry it out, and return the exit status."""
    prog = f"dmabuf {name}"
    parser = Parser(prog, command)
    as_json = "--json" in words[: words.index("--") if "--" in words else None]
    try:
        args = parser.parse_args(words)
        if getattr(args, "quiet", False) and args.progress is None:
            args.progress = False
        with _signals():
            return command.run(args) or 0
    except SystemExit:  # after --help
        return 0
    except Misuse as misuse:
        report(misuse, as_json)
        if not as_json:
            output.note(f"try '{prog} --help'")
        return output.MISUSED
    except KeyboardInterrupt as stopped:
        number = signal.Signals(getattr(stopped, "number", signal.SIGINT))
        report(KeyboardInterrupt(f"stopped by {number.name}"), as_json)
        return 128 + number
    except (OSError, ValueError, EOFError, BufferError, ImportError) as problem:
        if getattr(problem, "errno", None) == errno.EPIPE and (
            getattr(problem, "filename", None) in (None, output.STDOUT)
        ):
            return output.CLOSED_PIPE
        report(problem, as_json)
        return output.FAILED


def report(problem: BaseException, as_json: bool) -> None:
    """Report an error on standard error; as JSON it is one line, a `Failure`."""
    text = output.explain(problem)
    if not as_json:
        output.error(text)
        return
    name, number = getattr(problem, "filename", None), getattr(problem, "errno", None)
    failure = Failure(
        message=text,
        errno=_ERRNO_NAMES.get(number) if isinstance(number, int) else None,
        path=os.fsdecode(name) if isinstance(name, str | bytes) else None,
    )
    with suppress(OSError):  # the reader is gone
        output.say_json(failure, stream=sys.stderr, indent=None)


_PREFERRED = {errno.EOPNOTSUPP: "EOPNOTSUPP", errno.EDEADLK: "EDEADLK"}
_ERRNO_NAMES = {**errno.errorcode, **_PREFERRED}
"""The names of errnos; where Linux has two, the one that the manual pages use."""


class Stopped(KeyboardInterrupt):
    """SIGINT, SIGTERM or SIGHUP arrived."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def _signals() -> Iterator[None]:
    """Raise Stopped at the first signal, so that cleanup runs; ignore the others meanwhile."""
    before: dict[signal.Signals, Any] = {}

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        for known in before:
            signal.signal(known, signal.SIG_IGN)
        raise Stopped(number)

    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                before[number] = signal.signal(number, stop)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
