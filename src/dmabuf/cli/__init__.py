"""The command `dmabuf`: one module a command, and here the parser of them all.

`app` is that parser, built without running anything: for a man page or a completion script take
`typer.main.get_command(app)`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated, Any

import typer

from dmabuf.cli import (
    _output,
    bench,
    cp,
    doctor,
    get,
    ls,
    mount,
    put,
    record,
    rm,
    serve,
    stat,
    top,
    verify,
)
from dmabuf.cli import exec as execute

__all__ = ["app", "main"]

app = typer.Typer(
    name="dmabuf",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        _output.say(f"dmabuf {version('dmabuf')}")
        raise typer.Exit


@app.callback()
def _dmabuf(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and end."
        ),
    ] = False,
) -> None:
    """Files into dma-bufs and back: move bytes at device speed, and see how they went."""


for command in (
    *(cp, record, doctor, verify, bench, ls, top),
    *(serve, put, get, stat, rm, mount, execute),
):
    command.add_to(app)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status.

    0 is success, 1 a failure told on standard error as `error: what and why`, 2 a command line that
    cannot be understood, and 128 + n the end by signal n: 130 is Ctrl-C, 141 a closed pipe.
    """
    return _output.settled(_run(argv))


def _run(argv: Sequence[str] | None) -> int:
    command: Any = typer.main.get_command(app)
    try:
        status = command.main(
            list(sys.argv[1:] if argv is None else argv), prog_name="dmabuf", standalone_mode=False
        )
    except OSError as problem:  # --help and --version, which are no command of ours
        _output.error(_output.explain(problem))
        return _output.FAILED
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        return _refuse(error)
    return status if isinstance(status, int) else 0


def _refuse(error: Any) -> int:
    """Tell what of the command line was not understood."""
    _output.error(error.format_message().rstrip("."))
    path = error.ctx.command_path if getattr(error, "ctx", None) else "dmabuf"
    _output.note(f"try '{path} --help'")
    return int(error.exit_code)
