"""The examples that need no device; tests/device runs the others."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dmabuf
from tests.guards import needs
from tests.support import assert_same, pattern, poison

ROOT = Path(__file__).parents[2]


def run(name, *words):
    command = [sys.executable, "-W", "error", ROOT / "examples" / name, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.stderr, done.returncode) == ("", 0)
    return done.stdout.splitlines()


def test_each_is_run_by_a_test():
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for example in (ROOT / "examples").glob("*.py"):
        assert example.name in tests


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


def test_far_memory_names_the_exporter_that_is_missing():
    """tests/device runs it on far memory."""
    command = [sys.executable, ROOT / "examples/far_memory.py", __file__, "/dev/dax99.0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "/dev/dax99.0" in done.stderr.splitlines()[-1]


@pytest.fixture
def shared_memory():
    """The example; tests/guests runs it in two machines."""
    path = ROOT / "examples/shared_memory.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_shared_memory_hands_over_no_bytes_that_changed_meanwhile(
    shared_memory, tmp_path, monkeypatch
):
    source, other, copy = (tmp_path / name for name in ("source", "other", "copy"))
    source.write_bytes(pattern(100_003, 4))
    other.write_bytes(pattern(100_003, 5))
    copy.write_bytes(poison(100_003))
    with dmabuf.allocate("256KiB", exporter="memfd") as memory:
        for path in (other, source):  # the second time with bytes of the first one there
            shared_memory.put(memory, path)
        real = shared_memory.digest

        def again(*words):
            monkeypatch.undo()
            for path in (other, source):
                shared_memory.put(memory, path)
            return real(*words)

        monkeypatch.setattr(shared_memory, "digest", again)
        with pytest.raises(SystemExit, match="the memory changed"):
            shared_memory.get(memory, str(copy))
        assert_same(copy.read_bytes(), poison(100_003), "the file that was to be replaced")
        shared_memory.get(memory, str(copy))
        assert_same(copy.read_bytes(), pattern(100_003, 4), "the copy")


def test_shared_memory_stays_unfinished_where_the_file_does_not_fit(shared_memory, tmp_path):
    (tmp_path / "source").write_bytes(pattern(100_003, 4))
    with dmabuf.allocate("64KiB", exporter="memfd") as memory:
        with pytest.raises(SystemExit, match="does not fit into 61440 bytes"):
            shared_memory.put(memory, tmp_path / "source")
        with pytest.raises(SystemExit, match="a writer is at work, or died"):
            shared_memory.get(memory, str(tmp_path / "copy"))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@needs("sentence_model")
def test_the_embeddings_of_a_model_in_a_buffer_are_those_of_the_ordinary_way():
    command = [sys.executable, ROOT / "examples/sentence_model.py", "One sentence.", "Another."]
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=offline)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[1].startswith("90,860,184 bytes by route ")
    assert lines[2] == "2 embeddings of 384 numbers, equal to the ordinary way's"
