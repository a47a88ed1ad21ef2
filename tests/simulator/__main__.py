"""The command line: python -m tests.simulator."""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import suppress
from multiprocessing import Process, SimpleQueue
from pathlib import Path

from tests.simulator.episode import Broken, Episode, lib

Result = tuple[Counter[str], list[tuple[int, str]]]
KINDS = ("undetected", "in flight at return", "leaked")


def work(
    first: int,
    step: int,
    until: float,
    most: int,
    most_failures: int,
    folder: Path,
    results: SimpleQueue[Result],
) -> None:
    """Run episodes; report the counts, and of each failure its seed and its kind."""
    counts: Counter[str] = Counter()
    failures: list[tuple[int, str]] = []
    seed, number = first, 0
    gc.disable()  # what the collector closes would come at any time
    with suppress(Exception):
        one(0, folder, Counter())  # what is found out once in a process
    while number < most and time.monotonic() < until and len(failures) < most_failures:
        try:
            one(seed, folder, counts)
        except Exception as error:
            kind = error.kind if isinstance(error, Broken) else "other"
            failures.append((seed, kind))
            print(f"seed {seed}:", *traceback.format_exception(error)[-3:], flush=True)
        if number % 64 == 0:
            gc.collect()
        seed, number = seed + step, number + 1
    results.put((counts, failures))


def one(seed: int, folder: Path, counts: Counter[str]) -> None:
    """Run one episode; one of 64 a second time, unless threads take part in it."""
    episode = Episode(seed, folder)
    try:
        counts.update(episode.run())
        counts["episodes"] += 1
    finally:
        episode.close()
    if counts["episodes"] % 64 != 1 or episode.way == episode.loop:
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
    parser.add_argument("--episodes", type=int, default=1 << 60, help="at most so many")
    parser.add_argument("--seed", type=int, default=0, help="of the first episode (0)")
    parser.add_argument("--failures", type=int, default=10, help="after which a process ends (10)")
    parser.add_argument("--workers", type=int, default=2, help="processes (2)")
    parser.add_argument("--loud", action="store_true", help="print everything that happens")
    options = parser.parse_args()
    lib.virtual_loud(options.loud)
    begun = time.monotonic()
    results: SimpleQueue[Result] = SimpleQueue()
    counts: Counter[str] = Counter()
    failures: list[tuple[int, str]] = []
    with tempfile.TemporaryDirectory(prefix="dmabuf-simulator-", dir="/dev/shm") as folder:
        started = []
        for number in range(options.workers):
            place = Path(folder, str(number))
            place.mkdir()
            arguments = options.seed + number, options.workers, begun + options.seconds
            process = Process(
                target=work, args=(*arguments, options.episodes, options.failures, place, results)
            )
            process.start()
            started.append(process)
        for _ in started:
            some, failed = results.get()
            counts += some
            failures += failed
        for process in started:
            process.join()
    seconds = time.monotonic() - begun
    broken = Counter(kind for _, kind in failures)
    rest = sum(broken.values()) - sum(broken[kind] for kind in KINDS)
    print(
        f"{counts['transfers']} transfers in {counts['episodes']} episodes from seed "
        f"{options.seed}, "
        f"{counts['transfers'] / seconds * 3600:.2g} transfers an hour on {options.workers} "
        f"processors, {counts['lies']} lies, {counts['detected']} audits found wrong bytes, "
        + ", ".join(f"{broken[kind]} {kind}" for kind in KINDS)
        + f", {rest} other failures"
    )
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
