"""`dmabuf bench`: what it prints, what it draws, what it refuses, and what it never touches."""

import errno
import json
import os
import signal
import sys
from xml.etree import ElementTree

import pytest

from tests.guards import needs
from tests.support import loop_device, mounted, pattern
from tests.unit.command import dmabuf, finish, room_for, start

SIZE = 1_000_003
TINY = ("--rounds", 2, "--seconds", 60, "--seed", 5, "--block", "4KiB,64KiB", "--depth", "1,8")
SMALL = (*TINY, "--size", "256KiB")
REGION = ("--region", "128KiB+256KiB", "--destroy")


@pytest.fixture
def target(tmp_path):
    path = tmp_path / "target"
    path.write_bytes(pattern(SIZE, 3))
    return path


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    return path


def test_a_target_that_is_only_read(target, capsys):
    os.chmod(target, 0o444)
    before = target.read_bytes(), target.stat().st_mtime_ns, target.stat().st_ctime_ns
    ended = dmabuf(capsys, "bench", *SMALL, target)
    assert (ended.status, ended.err) == (0, "")
    assert (target.read_bytes(), target.stat().st_mtime_ns, target.stat().st_ctime_ns) == before
    lines = ended.out.splitlines()
    words = ("machine", "kernel", "versions", "target", "measured", "buffer", "runs")
    assert [line.split()[0] for line in lines[:7]] == list(words)
    assert f"target   {target} (file, on " in ended.out
    assert "256 KiB of it, every byte compared once per way" in ended.out
    assert "2 interleaved rounds, blocks in order, seed 5" in ended.out
    assert "read, blocks of 4 KiB, 256 KiB a run" in ended.out
    assert "read, blocks of 64 KiB, latency of a call" in ended.out
    assert "no native: the buffer is a memfd, which is not a dma-buf" in ended.out
    assert "write" not in ended.out
    assert "in the noise: " in ended.out, "two rounds show no difference"
    for line, size in zip(lines[-2:], ("64 KiB", "4 KiB"), strict=True):
        assert line.startswith(f"read {size}: direct x8 is not measurably faster or slower than a")


def test_a_scratch_file_leaves_nothing(folder, capsys):
    ended = dmabuf(capsys, "bench", "--json", *SMALL, "--random", "--dir", folder)
    assert (ended.status, ended.err) == (0, "")
    told = json.loads(ended.out)
    assert os.listdir(folder) == []
    assert told["target"]["name"] == f"a scratch file in {folder}"
    assert told["target"]["size"] == 256 << 10
    assert told["buffer"] == told["buffer"] | {"exporter": "memfd", "huge_pages": None}
    assert told["why_not_cold"] is told["why_not_visible"] is None and told["random"]
    assert (told["rounds"], told["seed"]) == (2, 5)
    assert len(told["headlines"]) == 4
    groups = {(group["direction"], group["block"]): group for group in told["groups"]}
    assert set(groups) == {(d, b) for d in ("read", "write") for b in (4096, 65536)}
    for (_, block), group in groups.items():
        rows = {(row["way"], row["depth"]): row for row in group["ways"]}
        routes = {(r, d) for r in ("direct", "staged", "buffered") for d in (1, 8)}
        assert set(rows) == routes | {("copy", 1), ("bounce", 1), ("mmap", 1)}
        for row in rows.values():
            assert row["bytes_per_second"] > 0 and row["cached_pages_before"] == 0
            assert row["iops"] * block == pytest.approx(row["bytes_per_second"])
            assert row["cpu_seconds_per_gib"] >= 0 and len(row["seconds"]) == 2
            uncached = row["way"] in ("direct", "staged", "bounce")
            assert bool(row["cached_pages_after"]) != uncached
            assert row["today"] == (row["way"] in ("copy", "bounce", "mmap"))
        figure = rows["direct", 8]["times_as_fast"]["copy"]
        ours, copy = rows["direct", 8]["seconds"], rows["copy", 1]["seconds"]
        pairs = [other / one for one, other in zip(ours, copy, strict=True)]
        assert [figure["low"], figure["high"]] == sorted(pairs) and not figure["certain"]
        assert "copy" not in rows["copy", 1]["times_as_fast"]
        assert {one["way"] for one in group["latencies"]} == {way for way, _ in rows}
        for one in group["latencies"]:
            assert one["calls"] >= 2 and one["seconds"]["p100"] > 0
    assert told["machine"]["cpus"] == os.cpu_count() and told["machine"]["kernel"]


def test_memory_is_named_for_what_it_is(capsys):
    ended = dmabuf(capsys, "bench", *SMALL, "--dir", "/dev/shm")
    assert (ended.status, ended.err) == (0, "")
    assert "(file, on tmpfs)" in ended.out
    assert "no run was cold: tmpfs keeps its files in the page cache" in ended.out
    for way in ("direct", "bounce"):
        assert f"no {way}: tmpfs keeps its files in the page cache: O_DIRECT" in ended.out


# -- charts, each in a process of its own: matplotlib keeps its fonts open


@pytest.mark.parametrize(("suffix", "where"), [("PNG", None), ("svg", "/dev/shm")])
def test_charts(folder, suffix, where):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    plot = folder / f"chart.{suffix}"
    plot.write_bytes(b"an older one")
    ended = finish(start("bench", *SMALL, "--dir", where or folder, "--plot", plot))
    assert (ended.status, ended.err) == (0, "")
    assert os.listdir(folder) == [plot.name]
    if suffix == "PNG":
        assert plot.read_bytes().startswith(b"\x89PNG")
    else:
        assert ElementTree.fromstring(plot.read_bytes()).tag.endswith("svg")


def test_without_matplotlib(target, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    ended = dmabuf(capsys, "bench", "--plot", tmp_path / "x.png", target)
    assert (ended.status, ended.out) == (1, "")
    assert "error: a chart needs matplotlib: " in ended.err
    assert ended.err.endswith("; pip install 'dmabuf[plot]'\n")
    assert os.listdir(tmp_path) == ["target"]


@pytest.mark.parametrize(
    ("plot", "status", "message"),
    [
        ("chart.pdf", 2, "the name ends in .png or .svg"),
        ("chart", 2, "the name ends in .png or .svg"),
        ("none/chart.png", 1, "none/chart.png: its directory: No such file"),
        ("target/chart.png", 1, "Not a directory"),
        ("target.svg", 1, "is TARGET: a chart would replace it"),
        ("folder.svg", 1, "is not a regular file, and a chart would replace it"),
    ],
)
def test_where_no_chart_can_be(tmp_path, capsys, plot, status, message):
    """Known before anything is measured."""
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    (tmp_path / "target").write_bytes(b"here")
    (tmp_path / "target.svg").symlink_to("target")
    (tmp_path / "folder.svg").mkdir()
    ended = dmabuf(capsys, "bench", "--plot", tmp_path / plot, tmp_path / "target")
    assert (ended.status, ended.out) == (status, "")
    assert message in ended.err
    assert sorted(os.listdir(tmp_path)) == ["folder.svg", "target", "target.svg"]
    assert (tmp_path / "target").read_bytes() == b"here"


def test_a_failure_leaves_the_old_chart(target, folder, capsys, monkeypatch):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")

    def fail(*_):
        raise OSError(errno.EIO, "a failing disk")

    monkeypatch.setattr(os, "preadv", fail)
    plot = folder / "chart.svg"
    plot.write_text("old")
    ended = dmabuf(capsys, "bench", *SMALL, "--plot", plot, target)
    assert (ended.status, ended.out, ended.err) == (1, "", f"error: {target}: a failing disk\n")
    assert os.listdir(folder) == ["chart.svg"] and plot.read_text() == "old"


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_no_room_for_the_chart(target, folder, suffix):
    """A disk that has filled up; the figures are printed all the same."""
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    plot = folder / f"chart.{suffix}"
    plot.write_text("old")
    little = ("--rounds", 1, "--size", "8KiB", "--block", "4KiB", "--depth", 1)
    ended = finish(start("bench", *little, "--plot", plot, target, preexec_fn=room_for(8192)))
    assert ended.status == 1 and "read 4 KiB: direct x1 is " in ended.out.splitlines()[-1]
    # matplotlib may have reported before that it has no room for its list of fonts either
    assert ended.err.endswith(f"error: {plot}: drawing the chart: File too large\n")
    assert os.listdir(folder) == [plot.name] and plot.read_text() == "old"


# -- what is refused, before anything is touched


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--region", "0+1MiB"], 2, "--region needs --destroy"),
        (["--destroy"], 2, "--destroy needs --region OFFSET+SIZE"),
        (["--destroy", "--region", "4096"], 2, "OFFSET+SIZE, such as 1GiB+64MiB"),
        (["--destroy", "--region", "0+256KiB", "--size", "1MiB"], 2, "the region has one already"),
        (["--destroy", "--region", f"4096+{SIZE}"], 1, f"the region ends at {SIZE + 4096}, and"),
        (["--destroy", "--region", "512+256KiB"], 1, "the region begins at 512, which is not a"),
        (["--destroy", "--region", "0+512KiB"], 1, "one block of 1 MiB; give --block 4KiB"),
        ([], 1, f"the target has {SIZE} bytes, less than one block of 1 MiB; give --block 4KiB"),
        (["--block", "1000"], 2, "invalid block size 1000: a multiple of 4096, up to 1 GiB"),
        (["--block", "4KiB,6KiB"], 2, "invalid block size 6144"),
        (["--block", "2GiB"], 2, "up to 1 GiB"),
        (["--block", "4KiB,"], 2, "--block"),
        (["--block", "x"], 2, "--block"),
        (["--size", "0"], 2, "less than one block of 1048576 bytes"),
        (["--size", "512KiB"], 2, "less than one block of 1048576 bytes"),
        (["--depth", "0"], 2, "--depth: invalid number '0': use one from 1 to 4096"),
        (["--depth", "4097"], 2, "from 1 to 4096"),
        (["--depth", "1,x"], 2, "--depth: invalid number 'x'"),
        (["--rounds", "0"], 2, "--rounds"),
        (["--seconds", "0"], 2, "--seconds"),
        (["--seconds", "nan"], 2, "--seconds"),
        (["--seed", "-1"], 2, "--seed"),
        (["--dir", "."], 2, "--dir is for a scratch file, and TARGET is given"),
        (["--block", "4KiB", "--exporter", "nonesuch"], 1, "invalid exporter 'nonesuch'"),
        (["--block", "4KiB", "--huge-pages", "3MiB"], 1, "this kernel has no huge pages of 3 MiB"),
    ],
)
def test_refusals(target, capsys, arguments, status, message):
    before = target.read_bytes(), target.stat().st_mtime_ns
    ended = dmabuf(capsys, "bench", *arguments, target)
    assert (ended.status, ended.out) == (status, "")
    assert message in ended.err
    assert (target.read_bytes(), target.stat().st_mtime_ns) == before


def test_targets_that_cannot_be_measured(tmp_path, capsys):
    (tmp_path / "empty").touch()
    (tmp_path / "tiny").write_bytes(b"tiny")
    os.mkfifo(tmp_path / "fifo")
    for target, message in (
        (tmp_path / "empty", "is empty: there is nothing to read"),
        (tmp_path / "tiny", "less than one block of 1 MiB; too small to be measured"),
        (tmp_path / "none", "No such file or directory"),
        (tmp_path / "fifo", "a pipe has no page cache, which the ways of today need"),
        (tmp_path, "a directory has no bytes to move"),
        ("/dev/zero", "a character device has no page cache"),
        ("", "No such file or directory"),
    ):
        ended = dmabuf(capsys, "bench", target)
        assert (ended.status, ended.out) == (1, "")
        assert message in ended.err


def test_scratch_files_that_cannot_be(folder, capsys):
    for arguments, status, message in (
        (["--dir", folder / "none"], 1, "a scratch file cannot be made there: No such file"),
        (["--dir", folder, "--size", "1EiB"], 1, f"error: {folder}: has "),
        (["--dir", folder, *REGION], 2, "--region and --destroy are for a TARGET"),
    ):
        ended = dmabuf(capsys, "bench", *arguments)
        assert (ended.status, ended.out) == (status, "")
        assert message in ended.err
    assert os.listdir(folder) == []


@needs("ext4")
def test_a_mounted_device_is_not_written(tmp_path, capsys):
    with (
        loop_device(tmp_path / "image", 16 << 20) as device,
        mounted(device, "ext4", tmp_path / "mount"),
    ):
        os.sync()
        image = (tmp_path / "image").read_bytes()
        ended = dmabuf(capsys, "bench", *TINY, *REGION, device)
        assert ended.status == 1 and "the block device is mounted" in ended.err
        assert (tmp_path / "image").read_bytes() == image


# -- its end


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_in_the_middle(folder, number):
    arguments = ("--progress", "--seconds", 300, "--rounds", 1000, "--size", "8MiB")
    process = start("bench", *arguments, "--dir", folder, "--plot", folder / "x.svg")
    while b" of 1000: " not in (line := process.stderr.readline()):
        assert line, "it ended by itself"
    process.send_signal(number)
    ended = finish(process)
    assert (ended.status, ended.out) == (128 + number, "")
    assert ended.err.endswith(f"error: stopped by {number.name}\n") and "Traceback" not in ended.err
    assert os.listdir(folder) == []
