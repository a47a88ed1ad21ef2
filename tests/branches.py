"""Compare the branches of the C core that no test takes with the list of those that none can take.

    python tests/branches.py build/coverage/core.json

The argument is a report of gcovr, which `make coverage` makes. csrc/tests/untaken has a line for
each line of the core with a branch that no test takes: the file, the source line and the reason.
ublk.c is not counted: it needs the kernel's driver.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "csrc/tests/untaken"
NEEDS_DRIVER = "ublk.c"  # tests/unit/test_block_device.py has its tests


def listed() -> set[tuple[str, str]]:
    """Return the files and source lines of the list."""
    found = set()
    for line in LIST.read_text().splitlines():
        if line and not line.startswith("#"):
            name, rest = line.split(": ", 1)
            found.add((name, rest.rsplit("  -- ", 1)[0]))
    return found


def main() -> int:
    """Print the share of each file, then what is not listed, and what is listed and was taken."""
    known, unused = listed(), listed()
    totals: Counter[str] = Counter()
    taken: Counter[str] = Counter()
    missing: dict[str, list[str]] = defaultdict(list)
    for one in json.loads(Path(sys.argv[1]).read_text())["files"]:
        name = Path(one["file"]).name
        if name == NEEDS_DRIVER:
            continue
        source = (ROOT / one["file"]).read_text().splitlines()
        for line in one["lines"]:
            counts = [branch["count"] for branch in line["branches"]]
            totals[name] += len(counts)
            taken[name] += sum(map(bool, counts))
            if all(counts):
                continue
            text = source[line["line_number"] - 1].strip()
            unused.discard((name, text))
            if (name, text) in known:
                totals[name] -= counts.count(0)
            else:
                missing[name].append(f"{line['line_number']}: {text}  ({counts.count(0)})")
    for name in sorted(totals):
        share = 100 * taken[name] / max(totals[name], 1)
        print(f"{name:12} {taken[name]:5} of {totals[name]:5} branches, {share:.1f}%")
        print("".join(f"    {one}\n" for one in missing[name]), end="")
    for name, text in sorted(unused):
        print(f"csrc/tests/untaken lists a line whose branches are all taken: {name}: {text}")
    total, all_taken = sum(totals.values()), sum(taken.values())
    print(f"the core: {all_taken} of {total} branches; {len(known)} lines are listed, not counted")
    return bool(any(missing.values()) or unused)


if __name__ == "__main__":
    sys.exit(main())
