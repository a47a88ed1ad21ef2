"""`dmabuf exec`: run a program that is handed a dma-buf as a file."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import asdict, dataclass
from typing import Annotated, NoReturn

import typer

from dmabuf import _as_file
from dmabuf.cli import _options, _output

_HELP = """\
Run PROGRAM with descriptor N, which is a dma-buf (or a memfd), made one that read(2), write(2),
lseek(2) and mmap(2) work on.

dmabuf becomes PROGRAM, as exec(2) has it, so its exit status, signals and other descriptors are its
own. Where N is a dma-buf, FUSE makes the file: a process in the background copies for each call,
and ends with the file. N stays N, and the environment variable DMABUF_FD names it.
"""

_EXAMPLES = """\
Examples:

\b
  dmabuf exec --fd 3 -- sha256sum /dev/fd/3
  dmabuf exec --fd 3 -- dd of=/dev/fd/3 if=frame.raw
  dmabuf exec --fd 0 --read-only -- xxd

The exit status is PROGRAM's; 127 where there is no such program, 126 where it cannot be run, 1
where N cannot be made a file, 2 for a command line that cannot be understood.
"""

NOT_FOUND, NOT_RUN = 127, 126


@dataclass(frozen=True, slots=True)
class Told:
    """What is told with --verbose or --json, on standard error: standard output is PROGRAM's."""

    fd: int
    size: int
    mode: str
    way: str
    reason: str


def add_to(app: typer.Typer) -> None:
    """Add the command to the parser."""
    settings = {"allow_interspersed_args": False}  # what follows PROGRAM is PROGRAM's
    app.command("exec", help=_HELP, epilog=_EXAMPLES, context_settings=settings)(_command)


def _command(
    program: Annotated[
        list[str], typer.Argument(metavar="PROGRAM", help="What to run, and its arguments.")
    ],
    fd: Annotated[int, typer.Option("--fd", metavar="N", min=0, help="The descriptor's number.")],
    read_only: Annotated[
        bool, typer.Option("--read-only", "-r", help="PROGRAM may not write.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Tell which way was taken, and why.")
    ] = False,
    json: _options.Json = False,
) -> None:
    with _output.orderly(), _as_file.of_descriptor(fd, read_only=read_only) as file:
        told = Told(fd, os.fstat(file.fileno()).st_size, file.mode, file.way, file.reason)
        if json:
            _output.say_json(asdict(told), stream=sys.stderr)
        elif verbose:
            _output.note(
                f"descriptor {fd}: {told.size} bytes, {told.mode}, by {told.way}: {told.reason}"
            )
        _become(program, file.fileno(), fd)


def _become(program: list[str], file: int, fd: int) -> NoReturn:
    """Run the program in this process's place, with ``file`` as its descriptor ``fd``."""
    before = os.dup(fd)
    os.dup2(file, fd)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python ignores
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvpe(program[0], program, {**os.environ, "DMABUF_FD": str(fd)})
    except OSError as problem:
        os.dup2(before, fd)  # so that no message ends up in the buffer, as its descriptor 2
        _output.error(f"{program[0]}: {problem.strerror}")
        missing = isinstance(problem, FileNotFoundError)
        raise typer.Exit(NOT_FOUND if missing else NOT_RUN) from None
