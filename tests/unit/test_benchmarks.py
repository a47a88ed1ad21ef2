"""The benchmarks, as far as they run without what they compare with."""

import dataclasses
import json
import subprocess
import sys
from array import array
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MIB = 1 << 20


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def run(script, *arguments):
    done = subprocess.run(
        [sys.executable, BENCHMARKS / script, *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "script", ["aio.py", "bars.py", "beside_fio.py", "beside_peers.py"], ids=str
)
def test_command_lines_tell_what_they_take(script):
    assert "usage:" in run(script, "--help")


def test_bars_are_listed_and_chosen():
    everything = run("bars.py", "--list").splitlines()
    chosen = run("bars.py", "--list", "--only", "lone", "--targets", "zram").splitlines()
    assert [line.split()[:2] for line in chosen] == [["lone", "zram"]]
    assert set(chosen) < set(everything)


def test_a_bar_is_met_on_its_own_side():
    import bars

    bar = bars.Bar("x", "disk", "x", 0.95, lambda path: bars.Sample.ratio(1, 2))
    assert bar.met(0.95)
    assert not bar.met(0.94)
    at_most = dataclasses.replace(bar, at_least=False)
    assert at_most.met(0.95)
    assert not at_most.met(0.96)
    row = bars.measure_bar(bar, "", 3)
    assert (row["value"], row["met"]) == (0.5, False)
    assert bars.show(bar, row).startswith("MISSED disk")


def test_requests_cover_their_span_and_stay_in_their_memory():
    import ours

    measure = ours.Measure("x", False, False, MIB, 4, 32 * MIB, span=8 * MIB)
    segments = measure.segments()
    assert segments[0::3] == array("Q", range(0, 8 * MIB, MIB))
    assert segments[1::3] == array("Q", [*range(0, 4 * MIB, MIB)] * 2)
    assert set(segments[2::3]) == {MIB}


def test_our_side_measures_requests(tmp_path):
    import ours

    target = tmp_path / "target"
    target.write_bytes(bytes(4 * MIB))
    measure = ours.Measure("x", False, True, 4096, 8, 8 * MIB, span=4 * MIB)
    found = ours.run_ours(str(target), measure)
    assert found.speed > 0
    assert found.route in ("direct", "buffered")
    assert found.process.cpu > 0
    assert found.process.peak > MIB


def test_the_last_line_of_a_failure_is_its_reason():
    import common

    with pytest.raises(common.FailedError, match=r"^ValueError: told$"):
        common.run([sys.executable, "-c", "raise ValueError('told')"])


def test_a_file_of_tensors_is_what_its_digest_says(tmp_path, monkeypatch):
    import model

    monkeypatch.setattr(model, "TENSOR", 1 << 16)
    path = tmp_path / "model.safetensors"
    digest = model.write(str(path), 4 << 16)
    data = bytearray(path.read_bytes())
    assert len(data) == model.HEADER + (4 << 16)
    tensors = model.of_file(memoryview(data))
    assert list(tensors) == model.names(4 << 16)
    assert model.digest_of(tensors) == digest
    data[-1] ^= 1
    assert model.digest_of(tensors) != digest


def test_a_loader_gets_the_bytes(tmp_path, monkeypatch):
    import model
    import peers

    monkeypatch.setattr(model, "TENSOR", 1 << 16)
    path = str(tmp_path / "model.safetensors")
    digest = model.write(path, 4 << 16)
    for route in ("direct", "staged", "buffered"):
        answer = json.loads(run("peers.py", f"dmabuf-{route}", path, "verify"))
        assert answer["digest"] == digest
        assert answer["seconds"] > 0
    assert peers.PEERS["dmabuf-own"].prefaulted is False


def test_the_table_ranks_and_says_what_was_skipped(tmp_path, monkeypatch):
    import report

    monkeypatch.setattr(report, "chart", lambda *arguments: None)

    def row(name, seconds):
        return {"name": name, "seconds": [seconds] * 3, "cpu_of_load": [1.0], "cpu": [2.0],
                "peak": [MIB], "pages": [0]}  # fmt: skip

    rows = [row("load_file-copied", 2.0), row("dmabuf-direct", 1.0)]
    rows.append({"name": "kvikio", "skipped": "RuntimeError: no driver"})
    report.write(tmp_path, {"size": 1 << 30, "runs": 3, "machine": ["m"], "on": {"zram": rows}})
    text = (tmp_path / "peers.md").read_text()
    assert text.index("| dmabuf, direct |") < text.index("| safetensors load_file, copied |")
    assert "2.00 times the speed of the best of the others, safetensors load_file" in text
    assert "KvikIO, host memory: skipped: RuntimeError: no driver" in text
