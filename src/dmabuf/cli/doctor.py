"""`dmabuf doctor`: show what this machine and a path support, with the reason and the fix."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from typing import Literal

from dmabuf import __version__
from dmabuf.cli import output
from dmabuf.cli.parser import Command, Parser
from dmabuf.inspect import Answer, Machine, PathReport, examine_machine, examine_path

_GROUPS = {
    "kernel": "kernel",
    "io_uring": "io_uring",
    "exporters": "exporters",
    "limits": "limits",
    "devices": "devices",
    "extras": "optional packages",
    "confinement": "confinement",
}
"""The title of each field of Machine."""


@dataclass(frozen=True, slots=True)
class Examined:
    """The result of `dmabuf doctor`."""

    machine: Machine
    path: PathReport | None
    """What PATH supports; None without one."""
    version: str = __version__
    """The version of dmabuf."""
    format: Literal["dmabuf-doctor/1"] = "dmabuf-doctor/1"


def _arguments(parser: Parser) -> None:
    parser.add_argument("path", metavar="PATH", nargs="?", help="A file, device or directory.")
    parser.shared("json")


def _run(args: Namespace) -> None:
    machine = examine_machine()
    if args.json:
        report = None if args.path is None else examine_path(args.path)
        output.say_json(Examined(machine, report))
        return
    output.say(f"dmabuf {__version__} on Linux {machine.release}, {machine.architecture}")
    for group, title in _GROUPS.items():
        output.write(f"\n{title}\n")
        for answer in getattr(machine, group):
            _say(answer)
    if args.path is not None:
        _say_path(examine_path(args.path))


def _say(answer: Answer) -> None:
    output.say(f"  {'yes' if answer.ok else 'no':<3} {answer.name}: {answer.detail}")
    if answer.fix:
        output.say(f"      fix: {answer.fix}")


def _say_path(report: PathReport) -> None:
    about = [report.kind]
    about += [f"on {report.filesystem}"] if report.filesystem else []
    about += [output.decimal(report.size)] if report.size is not None else []
    output.write("\n")
    output.say(f"{report.path} ({', '.join(about)})")
    _say(report.direct)
    for name, outlook in (("read", report.read), ("write", report.write)):
        route = f"{outlook.route}, " if outlook.route else ""
        _say(Answer(name, outlook.ok, f"{route}{outlook.reason}"))
        for rejected, why in outlook.rejected.items():
            output.say(f"      not {rejected}: {why}")


DOCTOR = Command(
    """\
Show what this machine supports, and with PATH by which route bytes would travel to and from it.

Each line is a yes or no that was found by trying, with the reason and, if there is one, the fix.
Nothing is changed: a file is neither emptied nor written, and in a directory a file without a name
is used. The exit status is 0 unless PATH cannot be examined.""",
    _arguments,
    _run,
    """\
  dmabuf doctor
  dmabuf doctor /mnt/nvme
  dmabuf doctor --json model.safetensors | jq .path.read.route""",
)
