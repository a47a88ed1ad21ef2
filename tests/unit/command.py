"""Running `dmabuf`: in this process where that will do, and as a program where it has to be."""

import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest

from dmabuf.cli import main

PROGRAM = [sys.executable, "-m", "dmabuf.cli"]
PATIENCE = 100
"""Seconds to wait for what hangs only if something is broken; a busy machine needs many."""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str


def dmabuf(capsys: pytest.CaptureFixture[str], *arguments: object) -> Ended:
    """Run a command line in this process."""
    capsys.readouterr()
    status = main([str(one) for one in arguments])
    told = capsys.readouterr()
    return Ended(status, told.out, told.err)


def start(*arguments: object, **how: object) -> subprocess.Popen:
    """Start the program."""
    command = [*PROGRAM, *(one if isinstance(one, bytes) else str(one) for one in arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how)


def finish(process: subprocess.Popen, data: bytes | None = None) -> Ended:
    """Wait for its end."""
    out, err = process.communicate(data, timeout=PATIENCE)
    text = out.decode(errors="surrogateescape"), err.decode(errors="surrogateescape")
    return Ended(process.returncode, *text)


def room_for(nbytes: int) -> Callable[[], None]:
    """A `preexec_fn`: no file grows further, which stands for a full disk where we are not root."""
    return partial(resource.setrlimit, resource.RLIMIT_FSIZE, (nbytes, nbytes))
