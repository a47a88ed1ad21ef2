"""`dmabuf get`: what is in a named buffer of the store, into a file."""

from __future__ import annotations

import stat
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import typer

from dmabuf._replace import Replacement
from dmabuf.cli import _options, _output, _progress, _result
from dmabuf.cli._ends import End, advance, find_target, telling
from dmabuf.pipeline import Copy, copy
from dmabuf.store import as_trusted_as_may_be, connect

_HELP = """\
Write the content of the buffer NAME to FILE: a file, block device, or - for standard output.

A regular file appears whole under its name, or not at all. Whoever writes the buffer meanwhile is
not waited for. How the bytes travelled, and why, is printed.
"""

_EXAMPLES = """\
Examples:

\b
  dmabuf get frames frames.raw
  dmabuf get --size 64 frames - | xxd
"""


@dataclass(frozen=True, slots=True)
class Options:
    """The command line, as it was understood."""

    name: str
    file: str
    size: int | None
    sync: bool
    force: bool
    socket: str | None
    json: bool
    progress: bool | None
    quiet: bool


def add_to(app: typer.Typer) -> None:
    """Add the command to the parser."""
    app.command("get", help=_HELP, epilog=_EXAMPLES)(_command)


def _command(
    name: _options.Name,
    file: Annotated[str, typer.Argument(metavar="FILE", help="Where to; - is standard output.")],
    size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Bytes at most. [default: the content]")
    ] = None,
    sync: _options.Sync = False,
    force: _options.Force = False,
    socket: _options.Socket = None,
    json: _options.Json = False,
    progress: _options.Progress = None,
    quiet: _options.Quiet = False,
) -> None:
    limit = _options.limit(size)
    shown = False if quiet and progress is None else progress
    with _output.orderly():
        run(Options(name, file, limit, sync, force, socket, json, shown, quiet))


def run(options: Options) -> None:
    """Carry the command out.

    Raises:
        OSError, ValueError: what went wrong; a regular file is as it was before.
    """
    source, target = End(options.name, options.name, None), find_target(options.file, options.name)
    replaces = isinstance(target.what, str) and (
        target.status is None or stat.S_ISREG(target.status.st_mode)
    )
    with ExitStack() as stack:
        store = stack.enter_context(connect(options.socket))
        buffer, status = as_trusted_as_may_be(partial(store.open_with_status, options.name))
        stack.enter_context(buffer)
        size = status.length if options.size is None else min(options.size, status.length)
        shown = stack.enter_context(_progress.display(options.progress))

        def carry(place: str | int) -> Copy:
            return copy(
                buffer,
                place,
                size=size,
                dst_offset=target.offset,
                sync=options.sync,
                force=options.force,
                progress=lambda done, total: shown.show("getting", done, total),
            )

        if replaces:
            assert isinstance(target.what, str)
            place = stack.enter_context(
                Replacement(target.what, force=options.force, note=_output.note)
            )
            with telling(source, target, place.temporary):
                record = carry(place.temporary)
                place.commit(None, sync=options.sync)
        else:
            with telling(source, target, None):
                record = carry(target.what)
        exporter = buffer.exporter
    advance(source, target, record.nbytes)
    stream = sys.stderr if target.what == 1 else sys.stdout
    if options.json:
        ends = {"name": source.name, "target": target.name, "buffer": exporter}
        _output.say_json(ends | _result.as_json(record, None), stream=stream)
    elif not options.quiet:
        _output.say(_result.sentence(record, None, exporter), stream=stream)
