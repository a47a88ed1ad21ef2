"""The examples that need no device run, and every example is run by some test."""

import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.support import assert_same, pattern

ROOT = Path(__file__).parents[2]


def run(name, *words):
    command = [sys.executable, "-W", "error", ROOT / "examples" / name, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.stderr, done.returncode) == ("", 0)
    return done.stdout.splitlines()


def test_each_is_run_by_a_test_and_can_be_read_at_once():
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    examples = sorted((ROOT / "examples").glob("*.py"))
    assert len(examples) > 7
    for example in examples:
        assert example.name in tests
        assert len(example.read_text().splitlines()) < 100, example.name


def test_round_trip(tmp_path):
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.write_bytes(pattern(100_003, 1))
    lines = run("round_trip.py", source, copy)
    assert_same(copy.read_bytes(), pattern(100_003, 1), "the copy")
    assert lines[1].startswith("file to buffer: 100,003 bytes in ")
    assert lines[-1] == f"{copy} is byte for byte {source}"


def test_arrays(tmp_path):
    rows = np.random.default_rng(1).random((25, 96), np.float32)
    paths = [tmp_path / name for name in ("rows", "unit", "first")]
    rows.tofile(paths[0])
    lines = run("arrays.py", paths[0], 96, *paths[1:])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    assert_same(paths[1].read_bytes(), rows.tobytes(), "all rows")
    assert_same(paths[2].read_bytes(), rows[:10].tobytes(), "ten of them")
    assert [line.partition(": ")[2].partition(" bytes")[0] for line in lines] == ["9,600", "3,840"]
