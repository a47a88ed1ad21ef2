"""The command line: python -m tests.soak."""

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from dmabuf.engine import default_engine
from tests.soak.accounts import Account
from tests.soak.work import KINDS, WEIGHTS, Soak

WARM_UP = 300
"""Transfers before the first account at least: what is made once is no leak."""
BLOCKS, RESIDENT_KB = 400, 16 << 10
"""By how much the two that vary may grow, whatever the count."""


def run(
    count: int, seed: int, folder: Path, *, small: bool = False, loud: bool = False
) -> tuple[list[str], Account, Account, Counter[str]]:
    """Warm up, take account, soak, take account: what differs, both accounts, what was done."""
    engine = default_engine()
    with engine._rings[0].lock:  # it has two rings at most, and one for passthrough: no leak
        engine._pick_ring()
    engine._passthrough_ring()
    done = _some(max(WARM_UP, count // 10), seed + 1, folder, small=small)[0]
    del done
    before = Account.take()
    counts, routes = _some(count, seed, folder, small=small, loud=loud)
    after = before.settled()
    differences = after.differences(before)
    blocks, resident = after.growth(before)
    if blocks > BLOCKS:
        differences.append(f"{blocks} blocks of Python's memory more")
    if resident > RESIDENT_KB:
        differences.append(f"{resident} kB more resident")
    return differences, before, after, counts + routes


def _some(
    count: int, seed: int, folder: Path, *, small: bool, loud: bool = False
) -> tuple[Counter[str], Counter[str]]:
    done, told, names = 0, time.monotonic(), list(KINDS)
    with Soak(folder, seed, small=small) as soak:
        while done < count:
            kind = soak.dice.choices(names, WEIGHTS)[0]
            try:
                done += soak.one(kind)
            except BaseException:
                print(f"seed {seed}: after {done} transfers, at {kind!r}", file=sys.stderr)
                raise
            if loud and time.monotonic() - told > 10:
                told = time.monotonic()
                print(f"  {done} of {count}", file=sys.stderr, flush=True)
        soak.check()
    return soak.counts, soak.routes


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--count", type=int, default=100_000, help="transfers (100000)")
    parser.add_argument("--seed", type=int, default=1, help="of what is random (1)")
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"), help="for its files")
    options = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dmabuf-soak-", dir=options.folder) as folder:
        differences, before, after, counts = run(
            options.count, options.seed, Path(folder), loud=True
        )
    blocks, resident = after.growth(before)
    print(f"{options.count} transfers from seed {options.seed} in {time.monotonic() - begun:.0f} s")
    print(", ".join(f"{number} {name}" for name, number in sorted(counts.items())))
    print(f"before: {before}")
    print(f"after:  {after}")
    print(f"growth: {blocks} blocks, {resident} kB resident")
    print("\n".join(differences) or "all came back")
    return bool(differences)


if __name__ == "__main__":
    sys.exit(main())
