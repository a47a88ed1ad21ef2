"""`dmabuf stat`: all that the store says of a buffer."""

from __future__ import annotations

import typer

from dmabuf.cli import _options, _output
from dmabuf.cli._store import as_json, group, moment, permissions, user
from dmabuf.sizes import format_size
from dmabuf.store import connect

_HELP = """\
Tell what the store knows of the buffer NAME, and whether anyone has it open.
"""


def add_to(app: typer.Typer) -> None:
    """Add the command to the parser."""
    app.command("stat", help=_HELP)(_command)


def _command(
    name: _options.Name, socket: _options.Socket = None, json: _options.Json = False
) -> None:
    with _output.orderly():
        run(name, socket, json=json)


def run(name: str, socket: str | None, *, json: bool) -> None:
    """Ask, and tell.

    Raises:
        OSError: there is no such name.
    """
    with connect(socket) as store:
        status = store.stat(name)
    if json:
        _output.say_json(as_json(status))
        return
    in_use = {True: "yes", False: "no", None: "not known"}[status.in_use]
    slabs = (
        f"{status.slabs} dma-buf{'s' * (status.slabs > 1)}" if status.is_dmabuf else "no dma-buf"
    )
    for title, text in (
        ("name", status.name),
        ("content", f"{status.length} bytes"),
        ("memory", f"{format_size(status.size)} by {status.exporter}, {slabs}"),
        ("reason", status.reason),
        ("mode", f"{permissions(status)} {user(status.uid)} {group(status.gid)}"),
        ("created", moment(status.created_ns)),
        ("modified", moment(status.modified_ns)),
        ("in use", in_use),
    ):
        _output.say(f"{title:<9}{text}")
