"""`dmabuf serve`: hold buffers by name, and hand them to other processes."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Annotated

import typer

from dmabuf.cli import _options, _output
from dmabuf.sizes import format_size, parse_size
from dmabuf.store import place
from dmabuf.store.server import Server, default_limit

_HELP = """\
Hold buffers by name, so that they outlive the programs that fill them, and hand them to others.

Clients are `dmabuf put`, `get`, `ls`, `stat`, `rm`, and in Python dmabuf.store.connect(). It ends
in order on SIGTERM and SIGINT; what clients have open stays theirs.
"""

_EXAMPLES = """\
Examples:

\b
  dmabuf serve
  dmabuf serve --max-memory 8GiB --socket /run/cameras.sock
"""


def add_to(app: typer.Typer) -> None:
    """Add the command to the parser."""
    app.command("serve", help=_HELP, epilog=_EXAMPLES)(_command)


def _command(
    socket: _options.Socket = None,
    max_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Bytes of all buffers. [default: half the machine's]"),
    ] = None,
) -> None:
    try:
        limit = None if max_memory is None else parse_size(max_memory, "--max-memory")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    with _output.orderly():
        run(socket, limit)


def run(path: str | None, max_memory: int | None) -> None:
    """Serve until a signal ends it.

    Raises:
        OSError: there is no socket to be had.
    """
    limit = default_limit() if max_memory is None else max_memory
    descriptors = _most_descriptors()
    with ExitStack() as stack:
        listener = place.activated() if path is None else None
        if listener is None:
            path = place.default_path() if path is None else path
            listener = stack.enter_context(place.listening(path))
        server = Server(listener, limit, descriptors)
        stack.enter_context(_ending(server))
        _output.note(f"serving at {listener.getsockname()}, {format_size(limit)} at most")
        place.tell_systemd("READY=1")
        server.run()


def _most_descriptors() -> int:
    """As many as may be: each buffer takes two or more."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


@contextmanager
def _ending(server: Server) -> Iterator[None]:
    """SIGTERM and SIGINT are the ordinary end of a server."""
    before = {}
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, lambda number, frame: server.stop())
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
