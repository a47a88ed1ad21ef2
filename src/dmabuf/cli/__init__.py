"""The room of the command `dmabuf`: parse a command line, call the library, print the result.

One file a command, small ones in families; `output.py` has tables, JSON and progress. What enters
here prints or parses: what a program could want to call belongs in the room that it is about. The
module of a command is imported when that command runs, so that `--help` and `--version` are quick.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from dmabuf import __version__

TYPE_CHECKING = False  # typing's own, without what importing typing costs
if TYPE_CHECKING:
    from dmabuf.cli.parser import Command

__all__ = ["main"]

ABOUT = "Move bytes between files and dma-bufs, and see by which route."
COMMANDS = {
    "cp": ("cp", "Copy a file, device or stream; report the route."),
    "record": ("record", "Record frames of a camera: raw, Y4M or PNG."),
    "doctor": ("doctor", "Show what this machine and a path support."),
    "verify": ("verify", "Test whether bytes arrive, by every route."),
    "bench": ("bench", "Measure every route beside what people use today."),
    "ls": ("store", "List the buffers of the store or of the system."),
    "top": ("system", "Show who holds dma-bufs, again and again."),
    "serve": ("serve", "Hold named buffers for other processes."),
    "ping": ("serve", "Ask whether the store answers."),
    "put": ("store", "Copy a file into a named buffer."),
    "get": ("store", "Copy a named buffer into a file."),
    "stat": ("store", "Show the status of a named buffer."),
    "rm": ("store", "Remove names from the store."),
    "mv": ("store", "Rename a buffer of the store."),
    "chmod": ("store", "Change who may open buffers of the store."),
    "df": ("store", "Show how full the store is."),
    "model": ("model", "Load a model once for all processes."),
    "mount": ("mount", "Show the buffers of the store as files."),
    "export": ("export", "Show a buffer of the store as a disk."),
    "exec": ("exec", "Run a program with a dma-buf as a file."),
}
"""The module and the summary of each command."""


def load(name: str) -> Command:
    """Return a command, importing its module. Raises ImportError if the module needs another."""
    module = import_module(f"dmabuf.cli.{COMMANDS[name][0]}")
    command: Command = getattr(module, name.upper())
    return command


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (by default sys.argv); return the exit status.

    0 is success; 1 a failure, reported on standard error as `error: what: why; fix`; 2 an invalid
    command line, or none, for which the help is printed on standard error; 128 + n the end by
    signal n, so 130 is Ctrl-C and 141 a closed pipe.
    """
    from dmabuf.cli import output

    return output.flush(_run(list(sys.argv[1:] if argv is None else argv)))


def _run(words: list[str]) -> int:
    from dmabuf.cli import output

    first = words[0] if words else ""
    if first in COMMANDS:
        from dmabuf.cli import parser

        try:
            command = load(first)
        except ImportError as problem:
            parser.report(problem, "--json" in words)
            return output.FAILED
        return parser.run(command, first, words[1:])
    try:
        if first in ("-h", "--help"):
            output.write(_help())
        elif first == "--version":
            output.write(f"dmabuf {__version__}\n")
        elif words:
            from dmabuf.cli.parser import Misuse, report

            text = f"unknown command '{first}'; try 'dmabuf --help'"
            report(Misuse(text), "--json" in words)
            return output.MISUSED
        else:
            output.write(_help(), stream=sys.stderr)
            return output.MISUSED
    except BrokenPipeError:
        return output.CLOSED_PIPE
    except OSError as problem:
        output.error(output.explain(problem))
        return output.FAILED
    return 0


def _help() -> str:
    lines = [f"  {name:<8}{summary}" for name, (_, summary) in COMMANDS.items()]
    return (
        f"usage: dmabuf COMMAND [ARGUMENT ...]\n\n{ABOUT}\n\ncommands:\n"
        + "\n".join(lines)
        + "\n\noptions:\n  -h, --help  Show this text, or that of a command: dmabuf cp --help\n"
        "  --version   Show the version.\n"
    )
