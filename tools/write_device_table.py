#!/usr/bin/env python3
"""Write docs/reference/devices.md: which tests proved what of which device, and where.

usage: tools/write_device_table.py [RESULTS...]

RESULTS are files that runs of marked tests wrote (tests/device_table.py); `make test-devices` makes
them all. They are merged into docs/reference/devices.json, and the page is made of that. A test
that ran replaces its earlier result on the same kernel and processor. Results of tests that no
longer exist are dropped, and so are those of an earlier point release of a kernel.
"""

import ast
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.device_table import ASPECTS  # noqa: E402 - it is beside the tests

JSON, PAGE = ROOT / "docs/reference/devices.json", ROOT / "docs/reference/devices.md"

Row = dict[str, Any]
"""A subsystem, the place it was tested "on", and the aspects that each of its "tests" proved."""

_HEAD = """\
<!-- Written by tools/write_device_table.py: see "The table of devices" in CONTRIBUTING.md. -->

# Devices

This table is made of the results of tests. A cell is filled where a test proved it on that kernel
and processor; the tests are named below. An empty cell means that no test has proved it there: the
kernel may lack it, or nobody has tested it. What a fake driver proved was not proved on hardware:
[hardware.md](hardware.md) lists what only hardware can show.

"""


def marks(node: ast.AST) -> Iterator[tuple[str, set[str]]]:
    """Yield the subsystem and the aspects of each `device_table` marker within a piece of code."""
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "device_table":
            subsystems, *aspects = (ast.literal_eval(argument) for argument in call.args)
            for subsystem in [subsystems] if isinstance(subsystems, str) else subsystems:
                yield subsystem, set(aspects)


def marked() -> dict[tuple[str, str], set[str]]:
    """Return the aspects by marked test and subsystem, as the sources of the tests have them."""
    found: dict[tuple[str, str], set[str]] = {}
    for path in sorted(ROOT.glob("tests/**/test_*.py")):
        tree = ast.parse(path.read_text())
        whole = [
            one
            for node in tree.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
            for one in marks(node)
        ]
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                test = f"{path.relative_to(ROOT)}::{node.name}"
                own = (one for decorator in node.decorator_list for one in marks(decorator))
                for subsystem, aspects in (*whole, *own):
                    found.setdefault((test, subsystem), set()).update(aspects)
    return found


def series(on: str) -> str:
    """Return a place without the point release of its kernel."""
    return re.sub(r"^(Linux \d+\.\d+)\.[\d.]+", r"\1", on)


def merge(rows: Iterable[Row], results: Iterable[Row]) -> list[Row]:
    """Return the rows with the results of runs in them."""
    table = {(row["subsystem"], row["on"]): dict(row["tests"]) for row in rows}
    for one in results:
        key = one["subsystem"], one["on"]
        for subsystem, on in list(table):
            if subsystem == key[0] and on != key[1] and series(on) == series(key[1]):
                del table[subsystem, on]
        tests = table.setdefault(key, {})
        tests.pop(one["test"], None)
        if one["passed"]:
            tests[one["test"]] = one["aspects"]
    declared = marked()
    merged = []
    for (subsystem, on), tests in sorted(table.items(), key=lambda item: str(item[0]).lower()):
        kept = {
            test: [one for one in ASPECTS if one in {*aspects} & declared[test, subsystem]]
            for test, aspects in sorted(tests.items())
            if (test, subsystem) in declared
        }
        if kept:
            merged.append({"subsystem": subsystem, "on": on, "tests": kept})
    return merged


def page(rows: list[Row]) -> str:
    """Return the text of the page."""
    lines = ["| column | what a test proved |", "| --- | --- |"]
    lines += [f"| {aspect} | {text} |" for aspect, text in ASPECTS.items()]
    lines += ["", "| subsystem | on | " + " | ".join(ASPECTS) + " |"]
    lines += ["| --- " * (2 + len(ASPECTS)) + "|"]
    proofs: dict[str, dict[str, set[str]]] = {}
    for row in rows:
        proved = set().union(*row["tests"].values())
        cells = ["yes" if aspect in proved else "" for aspect in ASPECTS]
        lines.append(" | ".join(["| " + row["subsystem"], row["on"], *cells]) + " |")
        for test, aspects in row["tests"].items():
            proofs.setdefault(row["subsystem"], {}).setdefault(test, set()).update(aspects)
    lines += ["", "## The tests"]
    for subsystem, tests in proofs.items():
        lines += ["", f"### {subsystem}", "", "| test | proves |", "| --- | --- |"]
        for test, aspects in sorted(tests.items()):
            names = ", ".join(aspect for aspect in ASPECTS if aspect in aspects)
            lines.append(f"| `{test}` | {names} |")
    return _HEAD + re.sub(r"\|  (?=\|)", "| ", "\n".join(lines)) + "\n"


def main(paths: list[str]) -> None:
    """Merge results into the JSON, and write the page."""
    rows = json.loads(JSON.read_text()) if JSON.exists() else []
    results = [one for path in paths for one in json.loads(Path(path).read_text())]
    rows = merge(rows, results)
    JSON.write_text(json.dumps(rows, indent=1) + "\n")
    PAGE.write_text(page(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
