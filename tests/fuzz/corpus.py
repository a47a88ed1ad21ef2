"""The inputs that are kept: each makes a step between two lines that none before it makes.

`python -m tests.fuzz --keep` makes inputs for so many seconds, and adds those to the files of
corpus/. tests/unit/test_fuzz.py tries every kept input.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import dmabuf

FOLDER = Path(__file__).parent / "corpus"
PACKAGE = str(Path(dmabuf.__file__).parent)
LONGEST = 4096
"""The most bytes of a kept input."""

Step = tuple[str, int, int]
"""A file, and the numbers of two lines that ran one after the other."""


def _path(name: str) -> Path:
    return FOLDER / f"{name.replace(' ', '-')}.json"


def kept(name: str) -> list[bytes]:
    """Return the inputs of a target."""
    path = _path(name)
    return [one.encode("latin-1") for one in json.loads(path.read_text())] if path.exists() else []


def steps_of(call: Callable[[], object]) -> set[Step]:
    """Return the steps of the package that a call makes. Another call may be traced meanwhile."""
    found: set[Step] = set()

    def enter(frame: FrameType, event: str, arg: object) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        last = 0
        name = frame.f_code.co_filename

        def line(frame: FrameType, event: str, arg: object) -> Any:
            nonlocal last
            if event == "line":
                found.add((name, last, frame.f_lineno))
                last = frame.f_lineno
            return line

        return line

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        call()
    finally:
        sys.settrace(before)
    return found


def keep(
    name: str,
    check: Callable[[bytes], object],
    make: Callable[[random.Random, list[bytes]], bytes],
    seed: int,
    seconds: float,
) -> str:
    """Look for inputs that reach new steps for so long, and write them; return a summary.

    Inputs that were kept before stay only where they reach what no shorter one does.
    """
    reached: set[Step] = set()
    found: list[bytes] = []

    def consider(data: bytes) -> None:
        steps = steps_of(lambda: check(data))
        if len(data) <= LONGEST and not steps <= reached:
            reached.update(steps)
            found.append(data)

    for data in sorted(kept(name), key=len):
        consider(data)
    until, tried = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        consider(make(random.Random(seed + tried), found))
        tried += 1
    FOLDER.mkdir(exist_ok=True)
    shown = sorted((one.decode("latin-1") for one in found), key=lambda one: (len(one), one))
    _path(name).write_text(json.dumps(shown, indent=0) + "\n")
    return f"{name}: {len(found)} inputs of {tried}, {len(reached)} steps"
