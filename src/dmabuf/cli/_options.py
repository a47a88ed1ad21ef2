"""The options that several commands have alike."""

from typing import Annotated

import typer

from dmabuf.sizes import parse_size

Exporter = Annotated[
    str, typer.Option(metavar="NAME", help="What makes the buffer: auto, udmabuf, memfd, a heap.")
]
Region = Annotated[
    str | None,
    typer.Option(metavar="OFFSET+SIZE", help="What of TARGET to overwrite, as 1GiB+64MiB."),
]
Socket = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        help="The store's. [default: $XDG_RUNTIME_DIR/dmabuf.sock; root: /run/dmabuf.sock]",
    ),
]
Name = Annotated[str, typer.Argument(metavar="NAME", help="The buffer's name in the store.")]
Json = Annotated[bool, typer.Option("--json", help="The result for programs.")]
Progress = Annotated[
    bool | None,
    typer.Option("--progress/--no-progress", help="After a second. [default: on a terminal]"),
]
Sync = Annotated[bool, typer.Option("--sync", help="End when it is on the medium.")]
Force = Annotated[
    bool,
    typer.Option(
        "--force", "-f", help="Write to a mounted device; replace a file without permission."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No result, only errors.")]
Process = Annotated[
    str | None,
    typer.Option(metavar="PID|COMMAND", help="Only buffers that this process holds."),
]
Made = Annotated[
    str | None,
    typer.Option("--exporter", metavar="NAME", help="Only buffers of this exporter."),
]


def limit(size: str | None) -> int | None:
    """What --size says, in bytes. Raises typer.BadParameter."""
    try:
        return None if size is None else parse_size(size, "--size")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
