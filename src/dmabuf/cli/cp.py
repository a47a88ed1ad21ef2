"""`dmabuf cp`: copy a file, device or stream, and say how the bytes travelled."""

from __future__ import annotations

import errno
import stat
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Literal

import typer

from dmabuf._opening import same_file
from dmabuf._replace import Replacement
from dmabuf.cli import _options, _output, _progress, _result, _verify
from dmabuf.cli._ends import End, advance, find_source, find_target, telling
from dmabuf.file import File
from dmabuf.pipeline import Copy, copy
from dmabuf.route import ALLOWED, Route

_HELP = """\
Copy SRC to DST: files, block devices, pipes, or - for standard input and output.

A regular file appears whole under its name, or not at all; a directory as DST means a file of the
same name in it. Everything else is written in place. How the bytes travelled, and why, is printed.
"""

_EXAMPLES = """\
Examples:

\b
  dmabuf cp model.safetensors /mnt/nvme/
  dmabuf cp --require zero-copy --verify big.bin /mnt/nvme/big.bin
  dmabuf cp --size 1GiB /dev/zero test.img
  curl -s $URL | dmabuf cp --sync - weights.bin
  dmabuf cp --json a b | jq .read.route

A name that begins with a dash: dmabuf cp -- -name ./-other
"""


@dataclass(frozen=True, slots=True)
class Options:
    """The command line, as it was understood."""

    source: str
    target: str
    size: int | None = None
    require: Literal["zero-copy", "uncached", "any"] = "any"
    route: str | None = None
    prefer: Literal["zero-copy", "fastest"] = "zero-copy"
    exporter: str = "auto"
    verify: bool = False
    sync: bool = False
    force: bool = False
    preserve: bool = False
    json: bool = False
    progress: bool | None = None
    quiet: bool = False


def add_to(app: typer.Typer) -> None:
    """Add the command to the parser."""
    app.command("cp", help=_HELP, epilog=_EXAMPLES)(_command)


def _command(
    src: Annotated[str, typer.Argument(metavar="SRC", help="Where from; - is standard input.")],
    dst: Annotated[str, typer.Argument(metavar="DST", help="Where to; - is standard output.")],
    size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Bytes at most, as 4096 or 1GiB. [default: all]"),
    ] = None,
    require: Annotated[
        str, typer.Option(metavar="zero-copy|uncached|any", help="Which routes will do.")
    ] = "any",
    route: Annotated[
        str | None,
        typer.Option(metavar="|".join(Route), help="The only route that will do."),
    ] = None,
    prefer: Annotated[
        str,
        typer.Option(
            metavar="zero-copy|fastest", help="fastest takes what the page cache has from there."
        ),
    ] = "zero-copy",
    exporter: Annotated[
        str,
        typer.Option(metavar="NAME", help="What makes the buffers: auto, udmabuf, memfd, a heap."),
    ] = "auto",
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Read DST back past the page cache, compare every byte."),
    ] = False,
    sync: _options.Sync = False,
    force: _options.Force = False,
    preserve: Annotated[
        bool, typer.Option("--preserve", "-p", help="Keep the source's mode and times.")
    ] = False,
    json: _options.Json = False,
    progress: _options.Progress = None,
    quiet: _options.Quiet = False,
) -> None:

    _one_of("--require", require, list(ALLOWED))
    _one_of("--route", route, [known.value for known in Route])
    _one_of("--prefer", prefer, ["zero-copy", "fastest"])
    nbytes = _options.limit(size)
    options = Options(
        src, dst, nbytes, require, route, prefer, exporter, verify, sync, force,  # type: ignore[arg-type]
        preserve, json, False if quiet and progress is None else progress, quiet,
    )  # fmt: skip
    with _output.orderly():
        run(options)


def _one_of(option: str, value: str | None, known: list[str]) -> None:
    if value is not None and value not in known:
        raise typer.BadParameter(f"{option} {value}: one of {', '.join(known)}")


def run(options: Options) -> None:
    """Carry the command out.

    Raises:
        OSError, ValueError, EOFError: what went wrong; a regular target is as it was before.
    """
    source, target = find_source(options.source), find_target(options.target, options.source)
    _check(options, source, target)
    regular = target.status is None or stat.S_ISREG(target.status.st_mode)
    replaces = regular and isinstance(target.what, str)
    like = source.status if options.preserve else None
    if options.preserve and not replaces:
        raise OSError(errno.EINVAL, "--preserve needs a regular file as target", target.name)
    with ExitStack() as stack:
        shown = stack.enter_context(_progress.display(options.progress))
        if replaces:
            assert isinstance(target.what, str)
            place = stack.enter_context(
                Replacement(target.what, force=options.force, note=_output.note)
            )
            with telling(source, target, place.temporary):
                record, verified = _copy(options, source, target, place.temporary, shown)
                place.commit(like, sync=options.sync)
        else:
            with telling(source, target, None):
                record, verified = _copy(options, source, target, target.what, shown)
    advance(source, target, record.nbytes)
    _tell(options, source, target, record, verified)


def _check(options: Options, source: End, target: End) -> None:

    if source.status and target.status and same_file(source.status, target.status):
        text = f"and {source.name} are the same file: nothing was copied"
        raise OSError(errno.EINVAL, text, target.name)
    if options.verify:
        for end in (source, target):
            if not end.again or end.what == 1:
                text = "--verify reads both ends a second time, and a stream is gone by then"
                raise OSError(errno.ESPIPE, text, end.name)


def _copy(
    options: Options, source: End, target: End, place: str | int, shown: _progress.Display
) -> tuple[Copy, _verify.Verified | None]:
    record = copy(
        source.what,
        place,
        size=options.size,
        src_offset=source.offset,
        dst_offset=target.offset,
        progress=lambda done, total: shown.show("copying", done, total),
        require=options.require,
        route=options.route,
        prefer=options.prefer,
        exporter=options.exporter,
        sync=options.sync,
        force=options.force,
    )
    if not options.verify:
        return record, None
    return record, _verify_copy(options, source, target, place, record.nbytes, shown)


def _verify_copy(
    options: Options,
    source: End,
    target: End,
    place: str | int,
    nbytes: int,
    shown: _progress.Display,
) -> _verify.Verified:

    with File(source.what, "r") as one, File(place, "r") as other:
        return _verify.compare(
            one,
            source.offset,
            other,
            target.offset,
            nbytes,
            exporter=options.exporter,
            progress=lambda done: shown.show("verifying", done, nbytes),
        )


def _tell(
    options: Options,
    source: End,
    target: End,
    record: Copy,
    verified: _verify.Verified | None,
) -> None:
    stream = sys.stderr if target.what == 1 else sys.stdout
    if options.json:
        ends = {"source": source.name, "target": target.name}
        result = ends | _result.as_json(record, verified) | {"synced": options.sync}
        _output.say_json(result, stream=stream)
    elif not options.quiet:
        _output.say(_result.sentence(record, verified), stream=stream)
