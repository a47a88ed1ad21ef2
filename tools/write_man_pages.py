#!/usr/bin/env python3
"""Write a manual page of each command from its parser; `make man` runs this.

usage: tools/write_man_pages.py FOLDER
"""

import sys
from pathlib import Path

from argparse_manpage.manpage import Manpage

from dmabuf import __version__
from dmabuf.cli import COMMANDS, load
from dmabuf.cli.complete import whole_parser
from dmabuf.cli.parser import Parser

FOLDER = Path(sys.argv[1])


def write(name: str, summary: str, parser: object) -> None:
    """Write one page."""
    page = Manpage(parser, _data={"project_name": "dmabuf", "version": __version__})
    page.prog, page.description = name, summary
    page.manual, page.date = "dmabuf", ""
    examples = ".SH EXAMPLES\n.nf\n"  # lines that are not filled; the section is the last
    text = str(page).replace(".SH COMMENTS\n", examples).replace("examples:\n", "")
    (FOLDER / f"{name}.1").write_text(text)


FOLDER.mkdir(parents=True, exist_ok=True)
write("dmabuf", "move bytes between files and dma-bufs", whole_parser(()))
for name, (_, summary) in COMMANDS.items():
    summary = summary[0].lower() + summary[1:].rstrip(".")
    write(f"dmabuf-{name}", summary, Parser(f"dmabuf {name}", load(name)))
