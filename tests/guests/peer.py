"""The second guest: programs in it, the network to it, and what befalls it."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.support import run

HERE, THERE = (os.environ.get(f"DMABUF_TEST_{name}", "") for name in ("HOST", "PEER"))
"""The addresses of the two guests."""


def there(*command: object) -> str:
    """Run a program in the second guest and return its output; it must exit with 0."""
    return run("lab-peer", *command)


def python(source: str, *arguments: object) -> str:
    """Run Python source in the second guest and return its output."""
    return there("python3", "-c", source, *arguments)


@contextlib.contextmanager
def running(*command: object) -> Iterator["subprocess.Popen[str]"]:
    """A program in the second guest for the time of a block; its input ends with the block."""
    pipe = subprocess.PIPE
    words = ["lab-peer", *map(str, command)]
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()  # which ends the program, too


def befall(what: str) -> None:
    """Cut or join the network, or freeze, thaw or kill the second guest."""
    run("lab-peer", f"--{what}")


def counted(which: str = "rx", device: str = "link0") -> int:
    """The bytes that a network device has received or sent."""
    return int(Path(f"/sys/class/net/{device}/statistics/{which}_bytes").read_text())
