"""The parser of all commands together, for completion in shells and for the manual pages."""

from __future__ import annotations

import argparse
import os
from collections.abc import Container

from dmabuf.cli import ABOUT, COMMANDS, load
from dmabuf.cli.parser import Command, Parser


def complete() -> None:
    """Print what may follow in the unfinished command line COMP_LINE; argcomplete ends the process.

    Only the module of the command in that line is imported. Raises ImportError without argcomplete.
    """
    import argcomplete

    parser = whole_parser(os.environ["COMP_LINE"].split()[1:2])
    argcomplete.autocomplete(parser, always_complete_options=False)


def whole_parser(names: Container[str]) -> argparse.ArgumentParser:
    """Return a parser of `dmabuf`, with the arguments of the commands in `names`."""
    parser = argparse.ArgumentParser("dmabuf", description=ABOUT, add_help=False)
    parser.add_argument("-h", "--help", action="help", help="Show this text.")
    parser.add_argument("--version", action="version", help="Show the version.")
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=Parser, title="commands")
    for name, (_, summary) in COMMANDS.items():
        empty = Command(summary, lambda parser: None, lambda args: None)
        commands.add_parser(name, help=summary, command=load(name) if name in names else empty)
    return parser
