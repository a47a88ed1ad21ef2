"""`dmabuf put`: a file's bytes into a named buffer of the store."""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import typer

from dmabuf.buffer import Buffer
from dmabuf.cli import _options, _output, _progress, _result
from dmabuf.cli._ends import End, advance, find_source, telling
from dmabuf.file import File
from dmabuf.pipeline import copy
from dmabuf.store import Store, as_trusted_as_may_be, connect
from dmabuf.store.connection import told
from dmabuf.store.protocol import check_name

_HELP = """\
Put FILE (a file, block device, or - for standard input) into a buffer NAME of the store.

The name appears when the buffer is whole, or not at all; a buffer that had it loses it then, and
whoever has that one open keeps it. How the bytes travelled, and why, is printed.
"""

_EXAMPLES = """\
Examples:

\b
  dmabuf put model.safetensors model
  dmabuf put --mode 640 --exporter system frames.raw frames
  curl -s $URL | dmabuf put --size 1GiB - weights
"""


@dataclass(frozen=True, slots=True)
class Options:
    """The command line, as it was understood."""

    file: str
    name: str
    size: int | None
    mode: int
    exporter: str
    socket: str | None
    json: bool
    progress: bool | None
    quiet: bool


def add_to(app: typer.Typer) -> None:
    """Add the command to the parser."""
    app.command("put", help=_HELP, epilog=_EXAMPLES)(_command)


def _command(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Where from; - is standard input.")],
    name: _options.Name,
    size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Bytes at most; a stream needs it. [default: all]"),
    ] = None,
    mode: Annotated[
        str, typer.Option(metavar="OCTAL", help="Who may open it, as chmod has it.")
    ] = "600",
    exporter: _options.Exporter = "auto",
    socket: _options.Socket = None,
    json: _options.Json = False,
    progress: _options.Progress = None,
    quiet: _options.Quiet = False,
) -> None:
    limit = _options.limit(size)
    if re.fullmatch("[0-7]{3,4}", mode) is None or int(mode, 8) > 0o777:
        raise typer.BadParameter(f"--mode {mode}: three octal digits, such as 640")
    shown = False if quiet and progress is None else progress
    with _output.orderly():
        run(Options(file, name, limit, int(mode, 8), exporter, socket, json, shown, quiet))


def run(options: Options) -> None:
    """Carry the command out.

    Raises:
        OSError, ValueError, EOFError: what went wrong; the name is as it was before.
    """
    with told(options.name):
        check_name(options.name)  # before anything is copied
    source, target = find_source(options.file), End(options.name, options.name, None)
    size = _size(options, source)
    with connect(options.socket) as store, _create(store, size, options) as buffer:
        with _progress.display(options.progress) as shown, telling(source, target, None):
            record = copy(
                source.what,
                buffer,
                size=size,
                src_offset=source.offset,
                progress=lambda done, total: shown.show("putting", done, total),
            )
        store.link(buffer, options.name, length=record.nbytes)  # a stream may have ended before
        exporter = buffer.exporter
    advance(source, target, record.nbytes)
    if options.json:
        ends = {"source": source.name, "name": options.name, "buffer": exporter}
        _output.say_json(ends | _result.as_json(record, None))
    elif not options.quiet:
        _output.say(_result.sentence(record, None, exporter))


def _create(store: Store, size: int, options: Options) -> Buffer:
    nbytes = max(size, 1)
    create = partial(store.create, None, nbytes, mode=options.mode, exporter=options.exporter)
    return as_trusted_as_may_be(create)


def _size(options: Options, source: End) -> int:
    """Bytes that the buffer is made for."""
    assert source.status is not None
    if source.again:
        with File(source.what, "r") as file:
            assert file.size is not None
            there = max(file.size - source.offset, 0)
        return there if options.size is None else min(there, options.size)
    if options.size is None:
        text = "is a stream: say with --size how many bytes it has at most"
        raise OSError(errno.ESPIPE, text, source.name)
    return options.size
