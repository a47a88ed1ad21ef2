"""The command line: python -m tests.soak."""

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.soak.accounts import MOST, Account
from tests.soak.work import KINDS, Soak

EACH = 6
"""How often each kind runs before the first account: what is made once is not a leak."""


def run(
    count: int, seed: int, folder: Path, *, loud: bool = False
) -> tuple[list[str], Account, Account, Counter[str]]:
    """Warm up, take account, soak, take account; return differences, both accounts, counts."""
    _some(count // 10, seed + 1, folder, each=EACH)
    before = Account.take()
    counts, routes = _some(count, seed, folder, loud=loud)
    after = before.settled()
    differences = after.differences(before)
    growth = after.growth(before)
    differences += [f"{name}: {growth[name]} more" for name in MOST if growth[name] > MOST[name]]
    return differences, before, after, counts + routes


def _some(
    count: int, seed: int, folder: Path, *, loud: bool = False, each: int = 0
) -> tuple[Counter[str], Counter[str]]:
    done, told, first = 0, time.monotonic(), list(KINDS) * each
    weights = [weight for weight, _ in KINDS.values()]
    with Soak(folder, seed) as soak:
        while done < count or first:
            kind = first.pop() if first else soak.dice.choices(list(KINDS), weights)[0]
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
    parser.add_argument("--seed", type=int, default=1, help="of the random choices (1)")
    parser.add_argument(
        "--folder", type=Path, default=Path("/var/tmp"), help="directory for its files"
    )
    options = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dmabuf-soak-", dir=options.folder) as folder:
        differences, before, after, counts = run(
            options.count, options.seed, Path(folder), loud=True
        )
    print(f"{options.count} transfers from seed {options.seed} in {time.monotonic() - begun:.0f} s")
    print(", ".join(f"{number} {name}" for name, number in sorted(counts.items())))
    print(f"before: {before}")
    print(f"after:  {after}")
    print("growth: " + ", ".join(f"{n} {name}" for name, n in after.growth(before).items()))
    print("\n".join(differences) or "all came back")
    return bool(differences)


if __name__ == "__main__":
    sys.exit(main())
