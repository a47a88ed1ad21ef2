"""The command line: python -m tests.fuzz."""

from __future__ import annotations

import argparse
import functools
import os
import random
import signal
import sys
import time
import traceback
from types import FrameType

from tests.fuzz import corpus
from tests.fuzz.targets import BYTES, TARGETS, Try, mutated


def _hang(number: int, frame: FrameType | None) -> None:
    raise TimeoutError("an input takes longer than --patience")


def run(name: str, attempt: Try, seed: int, seconds: float, patience: int) -> tuple[int, int, int]:
    """Try inputs from a seed for so long; return their number, failures, and descriptors left."""
    begun, tried, failed, inputs = time.monotonic(), 0, 0, 0
    before = len(os.listdir("/proc/self/fd"))
    while failed < 5 and (tried % 64 or time.monotonic() - begun < seconds):
        one = seed + tried
        tried += 1
        signal.alarm(patience)
        try:
            inputs += attempt(random.Random(one)) or 1
        except Exception:
            failed += 1
            print(f"{name}, seed {one}:\n{traceback.format_exc()}", flush=True)
        finally:
            signal.alarm(0)
    return inputs, failed, len(os.listdir("/proc/self/fd")) - before


def keep(names: list[str], seed: int, seconds: float) -> None:
    """Add inputs that reach new code to the corpus."""
    for name in names:
        make = functools.partial(_again_or_new, name)
        told = corpus.keep(name, BYTES[name].check, make, seed, seconds / len(names))
        print(told, flush=True)


def _again_or_new(name: str, dice: random.Random, found: list[bytes]) -> bytes:
    again = found and dice.random() < 0.7
    return mutated(dice, dice.choice(found)) if again else BYTES[name].make(dice)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="of all targets together (60)")
    parser.add_argument("--seed", type=int, default=0, help="of the first input (0)")
    text = "seconds that one input may take (10)"
    parser.add_argument("--patience", type=int, default=10, help=text)
    parser.add_argument("--keep", action="store_true", help="add to tests/fuzz/corpus instead")
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(TARGETS)}; all of them")
    options = parser.parse_args()
    if options.keep:
        keep(options.targets or list(BYTES), options.seed, options.seconds)
        return 0
    names = options.targets or list(TARGETS)
    signal.signal(signal.SIGALRM, _hang)
    told, failures = [], 0
    for name in names:
        with TARGETS[name]() as attempt:
            tried, failed, left = run(
                name, attempt, options.seed, options.seconds / len(names), options.patience
            )
        told.append(f"{tried} {name}")
        failures += failed
        if left > 4:  # the server closes a connection a little later
            print(f"{name}: {left} descriptors are left")
            failures += 1
    print(f"{', '.join(told)}: {failures} failures")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
