"""A short run of the package on the virtual kernel, from new seeds: `make simulate` is longer."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no /dev/shm: mount a tmpfs there")
def test_new_seeds():
    seed = str(time.time_ns() // 1000)
    command = [sys.executable, "-m", "tests.simulator", "--workers", "1", "--seed", seed]
    run = subprocess.run(
        [*command, "--episodes", "100", "--seconds", "300"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    last = run.stdout.splitlines()[-1]
    assert "0 undetected, 0 in flight at return, 0 leaked" in last
    assert " 100 episodes " in last
