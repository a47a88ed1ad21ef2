"""What a display shows, seen from outside: a screendump by the monitor of the lab's QEMU."""

import itertools
import json
import mmap
import os

from tests.guards import lab_drive, lab_port

_numbers = itertools.count(1)


def dump() -> tuple[int, int, bytes]:
    """Width and height, and the red, green and blue byte of every pixel, row by row."""
    _monitor("qmp_capabilities")
    answer = _monitor("screendump", filename="screen", device="lab-screen")
    assert "error" not in answer, answer
    data = _drive()
    kind, width, height, most = data[:40].split()[:4]
    assert (kind, most) == (b"P6", b"255")
    start = len(b"P6\n%s %s\n255\n" % (width, height))
    size = int(width) * int(height) * 3
    return int(width), int(height), data[start : start + size]


def _monitor(command: str, **arguments: str) -> dict[str, object]:
    number = next(_numbers)
    question = {"execute": command, "arguments": arguments, "id": number}
    with open(lab_port(), "r+b", buffering=0) as port:
        port.write(json.dumps(question).encode() + b"\n")
        line = b""
        while True:  # greetings and events come in between
            line += port.read(1)
            if line.endswith(b"\n"):
                answer = json.loads(line)
                if answer.get("id") == number:
                    return answer
                line = b""


def _drive() -> bytes:
    """The drive that the dump is on, past the guest's cache."""
    fd = os.open(lab_drive(), os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    try:
        with mmap.mmap(-1, os.lseek(fd, 0, os.SEEK_END)) as memory:
            os.preadv(fd, [memory], 0)
            return memory[:]
    finally:
        os.close(fd)
