"""The benchmarks, as far as they run without what they compare with."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
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
    "script",
    ["aio.py", "bars.py", "beside_fio.py", "beside_peers.py", "census.py", "mount.py", "scale.py"],
)
def test_command_lines_tell_what_they_take(script):
    assert "usage:" in run(script, "--help")


def test_a_census_of_many_processes():
    told = json.loads(
        run("census.py", "--processes", 5, "--descriptors", 20, "--looks", 2, "--json")
    )
    assert told["seen"]["processes"] >= 6
    assert set(told["figures"]) == {"census", "the same reading"}
    assert all(0 < one["ms"] <= one["worst ms"] for one in told["figures"].values())


@pytest.mark.parametrize(
    ("script", "names", "why"),
    [
        ("beside_fio.py", "disk,floppy", "floppy: not among disk, tmpfs, zram"),
        ("bars.py", "import,lonely", "no bar is called lonely"),
    ],
)
def test_an_unknown_name_is_refused_before_anything_runs(script, names, why):
    command = [sys.executable, BENCHMARKS / script, "--only", names]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert why in done.stderr


def test_bars_are_listed_and_chosen():
    everything = run("bars.py", "--list").splitlines()
    chosen = run("bars.py", "--list", "--only", "lo*,import", "--targets", "zram").splitlines()
    assert [tuple(line.split()[:2]) for line in chosen] == [
        ("loop-1m", "zram"), ("loop-1m-huge", "zram"), ("loop-4k", "zram"),
        ("loop-4k-huge", "zram"), ("lone", "zram"), ("import", "-"),
    ]  # fmt: skip
    assert set(chosen) < set(everything)


def test_a_bar_is_met_on_its_own_side():
    import bars
    import targets

    nowhere = targets.Targets("/nowhere", 0)
    bar = bars.Bar("x", "-", "x", 0.95, lambda path, number: (number + 1, 2))
    assert bar.met(0.95)
    assert not bar.met(0.94)
    at_most = dataclasses.replace(bar, at_least=False)
    assert at_most.met(0.95)
    assert not at_most.met(0.96)
    row = bars.measured(bar, nowhere, 3)
    assert (row["value"], row["spread"], row["met"]) == (1, [0.5, 1.5], True)
    assert bars.show(row).startswith("met     -     x ")
    assert "1.00 (0.50 to 1.50)" in bars.show(row)
    assert not bars.measured(bar, nowhere, 1)["met"]
    saved = dataclasses.replace(bar, of=bars.saved, pair=lambda path, number: (5, 2))
    assert bars.measured(saved, nowhere, 1)["value"] == pytest.approx(0.6)


def test_what_cannot_be_measured_is_no_failure_and_a_failure_is_no_skip():
    import bars
    import common
    import targets

    def raises(error):
        def pair(path, number):
            raise error

        return bars.measured(bars.Bar("x", "disk", "x", 1, pair), targets.Targets("/nowhere", 0), 1)

    skipped = raises(common.SkippedError("no fio"))
    assert bars.show(skipped).split() == ["skipped", "disk", "x", "no", "fio"]
    failed = raises(common.FailedError("read: EIO"))
    assert bars.show(failed).split() == ["failed", "disk", "x", "read:", "EIO"]


def test_every_other_pair_has_ours_first():
    import bar_pairs

    order = []
    pair = bar_pairs.by_turns(lambda path: order.append(path) or 1, lambda path: 2)
    paths = iter("abcd")
    assert [pair(lambda: next(paths), number) for number in range(2)] == [(1, 2)] * 2
    assert order == ["b", "c"]  # second, then first


@pytest.mark.parametrize(
    "arguments, status",
    [(["--pairs", "1", "--only", "import"], 1), (["--only", "registered", "--targets", "zram"], 0)],
)
def test_the_exit_status_says_whether_bars_are_met(monkeypatch, capsys, arguments, status):
    import bars

    monkeypatch.setattr(bars, "costs", lambda: [
        bars.at_most("import", "-", "x", 40, lambda path, number: (50, 0), of=bars.alone),
        bars.at_most("registered", "disk", "x", 1, lambda path, number: (0, 0)),
    ])  # fmt: skip
    monkeypatch.setattr(bars, "stop_tidily", lambda: None)
    monkeypatch.setattr(sys, "argv", ["bars.py", *arguments])
    assert bars.main() == status
    assert f"{status} NOT met" in capsys.readouterr().err


def test_the_c_loop_moves_its_requests(tmp_path):
    import bar_pairs
    import common
    import ours

    target = tmp_path / "target"
    target.write_bytes(bytes(4 * MIB))
    measure = ours.Measure("x", False, True, 4096, 8, 8 * MIB, footprint=MIB, span=4 * MIB)
    mine, loop = bar_pairs.beside_loop(measure)(lambda: str(target), 0)
    assert mine > 0
    assert loop > 0
    target.write_bytes(bytes(2 * MIB))  # half of the requests are beyond the end now
    with pytest.raises(common.FailedError, match="loop: short read"):
        bar_pairs.beside_loop(measure)(lambda: str(target), 0)


def test_the_machine_is_named_with_its_interpreter():
    import common

    text = "\n".join(common.machine(["fio-3"]))
    for word in (os.uname().release, sys.version.split()[0], "ns a call", "fio-3", "dmabuf "):
        assert word in text


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
    assert MIB < found.process.peak < 1 << 30
    assert ours.run_ours(str(target), measure.idle()).speed == 0


def test_the_last_line_of_a_failure_is_its_reason():
    import common

    with pytest.raises(common.FailedError, match=r"^ValueError: told$"):
        common.run([sys.executable, "-c", "raise ValueError('told')"])


def test_a_target_is_filled_whole_and_taken_away(tmp_path):
    import targets

    with targets.Targets(str(tmp_path), 9 * MIB + 512) as found:
        path = Path(found.path("disk"))
        assert path.stat().st_size == 9 * MIB + 512
        assert len(set(path.read_bytes()[-512:])) > 100
        assert found.path("disk") == str(path)
    assert list(tmp_path.iterdir()) == []


def test_a_target_without_room_is_skipped(tmp_path):
    import common
    import targets

    with targets.Targets(str(tmp_path), 1 << 60) as found:
        with pytest.raises(common.SkippedError, match="MiB free"):
            found.path("disk")
    assert list(tmp_path.iterdir()) == []


STOPPED = """
import sys
sys.path.insert(0, {benchmarks!r})
import common, targets
common.stop_tidily()
with targets.Targets({folder!r}, 4096) as found:
    found.path("disk")
    common.run(["sh", "-c", "echo $$ > {folder}/pid; exec sleep 600"])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_child_and_takes_targets_away(tmp_path, number):
    source = STOPPED.format(benchmarks=str(BENCHMARKS), folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", source], stderr=subprocess.PIPE, text=True)
    pid = tmp_path / "pid"
    while process.poll() is None and not (pid.exists() and pid.read_text()):
        time.sleep(0.01)
    process.send_signal(number)
    errors = process.communicate()[1]
    assert process.returncode == 128 + number, errors
    assert errors == f"stopped by {number.name}\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["pid"]
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


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

    monkeypatch.setattr(model, "TENSOR", 1 << 16)
    path = str(tmp_path / "model.safetensors")
    digest = model.write(path, 4 << 16)
    for route in ("direct", "staged", "buffered"):
        answer = json.loads(run("peers.py", f"dmabuf-{route}", path, "verify"))
        assert answer["digest"] == digest
        assert answer["seconds"] > 0


def a_round(seconds):
    return {name: {"seconds": value, "cpu_of_load": 10 * value} for name, value in seconds.items()}


def test_ours_is_compared_with_the_fastest_that_loads_and_the_cheapest_that_is_buffered():
    import common
    import report

    ours = {"dmabuf-direct": 1.0, "dmabuf-own": 1.5, "dmabuf-buffered": 0.1, "fio": 0.1}
    others = {"load_file": 0.2, "deepspeed": 2.0, "runai": 3.0, "torch": 4.0}
    one = a_round(ours | others)
    assert report.sooner(one) == (1.0, 2.0)
    assert report.sooner(one, "dmabuf-own") == (1.5, 3.0)
    assert report.cheaper(one) == (10.0, 2.0)  # load_file's
    for compare in (report.sooner, report.cheaper):
        with pytest.raises(common.SkippedError):
            compare(a_round(ours))


def test_the_table_ranks_and_says_what_was_skipped(tmp_path, monkeypatch):
    import report

    monkeypatch.setattr(report, "chart", lambda *arguments: None)

    def row(name, *seconds):
        count = len(seconds)
        return {"name": name, "seconds": seconds, "cpu_of_load": [1.0] * count,
                "cpu": [2.0] * count, "peak": [MIB] * count, "pages": [0] * count}  # fmt: skip

    rows = [row("load_file-copied", 2.0, 3.0, 2.0), row("dmabuf-direct", 1.0, 1.0, 1.0)]
    rows.append(row("fio", 1.0, 1.5, 0.5))
    rows.append({"name": "kvikio", "skipped": "RuntimeError: no driver"})
    report.write(tmp_path, {"size": 1 << 30, "runs": 3, "machine": ["m"], "on": {"zram": rows}})
    text = (tmp_path / "peers.md").read_text()
    assert text.index("| dmabuf, direct |") < text.index("| safetensors load_file, copied |")
    assert "2.00 (2.00 to 3.00) times the speed of the fastest of the others" in text
    cells = {
        line.split(" | ")[0]: line.split(" | ")[3]
        for line in text.splitlines()[8:]
        if " | " in line
    }
    assert cells["| dmabuf, direct"] == "100 %"
    assert cells["| safetensors load_file, copied"] == "50 %"
    assert "KvikIO, host memory: skipped: RuntimeError: no driver" in text


def test_loaders_that_are_not_installed_are_skipped_before_anything_is_written(tmp_path):
    import beside_peers
    import common

    with beside_peers.Loaders(str(tmp_path), 1 << 30, beside_peers.EVERY) as loaders:
        with pytest.raises(common.SkippedError, match=r"make \.venv-peers/ready"):
            loaders.round("disk", 0)
    assert list(tmp_path.iterdir()) == []


def test_rounds_are_measured_once_and_wrong_bytes_are_left_out(tmp_path, monkeypatch):
    import importlib.util

    import beside_peers
    import model

    done = []

    def one(name, path, how):
        done.append((name, Path(path).name, how))
        answer = dict.fromkeys(beside_peers.KEYS, 1.0)
        return answer | ({} if how == "load" else {"digest": model.write(path, model.TENSOR)}
                         if name == "runai" else {"digest": "wrong"})  # fmt: skip

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(model, "TENSOR", 1 << 16)
    monkeypatch.setattr(beside_peers, "one", one)
    with beside_peers.Loaders(str(tmp_path), 1 << 16, ["runai", "deepspeed"]) as loaders:
        assert list(loaders.round("disk", 1)) == ["runai"]
        assert loaders.round("disk", 0) is loaders.round("disk", 0)
        rows = loaders.rows("disk")
    file = "model.safetensors"
    assert (
        done
        == [("runai", file, "verify"), ("deepspeed", file, "verify")]
        + [("runai", file, "load")] * 2
    )
    assert rows[0]["seconds"] == [1.0, 1.0]
    assert rows[1] == {
        "name": "deepspeed", "skipped": "what it loaded is not what the file holds",
    }  # fmt: skip
    assert list(tmp_path.iterdir()) == []
