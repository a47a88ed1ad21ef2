"""`dmabuf export`: show a buffer of the store as a block device."""

from __future__ import annotations

from argparse import Namespace
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from dmabuf.cli import output
from dmabuf.cli.parser import Command, Misuse, Parser
from dmabuf.cli.store import name_argument
from dmabuf.devices.block import as_block_device
from dmabuf.kernel import ublk
from dmabuf.memory import Buffer
from dmabuf.store import Status, Store, connect, notify_systemd


@dataclass(frozen=True, slots=True)
class Exported:
    """What `dmabuf export --json` reports when the device is there."""

    name: str
    device: str
    """The block device, such as /dev/ublkb0."""
    size: int
    read_only: bool
    format: Literal["dmabuf-export/1"] = "dmabuf-export/1"


def _arguments(parser: Parser) -> None:
    name_argument(parser, "name")
    parser.flag("--block", "Make it a block device, by the kernel's ublk driver.")
    parser.flag("--read-only", "Let nobody write it.")
    parser.shared("socket", "json")


def _run(args: Namespace) -> None:
    if not args.block:
        raise Misuse("export needs --block: a buffer becomes a block device, and nothing else")
    with connect(args.socket) as store:
        buffer, status = _open(store, args.name, args.read_only)
    with buffer:
        if status.length % ublk.SECTOR:
            text = f"its {status.length} bytes are not whole sectors"
            fix = f"put a file that `truncate -s %{ublk.SECTOR} FILE` has made longer"
            raise ValueError(f"{args.name}: {text}; {fix}")
        with as_block_device(buffer, size=status.length) as device, suppress(KeyboardInterrupt):
            # SIGINT, SIGTERM and SIGHUP are the regular end as soon as anybody has read of it.
            told = Exported(args.name, device.path, device.size, device.read_only)
            if args.json:
                output.say_json(told)
            else:
                how = "read-only" if told.read_only else "writable"
                output.say(f"{told.name}: {told.device}, {told.size} bytes, {how}")
            notify_systemd("READY=1")
            device.wait()


def _open(store: Store, name: str, read_only: bool) -> tuple[Buffer, Status]:
    """Return a buffer that can be written, unless this user may only read it."""
    if not read_only:
        try:
            return store.open_with_status(name, "r+", trusted=None)
        except PermissionError:
            pass
    return store.open_with_status(name, "r", trusted=None)


EXPORT = Command(
    """\
Show the buffer NAME of the store as a block device, for mount(8), dd, fio and other programs.

The command prints the device and stays in the foreground until SIGTERM or Ctrl-C, which remove it.
Unmount it first. A user who may only read the buffer gets a read-only device. It needs root, Linux
6.5 and `modprobe ublk_drv`. See docs/guides/block-devices.md.""",
    _arguments,
    _run,
    """\
  dmabuf export --block disk
  dmabuf export --block --read-only --json model""",
)
