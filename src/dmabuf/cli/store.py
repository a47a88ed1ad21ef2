"""The store's family: `dmabuf serve`, `put`, `get`, `ls`, `stat` and `rm`."""

from __future__ import annotations

import errno
import grp
import pwd
import resource
import signal
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from stat import S_IFREG, filemode
from typing import Any

from dmabuf.cli import output
from dmabuf.cli.ends import End, advance, find_source, find_target, move_bytes, naming
from dmabuf.cli.parser import Command, Misuse, Parser, size
from dmabuf.sizes import format_size
from dmabuf.store import Status, connect

# -- serve


def _serve_arguments(parser: Parser) -> None:
    parser.shared("socket")
    text = "Who may connect besides this user. [default: nobody]"
    parser.option("--group", "GROUP", text)
    text = "The most memory to hold. [default: half of what it may use]"
    parser.option("--max-memory", "SIZE", text, size)


def _serve(args: Namespace) -> None:
    from dmabuf import store

    limit = store.default_limit() if args.max_memory is None else args.max_memory
    if not limit:
        raise Misuse("--max-memory is 0: the store could hold nothing")
    _, descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)  # a buffer takes two or more
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))
    with ExitStack() as stack:
        listener = store.activated() if args.socket is None else None
        if listener is None:
            path = store.default_path() if args.socket is None else args.socket
            try:
                listener = stack.enter_context(store.listening(path, args.group))
            except LookupError:
                raise ValueError(f"unknown group {args.group!r}") from None
        server = store.Server(listener, limit)
        stack.enter_context(_stopping(server))
        output.note(f"serving at {listener.getsockname()}, {format_size(limit)} at most")
        store.notify_systemd("READY=1")
        server.run()


@contextmanager
def _stopping(server: Any) -> Iterator[None]:
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

The clients are `dmabuf put`, `get`, `ls`, `stat` and `rm`, and dmabuf.store.connect() in Python.
SIGTERM and SIGINT end the server with status 0; buffers that clients have open stay theirs.""",
    _serve_arguments,
    _serve,
    """\
  dmabuf serve
  dmabuf serve --max-memory 8GiB --socket /run/cameras.sock --group video""",
)


# -- put


def _mode(text: str) -> int:
    if len(text) in (3, 4) and set(text) <= set("01234567") and int(text, 8) <= 0o777:
        return int(text, 8)
    raise ArgumentTypeError(f"invalid mode '{text}': use three octal digits, such as 640")


def _put_arguments(parser: Parser) -> None:
    parser.add_argument("file", metavar="FILE", help="The source; - is standard input.")
    parser.add_argument("name", metavar="NAME", help="The buffer's name in the store.")
    parser.shared("size")
    parser.option("--mode", "OCTAL", "The mode, as for chmod. [default: 600]", _mode, 0o600)
    parser.shared("exporter", "socket", "json", "progress", "quiet")


def _put(args: Namespace) -> None:
    from dmabuf.cli import cp
    from dmabuf.copying import copy
    from dmabuf.store import check_name

    check_name(args.name)
    source, target = find_source(args.file), End(args.name, args.name)
    nbytes = _size_of(source, args.size)
    with connect(args.socket) as store:
        with store.create(
            None, max(nbytes, 1), mode=args.mode, exporter=args.exporter, trusted=True
        ) as buffer:
            with output.Progress(args.progress) as progress, naming(source, target, None):
                record = copy(
                    source.what,
                    buffer,
                    size=nbytes,
                    src_offset=source.offset,
                    progress=lambda done, total: progress.show("putting", done, total),
                )
            store.link(buffer, args.name, length=record.nbytes)  # a stream may be shorter
            exporter = buffer.exporter
    advance(source, target, record.nbytes)
    if args.json:
        ends = {"source": source.name, "name": args.name, "buffer": exporter}
        output.say_json(ends | cp.as_json(record) | {"verified": None})
    elif not args.quiet:
        output.say(cp.sentence(record, exporter))


def _size_of(source: End, most: int | None) -> int:
    """Return the size of the buffer to create for a source."""
    from dmabuf.transfer import File

    if source.rereadable:
        with File(source.what, "r") as file:
            there = max((file.size or 0) - source.offset, 0)
        return there if most is None else min(there, most)
    if most is None:
        text = "the size of a stream is unknown; give the most bytes with --size"
        raise OSError(errno.ESPIPE, text, source.name)
    return most


PUT = Command(
    """\
Copy FILE (a file, a block device, or - for standard input) into the buffer NAME of the store.

The name appears when the copy is complete, or not at all. A buffer of that name is replaced;
programs that have it open keep it. The route of the bytes, and the reason for it, is printed.""",
    _put_arguments,
    _put,
    """\
  dmabuf put model.safetensors model
  dmabuf put --mode 640 --exporter system frames.raw frames
  curl -s $URL | dmabuf put --size 1GiB - weights""",
)


# -- get


def _get_arguments(parser: Parser) -> None:
    parser.add_argument("name", metavar="NAME", help="The buffer's name in the store.")
    parser.add_argument("file", metavar="FILE", help="The target; - is standard output.")
    parser.shared("size", "sync", "force", "socket", "json", "progress", "quiet")


def _get(args: Namespace) -> None:
    from dmabuf.cli import cp
    from dmabuf.copying import Copy, copy

    source, target = End(args.name, args.name), find_target(args.file, args.name)
    with connect(args.socket) as store:
        buffer, status = store.open_with_status(args.name, trusted=None)
        with buffer, output.Progress(args.progress) as progress:
            nbytes = status.length if args.size is None else min(args.size, status.length)

            def move(place: str | int) -> Copy:
                return copy(
                    buffer,
                    place,
                    size=nbytes,
                    dst_offset=target.offset,
                    sync=args.sync,
                    force=args.force,
                    progress=lambda done, total: progress.show("getting", done, total),
                )

            record, _ = move_bytes(source, target, move, force=args.force, sync=args.sync)
            exporter = buffer.exporter
    advance(source, target, record.nbytes)
    if args.json:
        ends = {"name": args.name, "target": target.name, "buffer": exporter}
        told = ends | cp.as_json(record) | {"verified": None}
        output.say_json(told, stream=target.report_stream)
    elif not args.quiet:
        output.say(cp.sentence(record, exporter), stream=target.report_stream)


GET = Command(
    """\
Copy the content of the buffer NAME to FILE: a file, a block device, or - for standard output.

A regular file appears complete, or not at all. The command does not wait for writers of the buffer.
The route of the bytes, and the reason for it, is printed.""",
    _get_arguments,
    _get,
    """\
  dmabuf get frames frames.raw
  dmabuf get --size 64 frames - | xxd""",
)


# -- ls


def _ls_arguments(parser: Parser) -> None:
    parser.flag("--system", "List every dma-buf on the machine.")
    parser.shared("process", "of-exporter", "socket", "json")


def _ls(args: Namespace) -> None:
    if args.system:
        if args.socket is not None:
            raise Misuse("--socket is the store's, which --system does not ask")
        from dmabuf.cli.system import list_system

        list_system(args)
        return
    if args.process is not None or args.exporter is not None:
        raise Misuse("--process and --exporter need --system")
    with connect(args.socket) as store:
        found = store.list()
    if args.json:
        output.say_json([_status_as_json(one) for one in found])
        return
    rows = [
        (
            filemode(S_IFREG | one.mode),
            _user(one.uid),
            _group(one.gid),
            str(one.length),
            one.exporter,
            _moment(one.modified_ns),
            one.name,
        )
        for one in found
    ]
    if rows:
        head = ("mode", "owner", "group", "bytes", "exporter", "modified", "name")
        lines = output.table(head, rows, left=(0, 1, 2, 4, 5, 6)).splitlines(keepends=True)
        output.write("".join(lines[1:]))


LS = Command(
    """\
List the buffers of the store: mode, owner, group, bytes, exporter, time, name.

With --system, list every dma-buf on the machine that this user may see: its inode, which is unique
until the next boot, size, exporter, name, the processes that hold it with their descriptors and
mappings, and the attached devices. "kernel" are references of no process: an importer's, an
io_uring registration, a message in flight. Totals by process and exporter follow, each buffer
counted once; a process's share divides each buffer evenly among its holders.

--system reads /proc and debugfs and touches no buffer. Notes name what this user may not see; the
exit status is still 0.""",
    _ls_arguments,
    _ls,
    """\
  dmabuf ls
  sudo dmabuf ls --system
  dmabuf ls --system --process ffmpeg
  sudo dmabuf ls --system --json | jq '.buffers[] | select(.holders == [])'""",
)


# -- stat and rm


def _stat_arguments(parser: Parser) -> None:
    parser.add_argument("name", metavar="NAME", help="The buffer's name in the store.")
    parser.shared("socket", "json")


def _stat(args: Namespace) -> None:
    with connect(args.socket) as store:
        status = store.stat(args.name)
    if args.json:
        output.say_json({"format": 1} | _status_as_json(status))
        return
    in_use = {True: "yes", False: "no", None: "unknown"}[status.in_use]
    count = f"{status.slabs} dma-buf{'s' * (status.slabs > 1)}"
    slabs = count if status.is_dmabuf else "not a dma-buf"
    owner = f"{filemode(S_IFREG | status.mode)} {_user(status.uid)} {_group(status.gid)}"
    for title, text in (
        ("name", status.name),
        ("content", f"{status.length} bytes"),
        ("memory", f"{format_size(status.size)} by {status.exporter}, {slabs}"),
        ("reason", status.reason),
        ("mode", owner),
        ("created", _moment(status.created_ns)),
        ("modified", _moment(status.modified_ns)),
        ("in use", in_use),
    ):
        output.say(f"{title:<9}{text}")


STAT = Command(
    "Show the status of the buffer NAME, and whether any program has it open.",
    _stat_arguments,
    _stat,
)


def _rm_arguments(parser: Parser) -> None:
    parser.add_argument("names", metavar="NAME", nargs="+", help="Names in the store.")
    parser.shared("socket")


def _rm(args: Namespace) -> int:
    failed = 0
    with connect(args.socket) as store:
        for name in args.names:
            try:
                store.remove(name)
            except (FileNotFoundError, PermissionError, ValueError) as problem:
                output.error(output.explain(problem))
                failed = output.FAILED
    return failed


RM = Command(
    """\
Remove names from the store. Programs that have such a buffer open keep it, and the kernel frees its
memory when the last of them closes it. A name that cannot be removed does not keep the others.""",
    _rm_arguments,
    _rm,
)


def _status_as_json(status: Status) -> dict[str, Any]:
    """Return a name's status for programs; keys are only ever added."""
    return asdict(status)


def _user(uid: int) -> str:
    """Return a user's name, or the number if it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _group(gid: int) -> str:
    """Return a group's name, or the number if it has none."""
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _moment(nanoseconds: int) -> str:
    """Return a time, as `ls -l --time-style=long-iso` prints it, with seconds."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(nanoseconds / 1e9))
