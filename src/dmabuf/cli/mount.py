"""`dmabuf mount`: show a store's buffers as files."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from typing import Literal

from dmabuf import mount
from dmabuf.cli import output
from dmabuf.cli.parser import Command, Parser
from dmabuf.store import notify_systemd


@dataclass(frozen=True, slots=True)
class Mounted:
    """What `dmabuf mount --json` reports when the files are there."""

    directory: str
    store: str
    """The socket of the store."""
    format: Literal["dmabuf-mount/1"] = "dmabuf-mount/1"


def _arguments(parser: Parser) -> None:
    parser.add_argument("directory", metavar="DIRECTORY", help="An empty directory.")
    parser.shared("socket", "json")


def _run(args: Namespace) -> None:
    def ready(store: str) -> None:
        if args.json:
            output.say_json(Mounted(args.directory, store))
        else:
            output.say(f"mounted at {args.directory}: the store of {store}")
        notify_systemd("READY=1")

    mount.mount(args.directory, args.socket, ready=ready, tell=output.note)


MOUNT = Command(
    """\
Show the buffers of a store as files in DIRECTORY, for programs that do not support dma-bufs.

The command stays in the foreground until `fusermount3 -u DIRECTORY`, SIGTERM or Ctrl-C. A mount by
root is open to every user, by the files' owners and modes; another user's mount is private. See
docs/guides/mount.md.""",
    _arguments,
    _run,
    """\
  dmabuf mount ~/buffers
  dmabuf mount --socket /run/cameras.sock /mnt/cameras""",
)
