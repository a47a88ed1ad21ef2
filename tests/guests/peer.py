"""The second guest: programs in it, the network to it, and what befalls it."""

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support import PATIENCE, run, wait_until

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
    """A program in the second guest for the time of a block; it has ended after the block."""
    pipe = subprocess.PIPE
    words = ["lab-peer", *map(str, command)]
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()  # lab-peer passes it on
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
            process.kill()


def befall(what: str) -> None:
    """Cut or join the network, or freeze, thaw or kill the second guest."""
    run("lab-peer", f"--{what}")


def cut_for_a_second() -> None:
    """Cut the network, and join it again a second after the second guest lost its carrier."""
    befall("cut")
    wait_until(lambda: there("cat", "/sys/class/net/link0/carrier") == "0", "the cut")
    time.sleep(1)
    befall("join")


@contextlib.contextmanager
def carrying(size: int, which: str = "rx") -> Iterator[None]:
    """The network carries so many bytes in a block, and not twice as many.

    The driver counts packets a moment after it has passed them on.
    """
    before = counted(which)
    yield
    wait_until(lambda: counted(which) - before > size, "bytes that the network carried")
    assert counted(which) - before < 2 * size


def counted(which: str = "rx", device: str = "link0") -> int:
    """The bytes that a network device has received or sent."""
    return int(Path(f"/sys/class/net/{device}/statistics/{which}_bytes").read_text())
