"""The inputs that are kept, and a few seconds of new ones: `make fuzz` tries more."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fuzz import corpus
from tests.fuzz.targets import BYTES, TARGETS

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", BYTES)
def test_every_kept_input(name):
    kept = corpus.kept(name)
    assert len(kept) >= 5
    for data in kept:
        BYTES[name].check(data)


def test_new_seeds():
    seed = str(time.time_ns() // 1000)
    names = [name for name in TARGETS if name != "mount"]  # which test_mount_model.py has
    run = subprocess.run(
        [
            *(sys.executable, "-m", "tests.fuzz", "--seconds", "4", "--seed", seed),
            *("--patience", "100", *names),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.splitlines()[-1].endswith(": 0 failures")
