"""The command line: python -m tests.simulator."""

from __future__ import annotations

import argparse
import gc
import logging
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from multiprocessing import Process, SimpleQueue, Value, set_start_method
from pathlib import Path
from typing import Any

from tests.simulator.episode import Broken, Episode, lib

Result = tuple[Counter[str], list[tuple[int, str]]]
KINDS = ("undetected", "in flight at return", "leaked")


PATIENCE = 120
"""Seconds in which an episode ends."""


def work(
    seeds: Iterable[int],
    until: float,
    most_failures: int,
    folder: Path,
    current: Any,
    failed: Any,
    results: SimpleQueue[Result],
) -> None:
    """Run episodes; report the counts, and of each failure its seed and its kind."""
    counts: Counter[str] = Counter()
    failures: list[tuple[int, str]] = []
    logging.getLogger("dmabuf").addHandler(logging.NullHandler())
    warnings.simplefilter("ignore")  # coroutines that an interrupt leaves
    gc.disable()  # what the collector closes would come at any time
    signal.signal(signal.SIGALRM, give_up)
    with suppress(Exception):
        one(0, folder, Counter())  # what is found out once in a process
    for number, seed in enumerate(seeds):
        if time.monotonic() >= until or failed.value >= most_failures:
            break
        current.value = seed
        signal.alarm(PATIENCE)
        try:
            one(seed, folder, counts)
        except Exception as error:
            kind = error.kind if isinstance(error, Broken) else "other"
            failures.append((seed, kind))
            failed.value += 1
            print(f"seed {seed}:", *traceback.format_exception(error)[-3:], flush=True)
        if number % 64 == 0:
            gc.collect()
    signal.alarm(0)
    results.put((counts, failures))


def give_up(*_: object) -> None:
    raise Broken("other", "an episode that does not end")


def one(seed: int, folder: Path, counts: Counter[str]) -> None:
    """Run one episode; one of 64 a second time."""
    episode = Episode(seed, folder)
    try:
        counts.update(episode.run())
        counts["episodes"] += 1
    finally:
        episode.close()
    if counts["episodes"] % 64 != 1:
        return
    again = Episode(seed, folder)
    try:
        again.run()
    finally:
        again.close()
    counts["replays"] += 1
    if again.history != episode.history:
        raise Broken("other", "the same seed, and another history")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulator", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="how long (60)")
    parser.add_argument("--episodes", type=int, default=1 << 40, help="at most so many")
    parser.add_argument("--seed", type=int, default=0, help="of the first episode (0)")
    parser.add_argument("--seeds", metavar="FILE", help="run those of a file instead")
    parser.add_argument("--failures", type=int, default=10, help="after which it ends (10)")
    parser.add_argument("--workers", type=int, default=2, help="processes (2)")
    parser.add_argument("--loud", action="store_true", help="print everything that happens")
    options = parser.parse_args()
    set_start_method("fork")
    lib.virtual_loud(options.loud)
    seeds = range(options.seed, options.seed + options.episodes * options.workers)
    if options.seeds:
        lines = Path(options.seeds).read_text().splitlines()
        seeds = [int(line.split()[0]) for line in lines if line[:1].isdigit()]
    begun = time.monotonic()
    results: SimpleQueue[Result] = SimpleQueue()
    counts: Counter[str] = Counter()
    failures: list[tuple[int, str]] = []
    with tempfile.TemporaryDirectory(prefix="dmabuf-simulator-", dir="/dev/shm") as folder:
        started, failed = [], Value("I")
        for number in range(options.workers):
            place, current = Path(folder, str(number)), Value("Q")
            place.mkdir()
            arguments = seeds[number :: options.workers], begun + options.seconds, options.failures
            process = Process(target=work, args=(*arguments, place, current, failed, results))
            process.start()
            started.append((process, current))
        for process, current in started:
            process.join()
            if process.exitcode:
                print(f"seed {current.value}: the process died, {process.exitcode}")
                failures.append((current.value, "other"))
        while not results.empty():
            some, broken = results.get()
            counts += some
            failures += broken
    seconds = time.monotonic() - begun
    kinds = Counter(kind for _, kind in failures)
    rest = len(failures) - sum(kinds[kind] for kind in KINDS)
    print(
        f"{counts['transfers']} transfers in {counts['episodes']} episodes from seed "
        f"{options.seed}, "
        f"{counts['transfers'] / seconds * 3600:.2g} transfers an hour on {options.workers} "
        f"processors, {counts['lies']} lies, {counts['detected']} audits found wrong bytes, "
        + ", ".join(f"{kinds[kind]} {kind}" for kind in KINDS)
        + f", {rest} other failures"
    )
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
