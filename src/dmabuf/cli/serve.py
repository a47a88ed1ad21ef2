"""`dmabuf serve`, the server of the store, and `dmabuf ping`, which asks whether it answers."""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dmabuf import store
from dmabuf.cli import output
from dmabuf.cli.parser import Command, Misuse, Parser, number, size
from dmabuf.sizes import format_size

if TYPE_CHECKING:
    from dmabuf.remote import Listener

_LEVELS = ("debug", "info", "warning", "error")


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16:
        return host.strip("[]") or "127.0.0.1", int(port)
    raise ArgumentTypeError(f"invalid address '{text}': use HOST:PORT or PORT, such as 9120")


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """Return a record as one line of JSON."""
        line: dict[str, object] = {"time": record.created, "level": record.levelname.lower()}
        fields = getattr(record, "fields", None)
        line |= fields if fields is not None else {"message": super().format(record)}
        return json.dumps(line)


def _log(level: str, kind: str) -> None:
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    handler.setFormatter(_JsonLines() if kind == "json" else text)
    log = logging.getLogger("dmabuf")
    log.addHandler(handler)
    log.setLevel(level.upper())


def _serve_arguments(parser: Parser) -> None:
    parser.shared("socket")
    text = "Who may connect besides this user. [default: nobody]"
    parser.option("--group", "GROUP", text)
    text = "The most memory to hold. [default: half of what it may use]"
    parser.option("--max-memory", "SIZE", text, size)
    text = "Drop a cached buffer, such as a model, that nobody used for so long; end when empty."
    parser.option("--idle", "SECONDS", text, number(0.01, 1e9, float))
    parser.flag("--background", "Return when it serves; it goes on in the background.")
    parser.flag("--replace", "Take over all buffers and clients of the server that runs there.")
    parser.option(
        "--log-level", "LEVEL", "What to log on standard error.", str, "warning", choices=_LEVELS
    )
    parser.option("--log-format", "FORMAT", "How to log it.", str, "text", choices=("text", "json"))
    text = "Serve metrics for Prometheus there, over HTTP. [HOST: 127.0.0.1]"
    parser.option("--metrics", "[HOST:]PORT", text, _address)
    text = "Serve other nodes, too: HOST:PORT or unix:PATH."
    parser.option("--listen", "ADDRESS", text)
    parser.option("--files", "DIR", "Let other nodes open the files below DIR.")
    parser.flag("--read-only", "Let other nodes read, and change nothing.")
    text = "The certificate for --listen, in PEM; beyond this machine TLS is needed."
    parser.option("--certificate", "FILE", text)
    parser.option("--key", "FILE", "The private key of that certificate.")
    text = "The authority that signed the certificates of the other nodes."
    parser.option("--authority", "FILE", text)
    text = "Listen without TLS: every host that reaches ADDRESS may use the node."
    parser.flag("--trusted-network", text)


def _serve(args: Namespace) -> None:
    limit = store.default_limit() if args.max_memory is None else args.max_memory
    if not limit:
        raise Misuse("--max-memory is 0: the store could hold nothing")
    _log(args.log_level, args.log_format)
    _, descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)  # a buffer takes two or more
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))
    with ExitStack() as stack:
        remote = _listening(args, stack)
        try:
            started = store.started(
                args.socket, args.group, limit, replace=args.replace, idle=args.idle
            )
            server = stack.enter_context(started)
        except LookupError:
            text = f"invalid group {args.group!r}: use a group that getent group lists"
            raise ValueError(text) from None

        def tell() -> None:
            output.note(f"serving at {server.path}, {format_size(limit)} at most")
            if remote is not None:
                below = f", files below {args.files}" if args.files is not None else ""
                output.note(f"listening at {remote.address}{below}")

        ready = _in_background(tell) if args.background else tell
        if args.metrics is not None:
            stack.enter_context(store.serving_metrics(server, *args.metrics))
        stack.enter_context(_stopping(server))
        if remote is not None:
            remote.start(server)
        ready()
        store.notify_systemd("READY=1")
        server.run()


def _in_background(tell: Callable[[], None]) -> Callable[[], None]:
    """Go on as a child in a session of its own, and return what it calls when it serves.

    The parent then calls `tell` and ends, with the child's exit status if that has ended.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        if os.read(reading, 1):
            tell()
            os._exit(0)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF)

    def ready() -> None:
        os.setsid()
        nowhere = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(nowhere, fd)
        os.close(nowhere)
        os.write(writing, b"1")
        os.close(writing)

    os.close(reading)
    return ready


def _listening(args: Namespace, stack: ExitStack) -> Listener | None:
    """Bind the address for other nodes, before anything of another server is taken over."""
    files = (args.certificate, args.key, args.authority)
    if any(files) and not all(files):
        raise Misuse("--certificate, --key and --authority belong together")
    if args.listen is None:
        if any(files) or args.files is not None or args.read_only or args.trusted_network:
            raise Misuse("options for other nodes need --listen ADDRESS")
        return None
    if args.idle is not None:
        raise Misuse("--idle ends a server without local clients, so it excludes --listen")
    from dmabuf import remote

    serving = remote.serving(
        args.listen,
        args.files,
        certificates=remote.Certificates(*files) if all(files) else None,
        trusted_network=args.trusted_network,
        read_only=args.read_only,
        start=False,
    )
    try:
        return stack.enter_context(serving)
    except ValueError as error:
        raise Misuse(str(error)) from None


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
SIGTERM and SIGINT end the server with status 0; buffers that clients have open stay theirs.

With --listen it serves other nodes, too: the clients are dmabuf.remote.connect() in Python, and
`dmabuf cp` with dmabuf://HOST:PORT/PATH. They may fetch, publish and remove names as this user, and
read and write files below --files.""",
    _serve_arguments,
    _serve,
    """\
  dmabuf serve
  dmabuf serve --max-memory 8GiB --socket /run/cameras.sock --group video
  dmabuf serve --log-level info --log-format json --metrics 9120
  dmabuf serve --listen 127.0.0.1:7777 --files /srv/models --read-only
  dmabuf serve --listen 10.0.0.5:7777 --certificate node.pem \\
      --key node.key --authority ca.pem""",
)


# -- ping


@dataclass(frozen=True, slots=True)
class Answer:
    """The result of `dmabuf ping`."""

    socket: str
    seconds: float
    """From the request to the reply."""
    format: Literal["dmabuf-ping/1"] = "dmabuf-ping/1"


def _ping_arguments(parser: Parser) -> None:
    text = "Seconds to wait for the reply. [default: 5]"
    parser.option("--timeout", "SECONDS", text, number(0.001, 3600, float), 5.0)
    parser.shared("socket", "json")


def _ping(args: Namespace) -> None:
    with store.connect(args.socket, timeout=args.timeout) as connection:
        begun = time.monotonic()
        connection.usage()
        seconds = time.monotonic() - begun
        if args.json:
            output.say_json(Answer(connection.path, seconds))
        else:
            output.say(f"{connection.path}: the store answers, in {1000 * seconds:.1f} ms")


PING = Command(
    "Ask whether the store answers. The exit status is 1 if it does not, for health checks.",
    _ping_arguments,
    _ping,
)
