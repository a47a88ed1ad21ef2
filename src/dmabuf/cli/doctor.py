"""`dmabuf doctor`: what this machine and a path can do, with the reason and the fix."""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated, Any

import typer

from dmabuf import machine
from dmabuf.cli import _output, _path
from dmabuf.machine import Answer, Machine

_HELP = """\
Tell what this machine can do, and with PATH by which route bytes would travel to and from it.

Every line is a yes or no that was found by doing it, with the reason and, where there is one, the
fix. Nothing is changed: a file is neither emptied nor written, and in a directory a file without a
name is used. The exit status is 0 unless PATH cannot be examined.
"""

_EXAMPLES = """\
Examples:

\b
  dmabuf doctor
  dmabuf doctor /mnt/nvme
  dmabuf doctor --json model.safetensors | jq .path.read.route
"""

FORMAT = 1
"""Of the JSON: keys are only added to it; what would change a meaning counts this up."""

_GROUPS = ("kernel", "io_uring", "exporters", "limits")


def add_to(app: typer.Typer) -> None:
    """Add the command to the parser."""
    app.command("doctor", help=_HELP, epilog=_EXAMPLES)(_command)


def _command(
    path: Annotated[
        str | None, typer.Argument(metavar="[PATH]", help="A file, device or directory.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="The answers for programs.")] = False,
) -> None:
    with _output.orderly():
        run(path, json=json)


def run(path: str | None, *, json: bool) -> None:
    """Examine, and tell.

    Raises:
        OSError: the path cannot be examined; what is so of the machine has been told.
    """
    found = machine.probe()
    if json:
        report = None if path is None else _path.examine(path)
        _output.say_json(as_json(found, report))
        return
    _output.say(f"dmabuf {version('dmabuf')} on Linux {found.release}, {found.architecture}")
    for group in _GROUPS:
        _output.say(f"\n{group}")
        for answer in getattr(found, group):
            _say(answer)
    if path is not None:
        _say_path(_path.examine(path))


def as_json(found: Machine, report: _path.Report | None) -> dict[str, Any]:
    """All of it for programs."""
    groups = {
        group: {
            answer.name: {"ok": answer.ok, "detail": answer.detail, "fix": answer.fix}
            for answer in getattr(found, group)
        }
        for group in _GROUPS
    }
    return {
        "format": FORMAT,
        "version": version("dmabuf"),
        "release": found.release,
        "architecture": found.architecture,
        "page_size": found.page_size,
        **groups,
        "path": report and _path.as_json(report),
    }


def _say(answer: Answer) -> None:
    word = "yes" if answer.ok else "no"
    if sys.stdout is not None and sys.stdout.isatty():
        word = typer.style(word, fg="green" if answer.ok else "yellow")
        word += " " * (0 if answer.ok else 1)
    _output.say(f"  {word:<3} {answer.name}: {answer.detail}")
    if answer.fix:
        _output.say(f"      fix: {answer.fix}")


def _say_path(report: _path.Report) -> None:
    about = [report.kind]
    if report.filesystem:
        about.append(f"on {report.filesystem}")
    if report.size is not None:
        about.append(f"{_output.decimal(report.size)}")
    _output.say(f"\n{report.path} ({', '.join(about)})")
    _say(report.direct)
    for name, outlook in (("read", report.read), ("write", report.write)):
        route = f"{outlook.route}, " if outlook.route else ""
        _say(Answer(name, outlook.ok, f"{route}{outlook.reason}"))
        for rejected, why in outlook.rejected.items():
            _output.say(f"      not {rejected}: {why}")
