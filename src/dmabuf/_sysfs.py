"""What the kernel tells in small text files, under /proc and /sys."""

import os


def read(*path: str) -> str:
    """A file's text, "" where it does not exist or is not ours to read."""
    try:
        with open(os.path.join(*path), encoding="utf-8", errors="replace", newline="\n") as file:
            return file.read()
    except OSError:
        return ""


def number(*path: str) -> int | None:
    """The number that is all of a file's text; None where there is no such number."""
    text = read(*path).strip()
    return int(text) if text.isdecimal() else None
