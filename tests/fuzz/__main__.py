"""The command line: python -m tests.fuzz."""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
import traceback

from tests.fuzz.targets import TARGETS, Try


def run(name: str, attempt: Try, seed: int, seconds: float) -> tuple[int, int, int]:
    """Try inputs from a seed for so long; return their number, failures, and descriptors left."""
    begun, tried, failed = time.monotonic(), 0, 0
    before = len(os.listdir("/proc/self/fd"))
    while failed < 5 and (tried % 64 or time.monotonic() - begun < seconds):
        one = seed + tried
        tried += 1
        try:
            attempt(random.Random(one))
        except Exception:
            failed += 1
            print(f"{name}, seed {one}:\n{traceback.format_exc()}", flush=True)
    return tried, failed, len(os.listdir("/proc/self/fd")) - before


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="of all targets together (60)")
    parser.add_argument("--seed", type=int, default=0, help="of the first input (0)")
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(TARGETS)}; all of them")
    options = parser.parse_args()
    names = options.targets or list(TARGETS)
    told, failures = [], 0
    for name in names:
        with TARGETS[name]() as attempt:
            tried, failed, left = run(name, attempt, options.seed, options.seconds / len(names))
        told.append(f"{tried} {name}")
        failures += failed
        if left > 4:  # the server closes a connection a little later
            print(f"{name}: {left} descriptors are left")
            failures += 1
    print(f"{', '.join(told)}: {failures} failures")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
