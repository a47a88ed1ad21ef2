"""The options that several commands have alike."""

from typing import Annotated

import typer

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
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No result, only errors.")]
Process = Annotated[
    str | None,
    typer.Option(metavar="PID|COMMAND", help="Only buffers that this process holds."),
]
Made = Annotated[
    str | None,
    typer.Option("--exporter", metavar="NAME", help="Only buffers of this exporter."),
]
