"""A few seconds of random input from new seeds: `make fuzz` tries more."""

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_new_seeds():
    seed = str(time.time_ns() // 1000)
    run = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--seconds", "4", "--seed", seed],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.splitlines()[-1].endswith(": 0 failures")
