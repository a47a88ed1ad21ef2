"""`dmabuf mount`: a store's buffers as files."""

from __future__ import annotations

from typing import Annotated

import typer

from dmabuf import mount as _mount
from dmabuf.cli import _options, _output

_HELP = """\
Show the buffers of a store as files in DIRECTORY, for programs that know nothing of dma-bufs.

It stays in the foreground until `fusermount3 -u DIRECTORY`, SIGTERM or Ctrl-C. Root's mount is for
every user, by the files' owners and modes; another user's is for that user. See docs/mount.md.
"""

_EXAMPLES = """\
Examples:

\b
  dmabuf mount ~/buffers
  dmabuf mount --socket /run/cameras.sock /mnt/cameras
"""


def add_to(app: typer.Typer) -> None:
    """Add the command to the parser."""
    app.command("mount", help=_HELP, epilog=_EXAMPLES)(_command)


def _command(
    directory: Annotated[str, typer.Argument(metavar="DIRECTORY", help="An empty directory.")],
    socket: _options.Socket = None,
    json: _options.Json = False,
) -> None:
    with _output.orderly():
        run(directory, socket, json=json)


def run(directory: str, socket: str | None, *, json: bool) -> None:
    """Mount, say so, and serve until the end.

    Raises:
        OSError: it cannot be mounted there, or there is no store.
        ImportError: pyfuse3 is missing.
    """

    def ready(store: str) -> None:
        if json:
            _output.say_json({"mounted": directory, "store": store})
        else:
            _output.say(f"mounted at {directory}: the store of {store}")

    _mount.mount(directory, socket, ready=ready, tell=_output.note)
