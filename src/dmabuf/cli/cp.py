"""`dmabuf cp`: copy a file, device or stream, and report how the bytes travelled."""

from __future__ import annotations

import errno
import os
from argparse import Namespace
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dmabuf.cli import output
from dmabuf.cli.ends import End, advance, move_bytes, naming, opened
from dmabuf.cli.parser import Command, Parser
from dmabuf.copying import Copy, CopySide, copy, same_file
from dmabuf.errors import IntegrityError, RouteUnavailable
from dmabuf.memory import Buffer, allocate
from dmabuf.transfer import ALLOWED, File, Route, first_difference

if TYPE_CHECKING:
    from dmabuf.remote import RemoteFile

_BLOCK = 8 << 20  # bytes that --verify compares at once


@dataclass(frozen=True, slots=True)
class Verified:
    """The record of a comparison in which every byte was the same."""

    nbytes: int
    uncached: bool
    """Whether the target was read past the page cache, so from the device."""
    reason: str
    """How it was read, or why not past the page cache."""
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied(Copy):
    """The result of `dmabuf cp`."""

    source: str
    target: str
    verified: Verified | None
    """None without --verify."""
    synced: bool
    """Whether the bytes are on the medium."""
    in_place: str | None
    """Why a regular file was written in place; null if it was replaced."""
    format: Literal["dmabuf-cp/1"] = "dmabuf-cp/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Put(Copy):
    """The result of `dmabuf put`; `write` is null, because the target is memory."""

    source: str
    name: str
    """The buffer's name in the store."""
    buffer: str
    """The exporter of the buffer."""
    format: Literal["dmabuf-put/1"] = "dmabuf-put/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Got(Copy):
    """The result of `dmabuf get`; `read` is null, because the source is memory."""

    name: str
    """The buffer's name in the store."""
    target: str
    buffer: str
    """The exporter of the buffer."""
    format: Literal["dmabuf-get/1"] = "dmabuf-get/1"


def _arguments(parser: Parser) -> None:
    parser.add_argument("source", metavar="SRC", help="What to copy; - is standard input.")
    parser.add_argument("target", metavar="DST", help="Where to; - is standard output.")
    parser.shared("size")
    parser.option(
        "--require", "", "Which routes are acceptable.", default="any", choices=[*ALLOWED]
    )
    parser.option("--route", "", "The only acceptable route.", choices=[one.value for one in Route])
    text = "fastest takes from the page cache what is there."
    parser.option("--prefer", "", text, default="zero-copy", choices=["zero-copy", "fastest"])
    parser.shared("exporter")
    parser.flag("--verify", "Read DST back past the page cache and compare every byte.")
    parser.shared("sync", "force")
    parser.flag("-p --preserve", "Keep the source's mode and times.")
    parser.shared("json", "progress", "quiet")


def _run(args: Namespace) -> None:
    with opened(args.source, args.target, sync=args.sync) as (source, target):
        _copy(args, source, target)


def _copy(args: Namespace, source: End, target: End) -> None:
    if source.status and target.status and same_file(source.status, target.status):
        text = f"is the same file as {source.name}: nothing was copied"
        raise OSError(errno.EINVAL, text, target.name)
    for end in (source, target) if args.verify else ():
        if not end.rereadable or end.what == 1:
            text = "--verify reads both ends a second time, which a stream does not allow"
            raise OSError(errno.ESPIPE, text, end.name)
    if args.preserve and not target.replaced:
        raise OSError(errno.EINVAL, "--preserve needs a regular file as target", target.name)
    if args.preserve and source.status is None:
        raise OSError(errno.EINVAL, "--preserve needs a source on this machine", source.name)

    with output.Progress(args.progress) as progress:

        def move(place: str | int | RemoteFile) -> tuple[Copy, Verified | None]:
            record = copy(
                source.remote or source.what,
                place,
                size=args.size,
                src_offset=source.offset,
                dst_offset=target.offset,
                progress=lambda done, total: progress.show("copying", done, total),
                require=args.require,
                route=args.route,
                prefer=args.prefer,
                exporter=args.exporter,
                sync=args.sync,
                force=args.force,
            )
            if not args.verify:
                return record, None
            nbytes = record.nbytes
            return record, _verify(
                source,
                target,
                place,
                nbytes,
                args.exporter,
                lambda done: progress.show("verifying", done, nbytes),
            )

        like = source.status if args.preserve else None
        if target.replacing is not None:
            with naming(source, target, target.name), target.replacing() as file:
                record, verified = move(file)
            in_place = None
        else:
            (record, verified), in_place = move_bytes(
                source, target, move, force=args.force, sync=args.sync, like=like
            )
    advance(source, target, record.nbytes)
    if args.json:
        told = Copied(
            **output.fields_of(record),
            source=source.name,
            target=target.name,
            verified=verified,
            synced=args.sync,
            in_place=in_place,
        )
        output.say_json(told, stream=target.report_stream)
    elif not args.quiet:
        output.say(sentence(record), stream=target.report_stream)
        if verified:
            how = "" if verified.uncached else "not past the page cache: "
            text = f"verified: every byte is the same, {how}{verified.reason}"
            output.say(text, stream=target.report_stream)


CP = Command(
    """\
Copy SRC to DST: files, block devices, pipes, or - for standard input and output. A file of another
node is dmabuf://HOST:PORT/PATH.

A regular file appears whole under its name, or not at all. If DST is a directory, the copy is a
file of the same name in it. Everything else is written in place. The route of the bytes, and the
reason for it, is printed.""",
    _arguments,
    _run,
    """\
  dmabuf cp model.safetensors /mnt/nvme/
  dmabuf cp --require zero-copy --verify big.bin /mnt/nvme/big.bin
  dmabuf cp --size 1GiB /dev/zero test.img
  curl -s $URL | dmabuf cp --sync - weights.bin
  dmabuf cp --json a b | jq .read.route
  dmabuf cp --verify dmabuf://10.0.0.5:7777/model.safetensors .
  dmabuf cp -- -name ./-other""",
)


# -- the record of a copy as a sentence, which put and get print too


def sentence(record: Copy, exporter: str | None = None) -> str:
    """Return the record as a sentence; `exporter` is that of a buffer at one end."""
    if not record.nbytes:
        return "0 B: there was nothing to copy"
    speed = output.decimal(record.nbytes / max(record.seconds, 1e-9), "B/s")
    text = f"{output.decimal(record.nbytes)} in {record.seconds:.2f} s, {speed}: "
    ways = [f"read {_way(record.read)}"] if record.read else []
    ways += [f"written {_way(record.write)}"] if record.write else []
    return text + ", ".join([*ways, exporter or str(record.exporter)])


def _way(side: CopySide) -> str:
    """Return a route with its reason; if the CPU copies, with why it has to."""
    why = side.reason
    if side.route not in ALLOWED["zero-copy"]:
        why = side.rejected.get(Route.DIRECT) or side.rejected.get(Route.NATIVE) or why
    return f"{side.route} ({why})"


# -- --verify


def _verify(
    source: End,
    target: End,
    place: str | int | RemoteFile,
    nbytes: int,
    exporter: str,
    progress: Callable[[int], object],
) -> Verified:
    """Compare the target with the source. Raises IntegrityError with the offset of a difference."""
    import time

    begun = time.perf_counter()
    size = min(_BLOCK, max(nbytes, 1))
    refusal, done = None, 0
    with (
        _open(source.remote or source.what) as one,
        _open(place) as other,
        allocate(size, exporter=exporter) as expected,
        allocate(size, exporter=exporter) as found,
    ):
        if isinstance(other, File):
            os.fdatasync(other.fileno())
        else:
            other.flush()
        while done < nbytes:
            part, at = min(size, nbytes - done), target.offset + done
            one.read_into(expected, part, file_offset=source.offset + done)
            got, why = _read_back(other, found, part, at)
            refusal = refusal or why
            _compare(str(other.name), expected.pread(part, 0), found.pread(got, 0), at)
            done += part
            progress(done)
    reason = refusal or "read back from the device, past the page cache"
    return Verified(nbytes, refusal is None, reason, time.perf_counter() - begun)


def _open(what: str | int | RemoteFile) -> AbstractContextManager[File | RemoteFile]:
    """Open an end to read it; a file of another node is open already."""
    return File(what, "r") if isinstance(what, str | int) else nullcontext(what)


def _read_back(
    target: File | RemoteFile, buffer: Buffer, size: int, offset: int
) -> tuple[int, str | None]:
    """Read a part of the target; return its size, and why it was not read past the page cache."""
    try:
        record = target.read_into(buffer, size, file_offset=offset, require="uncached")
    except RouteUnavailable as error:
        if not isinstance(target, File):
            return target.read_into(buffer, size, file_offset=offset).nbytes, error.reason
        rejected = target.plan(buffer, "read", size=size, file_offset=offset).rejected
        why = rejected.get(Route.STAGED) or rejected.get(Route.DIRECT) or "there is no such route"
        # Clean pages are dropped; tmpfs has nothing but the cache.
        os.posix_fadvise(target.fileno(), offset, size, os.POSIX_FADV_DONTNEED)
        record = target.read_into(buffer, size, file_offset=offset)
        return record.nbytes, f"flushed, dropped from the cache, and read through it: {why}"
    return record.nbytes, None


def _compare(name: str, wanted: bytes, found: bytes, offset: int) -> None:
    if wanted == found:
        return
    if len(found) < len(wanted):
        end = offset + len(found)
        text = f"read back, it ends at {end}: {len(wanted) - len(found)} bytes short"
        raise IntegrityError(text, name, offset=end)
    at = first_difference(wanted, found)
    text = (
        f"read back, it differs from the source at offset {offset + at}: 0x{found[at]:02x}, not "
        f"0x{wanted[at]:02x}"
    )
    raise IntegrityError(text, name, offset=offset + at)
