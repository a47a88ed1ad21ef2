"""`dmabuf rm`: take names of the store away."""

from __future__ import annotations

from typing import Annotated

import typer

from dmabuf.cli import _options, _output
from dmabuf.store import connect

_HELP = """\
Take names out of the store. Whoever has such a buffer open keeps it, and its memory is freed, and
no longer counted, when the last lets go of it.
"""


def add_to(app: typer.Typer) -> None:
    """Add the command to the parser."""
    app.command("rm", help=_HELP)(_command)


def _command(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Of the store.")],
    socket: _options.Socket = None,
) -> None:
    with _output.orderly():
        run(names, socket)


def run(names: list[str], socket: str | None) -> None:
    """Take each away; the first that cannot be ends it.

    Raises:
        OSError: no such name, or one of another user's.
    """
    with connect(socket) as store:
        for name in names:
            store.remove(name)
