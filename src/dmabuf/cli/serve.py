"""`dmabuf serve`: the server of the store."""

from __future__ import annotations

import resource
import signal
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from dmabuf import store
from dmabuf.cli import output
from dmabuf.cli.parser import Command, Misuse, Parser, size
from dmabuf.sizes import format_size


def _serve_arguments(parser: Parser) -> None:
    parser.shared("socket")
    text = "Who may connect besides this user. [default: nobody]"
    parser.option("--group", "GROUP", text)
    text = "The most memory to hold. [default: half of what it may use]"
    parser.option("--max-memory", "SIZE", text, size)
    parser.flag("--replace", "Take over all buffers and clients of the server that runs there.")


def _serve(args: Namespace) -> None:
    limit = store.default_limit() if args.max_memory is None else args.max_memory
    if not limit:
        raise Misuse("--max-memory is 0: the store could hold nothing")
    _, descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)  # a buffer takes two or more
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))
    with ExitStack() as stack:
        try:
            started = store.started(args.socket, args.group, limit, replace=args.replace)
            server = stack.enter_context(started)
        except LookupError:
            raise ValueError(f"unknown group {args.group!r}") from None
        stack.enter_context(_stopping(server))
        output.note(f"serving at {server.path}, {format_size(limit)} at most")
        store.notify_systemd("READY=1")
        server.run()


@contextmanager
def _stopping(server: store.Server) -> Iterator[None]:
    """Have SIGTERM and SIGINT stop the server."""
    before = {}
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, lambda number, frame: server.stop())
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


SERVE = Command(
    """\
Hold named buffers, so that they outlive the programs that fill them, and hand them to others.

The clients are `dmabuf put`, `get`, `ls` and others, and dmabuf.store.connect() in Python.
SIGTERM and SIGINT end the server with status 0; buffers that clients have open stay theirs.""",
    _serve_arguments,
    _serve,
    """\
  dmabuf serve
  dmabuf serve --max-memory 8GiB --socket /run/cameras.sock --group video""",
)
