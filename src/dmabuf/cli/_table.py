"""Tables for people, by rich."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

Content = tuple[str, Sequence[str], Sequence[Sequence[str]]]
"""A title, the words above its columns, and its rows: text first, then figures."""

_UNBOUNDED = 1 << 20
"""Columns, where nobody's window is to be met."""


def table(
    title: str,
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: Container[int] = (0,),
    folded: Container[int] = (),
) -> Table:
    """`left` are the columns of text, the others have figures; `folded` may take several lines."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(
        title=Text(title, "bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for number, name in enumerate(head):
        made.add_column(
            name,
            justify="left" if number in left else "right",
            no_wrap=number not in folded,
            overflow="fold" if number in folded else "ellipsis",
        )
    for row in rows:
        made.add_row(*map(Text, row))
    return made


def drawn(
    title: str,
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: Container[int] = (0,),
    folded: Container[int] = (),
) -> str:
    """As text; in colour, and no wider than the window, where standard output is a terminal."""
    from rich.console import Console

    terminal = sys.stdout is not None and sys.stdout.isatty()
    text = io.StringIO()
    width = max(80, shutil.get_terminal_size().columns) if terminal else _UNBOUNDED
    Console(file=text, width=width, force_terminal=terminal, highlight=False).print(
        table(title, head, rows, left=left, folded=folded)
    )
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()).strip("\n")
