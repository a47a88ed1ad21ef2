"""`dmabuf ls`: the buffers that there are."""

from __future__ import annotations

from typing import Annotated

import typer

from dmabuf.cli import _options, _output, _store, _system

_HELP = """\
List the buffers of the store: mode, owner, group, bytes, what made the memory, time, name. With
--system, every dma-buf on the machine that this user may see.

Of each of those: its inode, which no other has until the next boot, its size, exporter and name,
which processes hold it, by which descriptors and how many mappings, and the attached devices where
the kernel tells. "kernel" are references of no process: an importer's, a registration with
io_uring, a message under way. Then totals by process and exporter, each buffer counted once; a
process's share is its size divided by the number of processes that hold it.

It is read from /proc and debugfs, and no buffer is touched. What this user may not see is told, and
the exit status is 0 all the same.
"""

_EXAMPLES = """\
Examples:

\b
  dmabuf ls
  sudo dmabuf ls --system
  dmabuf ls --system --process ffmpeg
  sudo dmabuf ls --system --json | jq '.buffers[] | select(.holders == [])'
"""


def add_to(app: typer.Typer) -> None:
    """Add the command to the parser."""
    app.command("ls", help=_HELP, epilog=_EXAMPLES)(_command)


def _command(
    system: Annotated[bool, typer.Option("--system", help="Every dma-buf on the machine.")] = False,
    process: _options.Process = None,
    exporter: _options.Made = None,
    socket: _options.Socket = None,
    json: _options.Json = False,
) -> None:
    if not system and (process is not None or exporter is not None):
        raise typer.BadParameter("--process and --exporter are for --system")
    if system and socket is not None:
        raise typer.BadParameter("--socket is the store's, and --system asks no store")
    with _output.orderly():
        if not system:
            _store.run(socket, json=json)
            return
        _system.run(process=process, exporter=exporter, json=json)
