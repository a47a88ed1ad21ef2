"""Measure the cost of `import dmabuf`, of its first use, and of starting the command.

Each measure is a process; they run in turn with a bare interpreter. Printed are medians of wall and
processor time, less those of the bare interpreter.

    python benchmarks/start.py [--rounds 15] [--python /usr/bin/python3] [--file FILE]
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

BARE = "pass"
MEASURES = {
    "import": "import dmabuf",
    "and allocate": "import dmabuf; dmabuf.allocate(4096).close()",
    "and open": "import dmabuf, sys; dmabuf.open(sys.argv[1]).close()",
    "and read": (
        "import dmabuf, sys\n"
        "with dmabuf.allocate(4096) as buffer, dmabuf.open(sys.argv[1]) as file:\n"
        "    file.read_into(buffer)"
    ),
    "dmabuf --version": "from dmabuf.cli import main; main(['--version'])",
    "dmabuf --help": "from dmabuf.cli import main; main(['--help'])",
    "dmabuf cp --help": "from dmabuf.cli import main; main(['cp', '--help'])",
}


def measure(python: str, source: str, path: str) -> tuple[float, float]:
    """Return milliseconds of wall time and of processor time of one process."""
    begun = time.perf_counter()
    child = subprocess.Popen([python, "-I", "-c", source, path], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    clock = time.perf_counter() - begun
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{source!r} failed")
    return 1e3 * clock, 1e3 * (usage.ru_utime + usage.ru_stime)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--python", default=sys.executable, help="that dmabuf is installed for")
    parser.add_argument("--file", default=__file__, help="to open and read")
    wanted = parser.parse_args()
    sources = {"": BARE} | MEASURES
    for source in sources.values():  # compiles, and warms the page cache
        measure(wanted.python, source, wanted.file)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in sources}
    for _ in range(wanted.rounds):
        for name, source in sources.items():
            taken[name].append(measure(wanted.python, source, wanted.file))
    bare = [statistics.median(column) for column in zip(*taken[""], strict=True)]
    print(f"bare interpreter {bare[0]:6.1f} ms, {bare[1]:6.1f} ms of the processor")
    for name in MEASURES:
        clock, processor = (statistics.median(column) for column in zip(*taken[name], strict=True))
        print(f"{name:16} {clock - bare[0]:6.1f} ms, {processor - bare[1]:6.1f} ms over that")


if __name__ == "__main__":
    main()
