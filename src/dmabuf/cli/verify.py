"""`dmabuf verify`: whether the bytes arrive, by every route, in each direction."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from dmabuf.cli import _options, _output, _progress, _region
from dmabuf.compare import Mismatch
from dmabuf.errors import RouteUnavailable
from dmabuf.file import File
from dmabuf.route import Route
from dmabuf.verify import Report, Tally, Verifier

_HELP = """\
Test whether bytes arrive: every byte, one direction at a time, by every route, against plain pread.

For people who test kernels, drivers and P2P hardware. The destination is poisoned before each
transfer; offsets and sizes lie at and beside blocks and pages, queue depths go from 1 to 64.
Without --destroy nothing is written to TARGET and reads alone are tested. The exit status is 1
where a single byte was wrong, and --seed repeats what was done.
"""

_EXAMPLES = """\
Examples:

\b
  dmabuf verify /dev/nvme0n1
  dmabuf verify --region 1GiB+64MiB --destroy /dev/nvme0n1
  dmabuf verify --exporter system --routes native --seed 7 /dev/nvme0n1
  dmabuf verify --json test.img | jq .results
"""

FORMAT = 1
"""Of the JSON: keys are only added to it; what would change a meaning counts this up."""


@dataclass(frozen=True, slots=True)
class Options:
    """The command line, as it was understood."""

    target: str
    region: tuple[int, int] | None = None
    """Offset and size, in bytes."""
    destroy: bool = False
    exporter: str = "auto"
    routes: tuple[Route, ...] = tuple(Route)
    seed: int = 0
    rounds: int = 16
    json: bool = False
    progress: bool | None = None


def add_to(app: typer.Typer) -> None:
    """Add the command to the parser."""
    app.command("verify", help=_HELP, epilog=_EXAMPLES)(_command)


def _command(
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="A file, block device or NVMe namespace.")
    ],
    region: _options.Region = None,
    destroy: Annotated[
        bool, typer.Option("--destroy", help="Overwrite the region, and test writes as well.")
    ] = False,
    exporter: _options.Exporter = "auto",
    routes: Annotated[
        str, typer.Option(metavar="ROUTE,...", help=f"Of {', '.join(Route)}.")
    ] = "native,direct,staged,buffered",
    seed: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Repeat a run. [default: random]")
    ] = None,
    rounds: Annotated[
        int, typer.Option(metavar="N", min=1, max=100_000, help="Ranges for each queue depth.")
    ] = 16,
    json: _options.Json = False,
    progress: _options.Progress = None,
) -> None:
    options = Options(
        target,
        _region.parse(region, destroy=destroy),
        destroy,
        exporter,
        _routes(routes),
        random.randrange(1 << 32) if seed is None else seed,
        rounds,
        json,
        progress,
    )
    with _output.orderly():
        if run(options).failed:
            raise typer.Exit(_output.FAILED)


def _routes(text: str) -> tuple[Route, ...]:
    known = [route.value for route in Route]
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"--routes {text}: of {', '.join(known)}, with commas between")
    return tuple(route for route in Route if route in names)


def run(options: Options) -> Report:
    """Test, and tell.

    Raises:
        OSError: the target cannot be tested; where it is so from the start, nothing was written.
    """
    with File(options.target, "r+" if options.destroy else "r") as file:
        start, size = _bounds(options, file)
        with (
            file._target.reference() as reference,
            _progress.display(options.progress) as shown,
            _writing(file if options.destroy else None) as put,
        ):
            report = Verifier(
                options.target,
                reference,
                put=put,
                seed=options.seed,
                exporter=options.exporter,
                routes=options.routes,
                progress=lambda done, total: shown.show("verifying", done, total),
            ).run(start, size, options.rounds)
    if not any(tally.transfers + tally.changed for tally in report.tallies):
        why = "; ".join(f"{tally.route}: {tally.unavailable}" for tally in report.tallies)
        raise RouteUnavailable(f"nothing could be tested: {why}", options.target)
    if options.json:
        _output.say_json(as_json(options, report))
    else:
        _say(options, report)
    return report


def _bounds(options: Options, file: File) -> tuple[int, int]:
    """Where the range begins that is tested, and how long it is."""
    size = file.size
    if size is None:
        text = f"{file._target.stream} cannot be read twice: name a file or block device"
        raise OSError(errno.ESPIPE, text, options.target)
    namespace = file._target.namespace
    if namespace is not None and options.destroy:
        text = (
            "an NVMe character device takes writes of whole blocks only, and here sizes of all "
            "kinds are tested: "
            + (f"name /dev/{namespace.disk}" if namespace.disk else "leave --destroy out")
        )
        raise OSError(errno.EOPNOTSUPP, text, options.target)
    if options.region is None:
        if not size:
            raise OSError(errno.EINVAL, "is empty: there is nothing to read", options.target)
        return 0, size
    if sum(options.region) > size:
        text = f"the region ends at {sum(options.region)}, and the target at {size}"
        raise OSError(errno.ENOSPC, text, options.target)
    return options.region


@contextmanager
def _writing(file: File | None) -> Iterator[Callable[[int, bytes], None] | None]:
    """What writes by the known-good path: plain pwrite, flushed, and dropped from the cache."""
    if file is None:
        yield None
        return
    fd = file.fileno()

    def put(offset: int, data: bytes) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(fd, memoryview(data)[done:], offset + done)
        os.fdatasync(fd)
        os.posix_fadvise(fd, offset, len(data), os.POSIX_FADV_DONTNEED)

    yield put


# -- telling


def as_json(options: Options, report: Report) -> dict[str, Any]:
    """The result for programs."""
    return {
        "format": FORMAT,
        "target": options.target,
        "ok": not report.failed,
        "seed": report.seed,
        "rounds": options.rounds,
        "exporter": report.exporter,
        "reference": report.reference,
        "region": options.region and list(options.region),
        "results": [
            {
                "direction": tally.direction,
                "route": tally.route.value,
                "transfers": tally.transfers,
                "nbytes": tally.nbytes,
                "failed": tally.failed,
                "changed": tally.changed,
                "mismatches": {kind.value: tally.wrong.get(kind, 0) for kind in Mismatch},
                "unavailable": tally.unavailable,
            }
            for tally in report.tallies
        ],
        "failures": [
            asdict(failure) | {"route": failure.route.value} for failure in report.failures
        ],
    }


def _say(options: Options, report: Report) -> None:
    what = "reads only"
    if options.region:
        what = f"reads and writes, {options.region[1]} bytes from {options.region[0]} overwritten"
    _output.say(f"{options.target}: {what}; exporter {report.exporter}; seed {report.seed}")
    _output.say(f"compared with what is read {report.reference}\n")
    head = ("", "route", "transfers", "compared", *Mismatch)
    _row(head, head)
    for tally in report.tallies:
        if tally.unavailable is None:
            counts = [str(tally.wrong.get(kind, 0)) for kind in Mismatch]
            nbytes = _output.decimal(tally.nbytes)
            _row(head, (tally.direction, tally.route, str(tally.transfers), nbytes, *counts))
    for tally in report.tallies:
        _say_more(tally)
    for failure in report.failures:
        case = failure.case
        kinds = ", ".join(f"{count} bytes {kind}" for kind, count in failure.counts.items())
        _output.say(
            f"{failure.direction} {failure.route}, transfer {case.number}: {case.size} bytes, file "
            f"offset {case.file_offset}, buffer offset {case.buffer_offset}, queue depth "
            f"{case.depth}, requests of {case.request}: {kinds}, the first at {failure.offset}"
        )
    if not report.failed:
        _output.say("\nevery byte was the same")
        return
    again = f"--seed {report.seed} --rounds {options.rounds}"
    _output.say(f"\n{report.failed} transfers had wrong bytes; {again} repeats this")


def _say_more(tally: Tally) -> None:
    if tally.unavailable is not None:
        _output.say(f"{tally.direction:<6}{tally.route:<9} not tested: {tally.unavailable}")
    if tally.changed:
        _output.say(
            f"{tally.direction:<6}{tally.route:<9} {tally.changed} transfers not judged: somebody "
            "else wrote to the target meanwhile"
        )


def _row(head: Sequence[str], cells: Sequence[str]) -> None:
    """A direction and a route, and numbers below the words that say what they count."""
    words = [f"{cells[0]:<6}{cells[1]:<9}"]
    words += [f"{cell:>{len(name)}}" for name, cell in zip(head[2:], cells[2:], strict=True)]
    _output.say("  ".join(words))
