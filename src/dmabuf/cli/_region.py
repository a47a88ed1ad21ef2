"""`--region OFFSET+SIZE --destroy`: what of a target may be overwritten."""

from __future__ import annotations

import typer

from dmabuf.sizes import OFFSET_MAX, parse_size


def parse(text: str | None, *, destroy: bool) -> tuple[int, int] | None:
    """Offset and size, in bytes; None where nothing is overwritten.

    Raises:
        typer.BadParameter: it is no region, or --destroy comes without one, or the reverse.
    """
    if destroy != (text is not None):
        missing = "--region OFFSET+SIZE" if destroy else "--destroy"
        given = "--destroy" if destroy else "--region"
        raise typer.BadParameter(
            f"{given} needs {missing}: nothing is overwritten unless both are given"
        )
    return None if text is None else _region(text)


def _region(text: str) -> tuple[int, int]:
    offset, plus, size = text.partition("+")
    try:
        if not plus:
            raise ValueError("the two are joined by a plus")
        region = parse_size(offset, "offset"), parse_size(size, "size")
    except ValueError as error:
        raise typer.BadParameter(
            f"--region {text}: OFFSET+SIZE, such as 1GiB+64MiB ({error})"
        ) from None
    if not region[1] or sum(region) > OFFSET_MAX:
        raise typer.BadParameter(f"--region {text}: from 1 byte on, up to 2^63-1")
    return region
