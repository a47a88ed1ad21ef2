"""`dmabuf verify`: test whether bytes arrive, by every route, in each direction."""

from __future__ import annotations

import random
from argparse import ArgumentTypeError, Namespace
from dataclasses import dataclass
from typing import Literal

from dmabuf.cli import output
from dmabuf.cli.parser import Command, Parser, complete_by, number, region
from dmabuf.inspect import Report, reproducer, verify_routes
from dmabuf.transfer import Mismatch, Route


@dataclass(slots=True, kw_only=True)
class Verified(Report):
    """The result of `dmabuf verify`."""

    target: str
    ok: bool
    """Whether every byte was right."""
    reproducer: str | None
    """A Python script that repeats the first failure."""
    format: Literal["dmabuf-verify/1"] = "dmabuf-verify/1"


def _routes(text: str) -> tuple[Route, ...]:
    names = [name.strip() for name in text.split(",")]
    if not set(names) <= set(Route):
        raise ArgumentTypeError(f"invalid routes '{text}': of {', '.join(Route)}")
    return tuple(route for route in Route if route in names)


def _arguments(parser: Parser) -> None:
    parser.add_argument("target", metavar="TARGET", help="A file, block device or NVMe namespace.")
    parser.shared("region", "destroy", "exporter")
    text = f"Of {', '.join(Route)}. [default: all]"
    option = parser.option("--routes", "ROUTE,...", text, _routes, tuple(Route))
    complete_by(option, lambda args: Route)
    parser.option("--seed", "N", "Repeat a run. [default: random]", number(0, 1 << 62))
    text = "Ranges for each queue depth. [default: 16]"
    parser.option("--rounds", "N", text, number(1, 100_000), 16)
    parser.shared("json", "progress")


def _run(args: Namespace) -> int:
    with output.Progress(args.progress) as progress:
        report = verify_routes(
            args.target,
            region=region(args),
            exporter=args.exporter,
            routes=args.routes,
            seed=random.randrange(1 << 32) if args.seed is None else args.seed,
            rounds=args.rounds,
            progress=lambda done, total: progress.show("verifying", done, total),
        )
    failures = report.failures
    script = reproducer(args.target, report, failures[0]) if failures else None
    if args.json:
        fields = output.fields_of(report)
        output.say_json(
            Verified(**fields, target=args.target, ok=not report.failed, reproducer=script)
        )
    else:
        _say(args.target, report)
        if script:
            output.write(f"\nthis script repeats the first:\n\n{script}")
    return output.FAILED if report.failed else 0


def _say(target: str, report: Report) -> None:
    what = "reads only"
    if report.region:
        what = f"reads and writes, {report.region[1]} bytes from {report.region[0]} overwritten"
    output.say(f"{target}: {what}; exporter {report.exporter}; seed {report.seed}")
    output.say(f"compared with what is read {report.reference}")
    rows = [
        (
            tally.direction,
            tally.route,
            str(tally.transfers),
            output.decimal(tally.nbytes),
            *(str(tally.mismatches[kind]) for kind in Mismatch),
        )
        for tally in report.results
        if tally.unavailable is None
    ]
    head = ("", "route", "transfers", "compared", *Mismatch)
    output.write("\n" + output.table(head, rows, left=(0, 1)))
    for tally in report.results:
        name = f"{tally.direction:<7}{tally.route:<8}"
        if tally.unavailable is not None:
            output.say(f"{name}  not tested: {tally.unavailable}")
        if tally.changed:
            output.say(
                f"{name}  {tally.changed} transfers without a verdict: another program wrote to "
                "the target"
            )
    for failure in report.failures:
        case = failure.case
        kinds = ", ".join(f"{count} bytes {kind}" for kind, count in failure.counts.items())
        output.say(
            f"{failure.direction} {failure.route}, transfer {case.number}: {case.size} bytes, file "
            f"offset {case.file_offset}, buffer offset {case.buffer_offset}, queue depth "
            f"{case.depth}, requests of {case.request}: {kinds}, the first at {failure.offset}"
        )
        for run in failure.runs[:4]:
            output.say(f"  {run}")
    verdict = "every byte was the same"
    if report.failed:
        again = f"--seed {report.seed} --rounds {report.rounds}"
        verdict = f"{report.failed} transfers had wrong bytes; {again} repeats this"
    output.write(f"\n{verdict}\n")


VERIFY = Command(
    """\
Test whether bytes arrive: every byte, one direction at a time, by every route, against plain pread.

For people who test kernels, drivers and peer-to-peer hardware. The destination is poisoned before
each transfer; offsets and sizes lie at and beside blocks and pages, queue depths go from 1 to 64.
Without --destroy nothing is written to TARGET, and only reads are tested. The exit status is 1 if a
byte was wrong; a script that repeats the first failure follows. --seed repeats a run.""",
    _arguments,
    _run,
    """\
  dmabuf verify /dev/nvme0n1
  dmabuf verify --region 1GiB+64MiB --destroy /dev/nvme0n1
  dmabuf verify --exporter system --routes native --seed 7 /dev/nvme0n1
  dmabuf verify --json test.img | jq .results""",
)
