"""`dmabuf bench`: what it says, what it draws, what it refuses, and what it never touches."""

import errno
import json
import os
import signal
import sys
import time
from xml.etree import ElementTree

import pytest

from dmabuf import _uapi, exporters
from dmabuf.bench import run
from dmabuf.bench.ways import Copying, Timed
from dmabuf.cli import bench as command
from dmabuf.target import Target
from tests.guards import needs
from tests.support import assert_same, loop_device, mounted, pattern
from tests.unit import lying
from tests.unit.command import dmabuf, finish, room_for, start
from tests.unit.fake_kernel import FakeKernel

SIZE = 1_000_003
TINY = ("--rounds", 2, "--seconds", 60, "--seed", 5, "--block", "4KiB,64KiB", "--depth", "1,8")
SMALL = (*TINY, "--size", "256KiB")
REGION = ("--region", "128KiB+256KiB", "--destroy")
START, END = 128 << 10, 384 << 10


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


def told_of(capsys, *arguments):
    ended = dmabuf(capsys, "bench", "--json", *arguments)
    assert (ended.status, ended.err) == (0, "")
    return json.loads(ended.out)


def test_a_target_that_is_only_read(target, capsys):
    os.chmod(target, 0o444)
    before = target.read_bytes(), target.stat().st_mtime_ns, target.stat().st_ctime_ns
    ended = dmabuf(capsys, "bench", *SMALL, target)
    assert (ended.status, ended.err) == (0, "")
    assert (target.read_bytes(), target.stat().st_mtime_ns, target.stat().st_ctime_ns) == before
    lines = ended.out.splitlines()
    for line, word in zip(
        lines, ("machine", "kernel", "versions", "target", "measured"), strict=False
    ):
        assert line.startswith(word)
    assert f"target   {target} (file, on " in ended.out
    assert "256 KiB of it, every byte compared once per way" in ended.out
    assert "2 interleaved rounds, blocks one by one, seed 5" in ended.out
    assert "read, blocks of 4 KiB, 256 KiB a run" in ended.out
    assert "read, blocks of 64 KiB, latency" in ended.out
    assert "no native: the buffer is a memfd, which is no dma-buf" in ended.out
    assert "write" not in ended.out
    assert lines[-1].startswith("direct has the bytes in the buffer ")
    assert " than by a cold buffered read and copy (" in lines[-1]
    assert " than by O_DIRECT into a bounce and copy; " in lines[-1]
    assert lines[-1].endswith(" than by mmap and copy): 64 KiB blocks, 8 in flight")


def test_a_scratch_file_leaves_nothing(folder, capsys):
    told = told_of(capsys, *SMALL, "--dir", folder)
    assert os.listdir(folder) == []
    assert told["target"]["name"] == f"a scratch file in {folder}"
    assert told["target"]["size"] == 256 << 10
    groups = {(group["direction"], group["block"]): group for group in told["groups"]}
    assert set(groups) == {(d, b) for d in ("read", "write") for b in (4096, 65536)}
    assert len(told["headlines"]) == 2 and told["headline"] == told["headlines"][0]
    assert told["cold"] and told["page_cache_visible"] and told["rounds"] == 2
    assert told["seed"] == 5 and not told["random"]
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
        median, low, high = rows["direct", 8]["sooner"]["copy"]
        one, two = (
            1 - ours / other
            for ours, other in zip(
                rows["direct", 8]["seconds"], rows["copy", 1]["seconds"], strict=True
            )
        )
        assert [low, high] == sorted((one, two)) and low <= median <= high
        assert "copy" not in rows["copy", 1]["sooner"]
        latencies = {(one["way"], one["depth"]): one for one in group["latencies"]}
        assert list(latencies) == list(rows)
        for (_, depth), latency in latencies.items():
            most = 2 * (256 << 10) // block
            assert 2 <= latency["count"] <= most and (latency["count"] == most or depth == 1)
            assert latency["p100"] > 0 and latency["p99.9"] is None
    assert told["machine"]["cpus"] == os.cpu_count() and told["machine"]["kernel"]


def test_a_region_is_overwritten_and_nothing_beside_it(target, capsys):
    before = target.read_bytes()
    told = told_of(capsys, *TINY, *REGION, target)
    after = target.read_bytes()
    assert_same(after[:START], before[:START], "before the region")
    assert_same(after[END:], before[END:], "after the region")
    assert after[START:END] != before[START:END]
    assert (told["target"]["start"], told["target"]["size"]) == (START, END - START)
    assert {group["direction"] for group in told["groups"]} == {"read", "write"}


def test_memory_is_named_for_what_it_is(capsys):
    ended = dmabuf(capsys, "bench", *SMALL, "--dir", "/dev/shm")
    assert (ended.status, ended.err) == (0, "")
    assert "(file, on tmpfs)" in ended.out
    assert "no run was cold: tmpfs keeps its files in the page cache" in ended.out
    assert (
        "no direct: tmpfs keeps its files in the page cache: O_DIRECT is accepted and" in ended.out
    )
    assert "no bounce: tmpfs keeps" in ended.out
    assert "than by a buffered read and copy" in ended.out and "than by a cold" not in ended.out


def test_random_order_and_what_is_rounded(target, capsys):
    told = told_of(capsys, *TINY, "--random", "--block", "96KiB", target)
    assert told["random"]
    assert told["target"]["size"] == SIZE // (96 << 10) * (96 << 10)


# -- the native route, emulated


@pytest.fixture
def native(monkeypatch):
    class Engine(lying.Lying, Timed):
        def __init__(self, **how):
            super().__init__(backend="threads", **how)

    monkeypatch.setattr(_uapi, "ioctl", FakeKernel().ioctl)
    monkeypatch.setattr(exporters, "allocate", lambda size, **_: lying.dma_buf(size))
    monkeypatch.setattr(run, "Timed", Engine)
    return Engine


def test_the_native_route(target, native, capsys):
    told = told_of(capsys, *TINY, *REGION, target)
    assert told["buffer"]["exporter"] == "fake"
    for group in told["groups"]:
        assert [row["way"] for row in group["ways"]][:2] == ["native", "native"]
        assert group["refused"] == {}
    assert told["headline"].startswith("native has the bytes in the buffer")


@pytest.mark.parametrize("fault", [lying.nothing, lying.last_byte, lying.shifted])
@pytest.mark.parametrize("direction", ["read", "write"])
def test_a_route_that_lies_cannot_win(target, native, capsys, monkeypatch, fault, direction):
    original = native.run

    def running(self, job):
        self.fault = fault if job.write == (direction == "write") else None
        return original(self, job)

    monkeypatch.setattr(native, "run", running)
    # The liar itself goes through the page cache, which would rule the route out.
    monkeypatch.setattr(Target, "cache_to_watch", lambda *_: False)
    ended = dmabuf(capsys, "bench", *TINY, *REGION, target)
    assert (ended.status, ended.out) == (1, "")
    assert f"error: {target}: native x1 moved the wrong bytes, the first at offset" in ended.err


# -- charts


# Each in a process of its own: matplotlib keeps its fonts open.


@pytest.mark.parametrize("suffix", ["PNG", "html"])
def test_charts(folder, suffix):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    plot = folder / f"chart.{suffix}"
    plot.write_bytes(b"an older one")
    ended = finish(start("bench", *SMALL, "--dir", folder, "--plot", plot))
    assert (ended.status, ended.err) == (0, "")
    assert os.listdir(folder) == [plot.name]
    if suffix == "PNG":
        assert plot.read_bytes().startswith(b"\x89PNG")
        return
    text = plot.read_text()
    assert text.startswith("<!DOCTYPE html>") and text.count("<svg") == 1
    assert text.count("<table>") == 8 and "<caption>write, blocks of 64 KiB, latency" in text
    assert "no native: the buffer is a memfd" in text and "src=" not in text
    assert ended.out.splitlines()[-1] in text


def test_charts_of_little(tmp_path):
    """On tmpfs, and one round: fewer ways, and no percentiles."""
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    plot = tmp_path / "chart.svg"
    one = ("--rounds", 1, "--size", "64KiB", "--block", "64KiB", "--depth", 2)
    ended = finish(start("bench", *one, "--dir", "/dev/shm", "--plot", plot))
    assert (ended.status, ended.err) == (0, "")
    assert ElementTree.fromstring(plot.read_bytes()).tag.endswith("svg")


def test_without_matplotlib(target, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(command, "_measure", never)
    ended = dmabuf(capsys, "bench", "--plot", tmp_path / "x.png", target)
    assert (ended.status, ended.out) == (1, "")
    assert "error: charts are drawn by matplotlib (" in ended.err
    assert ended.err.endswith("): pip install 'matplotlib>=3.8'\n")
    assert os.listdir(tmp_path) == ["target"]


def never(*_):
    raise AssertionError("nothing is measured")


@pytest.mark.parametrize(
    ("plot", "status", "message"),
    [
        ("chart.pdf", 2, "the name ends in .png, .svg, .html"),
        ("chart", 2, "the name ends in .png, .svg, .html"),
        ("none/chart.png", 1, "none/chart.png: its directory: No such file"),
        ("target/chart.png", 1, "Not a directory"),
        ("target.svg", 1, "is TARGET: a chart would take its place"),
        ("folder.svg", 1, "is no regular file, and a chart would take its place"),
    ],
)
def test_where_no_chart_can_be(tmp_path, capsys, monkeypatch, plot, status, message):
    monkeypatch.setattr(command, "_measure", never)
    (tmp_path / "target").write_bytes(b"here")
    (tmp_path / "target.svg").symlink_to("target")
    (tmp_path / "folder.svg").mkdir()
    ended = dmabuf(capsys, "bench", "--plot", tmp_path / plot, tmp_path / "target")
    assert (ended.status, ended.out) == (status, "")
    assert message in ended.err
    assert sorted(os.listdir(tmp_path)) == ["folder.svg", "target", "target.svg"]
    assert (tmp_path / "target").read_bytes() == b"here"


def test_a_failure_leaves_the_old_chart(target, folder, capsys, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "a failing disk")

    monkeypatch.setattr(Copying, "_get", fail)
    plot = folder / "chart.svg"
    plot.write_text("old")
    ended = dmabuf(capsys, "bench", *SMALL, "--plot", plot, target)
    assert (ended.status, ended.out, ended.err) == (1, "", f"error: {target}: a failing disk\n")
    assert os.listdir(folder) == ["chart.svg"] and plot.read_text() == "old"


@pytest.mark.parametrize("suffix", ["png", "svg", "html"])
def test_no_room_for_the_chart(target, folder, suffix):
    """A disk that is full by then; the figures are told all the same."""
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    plot = folder / f"chart.{suffix}"
    plot.write_text("old")
    little = ("--rounds", 1, "--size", "8KiB", "--block", "4KiB", "--depth", 1)
    ended = finish(start("bench", *little, "--plot", plot, target, preexec_fn=room_for(8192)))
    assert ended.status == 1 and " has the bytes in the buffer " in ended.out.splitlines()[-1]
    # matplotlib may have said before that it has no room for its list of fonts either
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
        (["--destroy", "--region", "512+256KiB"], 1, "the region begins at 512, which is no"),
        (
            ["--destroy", "--region", "0+512KiB"],
            1,
            "less than one block of 1 MiB: give --block 4KiB",
        ),
        ([], 1, f"it has {SIZE} B, less than one block of 1 MiB: give --block 4KiB"),
        (["--block", "1000"], 2, "--block 1000: from 4 KiB to 1 GiB"),
        (["--block", "4KiB,6KiB"], 2, "6144 bytes are no multiple of 4096"),
        (["--block", "2GiB"], 2, "from 4 KiB to 1 GiB"),
        (["--block", "4KiB,"], 2, "--block '' is no size"),
        (["--block", "x"], 2, "--block 'x' is no size"),
        (["--size", "0"], 2, "--size 0: from 4 KiB"),
        (["--size", "512KiB"], 2, "less than one block of 1048576 bytes"),
        (["--depth", "0"], 2, "--depth 0: from 1 to 4096"),
        (["--depth", "4097"], 2, "--depth 4097: from 1 to 4096"),
        (["--depth", "1,x"], 2, "--depth 1,x: from 1 to 4096"),
        (["--depth", "-1"], 2, "--depth -1: from 1 to 4096"),
        (["--rounds", "0"], 2, "--rounds"),
        (["--seconds", "0"], 2, "--seconds"),
        (["--seconds", "nan"], 2, "--seconds"),
        (["--seed", "-1"], 2, "--seed"),
        (["--dir", "."], 2, "--dir is where a scratch file is made, and TARGET is given"),
        (["--block", "4KiB", "--exporter", "nonesuch"], 1, "unknown exporter 'nonesuch'"),
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
        (tmp_path / "tiny", "it has 4 B, less than one block of 1 MiB: too small to be measured"),
        (tmp_path / "none", "No such file or directory"),
        (tmp_path / "fifo", "a pipe has no page cache, by which people"),
        (tmp_path, "a directory has no bytes to move"),
        ("/dev/zero", "a character device has no page cache, by which people"),
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
    begun = time.monotonic()
    ended = finish(process)
    assert time.monotonic() - begun < 10
    assert (ended.status, ended.out) == (128 + number, "")
    assert ended.err.endswith(f"error: stopped by {number.name}\n") and "Traceback" not in ended.err
    assert os.listdir(folder) == []
