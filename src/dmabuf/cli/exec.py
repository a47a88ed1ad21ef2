"""`dmabuf exec`: run a program that gets a dma-buf as a file."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from argparse import Namespace
from dataclasses import dataclass
from typing import Literal

from dmabuf.cli import output
from dmabuf.cli.parser import Command, Misuse, Parser, number
from dmabuf.memory import descriptor_as_file

_NOT_FOUND, _NOT_RUN = 127, 126


@dataclass(frozen=True, slots=True)
class Opened:
    """What `dmabuf exec --json` reports on standard error before it becomes PROGRAM."""

    fd: int
    size: int
    """Bytes of the buffer."""
    mode: str
    """What PROGRAM may do: "r", "w" or "r+"."""
    way: str
    """How the buffer became a file."""
    reason: str
    format: Literal["dmabuf-exec/1"] = "dmabuf-exec/1"


def _arguments(parser: Parser) -> None:
    parser.usage = "dmabuf exec [-h] --fd N [-r] [-v] [--json] [--] PROGRAM [ARGUMENT ...]"
    parse, text = number(0, 1 << 62), "The descriptor's number."
    parser.add_argument("--fd", metavar="N", type=parse, required=True, help=text)
    parser.flag("-r --read-only", "PROGRAM may not write.")
    parser.flag("-v --verbose", "Report which way was taken, and why.")
    parser.shared("json")
    text = "The program and its arguments."
    parser.add_argument("program", metavar="PROGRAM", nargs=argparse.REMAINDER, help=text)


def _run(args: Namespace) -> int:
    program = args.program[1:] if args.program[:1] == ["--"] else args.program
    if not program:
        raise Misuse("the following arguments are required: PROGRAM")
    with descriptor_as_file(args.fd, read_only=args.read_only) as file:
        size = os.fstat(file.fileno()).st_size
        if args.json:
            told = Opened(args.fd, size, file.mode, file.way, file.reason)
            output.say_json(told, stream=sys.stderr)  # standard output is PROGRAM's
        elif args.verbose:
            output.note(
                f"descriptor {args.fd}: {size} bytes, {file.mode}, by {file.way}: {file.reason}"
            )
        return _become(program, file.fileno(), args.fd)


def _become(program: list[str], file: int, fd: int) -> int:
    """Replace this process by the program, with `file` as its descriptor `fd`."""
    before = os.dup(fd)
    os.dup2(file, fd)
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them
        signal.signal(ignored, signal.SIG_DFL)
    try:
        os.execvpe(program[0], program, {**os.environ, "DMABUF_FD": str(fd)})
    except OSError as problem:
        os.dup2(before, fd)  # so that no message ends up in the buffer if it is descriptor 2
        output.error(f"{program[0]}: {problem.strerror}")
        return _NOT_FOUND if isinstance(problem, FileNotFoundError) else _NOT_RUN


EXEC = Command(
    """\
Run PROGRAM with descriptor N, a dma-buf (or a memfd), as a file for read(2), write(2), lseek(2) and
mmap(2).

dmabuf becomes PROGRAM by exec(2), so its exit status, signals and other descriptors are its own. A
dma-buf becomes a file by FUSE: a background process copies for each call, and ends with the file. N
stays N, and the environment variable DMABUF_FD contains it.

The exit status is PROGRAM's; 127 if there is no such program, 126 if it cannot be run, 1 if N
cannot become a file, 2 for an invalid command line.""",
    _arguments,
    _run,
    """\
  dmabuf exec --fd 3 -- sha256sum /dev/fd/3
  dmabuf exec --fd 3 -- dd of=/dev/fd/3 if=frame.raw
  dmabuf exec --fd 0 --read-only -- xxd""",
)
