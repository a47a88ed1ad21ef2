"""The clients of the store: `dmabuf put`, `get`, `ls`, `stat`, `rm`, `mv`, `chmod` and `df`."""

from __future__ import annotations

import errno
import fnmatch
import grp
import pwd
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from stat import S_IFREG, filemode
from typing import Any, Literal

from dmabuf.cli import output
from dmabuf.cli.ends import End, advance, find_source, find_target, move_bytes, naming
from dmabuf.cli.parser import Command, Misuse, Parser, complete_by, report
from dmabuf.sizes import format_size
from dmabuf.store import Status, Store, Usage, check_name, connect

# -- put


def _mode(text: str) -> int:
    if len(text) in (3, 4) and set(text) <= set("01234567") and int(text, 8) <= 0o777:
        return int(text, 8)
    raise ArgumentTypeError(f"invalid mode '{text}': use three octal digits, such as 640")


def _put_arguments(parser: Parser) -> None:
    parser.add_argument("file", metavar="FILE", help="The source; - is standard input.")
    name_argument(parser, "name")
    parser.shared("size")
    parser.option("--mode", "OCTAL", "The mode, as for chmod. [default: 600]", _mode, 0o600)
    parser.shared("exporter", "socket", "json", "progress", "quiet")


def _put(args: Namespace) -> None:
    from dmabuf.cli import cp
    from dmabuf.copying import copy

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
        fields = output.fields_of(record)
        output.say_json(cp.Put(**fields, source=source.name, name=args.name, buffer=exporter))
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
    name_argument(parser, "name")
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
        fields = output.fields_of(record)
        told = cp.Got(**fields, name=args.name, target=target.name, buffer=exporter)
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


# -- names and patterns


def name_argument(
    parser: Parser,
    name: str,
    help: str = "The buffer's name in the store.",  # noqa: A002 - the name that argparse uses
    nargs: str | None = None,
) -> None:
    """Add an argument that is a name in the store, or several."""
    metavar = name.removesuffix("s").upper()
    action = parser.add_argument(name, metavar=metavar, help=help, nargs=nargs)
    complete_by(action, lambda args: [one.name for one in connect(args.socket).list()])


def _names_argument(parser: Parser, nargs: str = "+") -> None:
    text = "Names in the store, or patterns such as 'frame-*', in quotes."
    name_argument(parser, "names", text, nargs)


def _for_each(
    store: Store, words: Sequence[str], act: Callable[[Status], object], *, as_json: bool = False
) -> int:
    """Call `act` for each buffer that names and patterns match; return the exit status.

    A name that exists is not a pattern. A failure is reported, and does not keep the others.
    """
    there = {one.name: one for one in store.list()}
    done = set[str]()
    failed = 0
    for word in words:
        matching = [word] if word in there else fnmatch.filter(there, word) or [word]
        for name in matching:
            if name in done:
                continue
            done.add(name)
            try:
                if check_name(name) not in there:
                    raise FileNotFoundError(errno.ENOENT, "there is no such buffer", name)
                act(there[name])
            except ConnectionError:
                raise
            except OSError as problem:
                report(problem, as_json)
                failed = output.FAILED
    return failed


# -- ls


@dataclass(frozen=True, slots=True)
class Entry:
    """A buffer of the store. Sizes are in bytes, times in nanoseconds since 1970."""

    name: str
    size: int
    """Bytes of memory: whole pages."""
    length: int
    """Bytes of content."""
    mode: str
    """The permission bits in octal, such as "640"."""
    uid: int
    gid: int
    created_ns: int
    """When the name was created."""
    changed_ns: int
    """When the name, mode or owner changed."""
    modified_ns: int
    """When the content got its name or length; clients may set it."""
    accessed_ns: int
    """That of creation, or of the last use of a cached buffer; clients may set it."""
    exporter: str
    reason: str
    """Why that exporter made it."""
    slabs: int
    """The number of dma-bufs."""
    is_dmabuf: bool
    number: int
    """Identifies the buffer: no other one ever gets it, and a restart of the server keeps it."""
    cached: bool
    """Whether the content is final, and the store may drop the buffer while nobody uses it."""
    in_use: bool | None
    """Whether anyone besides the server has it open; null if that is unknown."""


@dataclass(frozen=True, slots=True)
class Listing:
    """The result of `dmabuf ls`."""

    buffers: list[Entry]
    format: Literal["dmabuf-ls/1"] = "dmabuf-ls/1"


@dataclass(frozen=True, slots=True)
class Stat(Entry):
    """The result of `dmabuf stat`."""

    format: Literal["dmabuf-stat/1"] = "dmabuf-stat/1"


def _fields(status: Status) -> dict[str, Any]:
    """Return the fields of an Entry."""
    return output.fields_of(status) | {"mode": f"{status.mode:03o}"}


def _ls_arguments(parser: Parser) -> None:
    _names_argument(parser, "*")
    parser.flag("--system", "List every dma-buf on the machine.")
    parser.shared("process", "of-exporter", "socket", "json")


def _ls(args: Namespace) -> int:
    if args.system:
        if args.socket is not None or args.names:
            raise Misuse("NAME and --socket are of the store, which --system does not list")
        from dmabuf.cli.system import list_system

        list_system(args)
        return 0
    if args.process is not None or args.exporter is not None:
        raise Misuse("--process and --exporter need --system")
    with connect(args.socket) as store:
        found, failed = ([] if args.names else store.list()), 0
        if args.names:
            failed = _for_each(store, args.names, found.append, as_json=args.json)
    found.sort(key=lambda one: one.name)
    if args.json:
        output.say_json(Listing([Entry(**_fields(one)) for one in found]))
        return failed
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
    return failed


LS = Command(
    """\
List the buffers of the store, or those of names and patterns: mode, owner, group, bytes, exporter,
time, name.

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
  dmabuf ls 'frame-*'
  sudo dmabuf ls --system
  dmabuf ls --system --process ffmpeg
  sudo dmabuf ls --system --json | jq '.buffers[] | select(.holders == [])'""",
)


# -- stat


def _stat_arguments(parser: Parser) -> None:
    name_argument(parser, "name")
    parser.shared("socket", "json")


def _stat(args: Namespace) -> None:
    with connect(args.socket) as store:
        status = store.stat(args.name)
    if args.json:
        output.say_json(Stat(**_fields(status)))
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


# -- rm, mv and chmod


def _rm_arguments(parser: Parser) -> None:
    _names_argument(parser)
    parser.shared("socket")


def _rm(args: Namespace) -> int:
    with connect(args.socket) as store:
        return _for_each(store, args.names, lambda one: store.remove(one.name, number=one.number))


RM = Command(
    """\
Remove names from the store. Programs that have such a buffer open keep it, and the kernel frees its
memory when the last of them closes it. A name that cannot be removed does not keep the others.""",
    _rm_arguments,
    _rm,
    """\
  dmabuf rm notes 'frame-*'""",
)


def _mv_arguments(parser: Parser) -> None:
    name_argument(parser, "old")
    name_argument(parser, "new", "The name that it gets.")
    parser.flag("-n --no-clobber", "Fail if NEW exists.")
    parser.shared("socket")


def _mv(args: Namespace) -> None:
    with connect(args.socket) as store:
        store.rename(args.old, args.new, replace=not args.no_clobber)


MV = Command(
    "Rename the buffer OLD to NEW. A buffer NEW is replaced; programs that have it open keep it.",
    _mv_arguments,
    _mv,
)


def _chmod_arguments(parser: Parser) -> None:
    parser.add_argument("mode", metavar="OCTAL", type=_mode, help="The new mode, such as 640.")
    _names_argument(parser)
    parser.shared("socket")


def _chmod(args: Namespace) -> int:
    with connect(args.socket) as store:
        return _for_each(
            store, args.names, lambda one: store.chmod(one.name, args.mode, number=one.number)
        )


CHMOD = Command(
    "Change who may open the buffers of names and patterns. Buffers that are open stay open.",
    _chmod_arguments,
    _chmod,
    """\
  dmabuf chmod 640 model 'frame-*'""",
)


# -- df


@dataclass(frozen=True, slots=True, kw_only=True)
class Held(Usage):
    """The result of `dmabuf df`."""

    socket: str
    format: Literal["dmabuf-df/1"] = "dmabuf-df/1"


def _df_arguments(parser: Parser) -> None:
    parser.shared("socket", "json")


def _df(args: Namespace) -> None:
    with connect(args.socket) as store:
        usage, path = store.usage(), store.path
    if args.json:
        output.say_json(Held(**output.fields_of(usage), socket=path))
        return
    percent = 100 * usage.charged // max(usage.max_memory, 1)
    held, most = format_size(usage.charged), format_size(usage.max_memory)
    output.say(f"socket   {path}")
    output.say(f"memory   {held} of {most} ({percent}%)")
    output.say(f"names    {usage.names} of {usage.max_names}")


DF = Command("Show how much memory and how many names the store holds.", _df_arguments, _df)


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
