"""`dmabuf verify`: what it finds, what it says, and what it never touches."""

import json
import os

import pytest

import dmabuf as package
from dmabuf.transfer.compare import CELL, MOST_RUNS, Findings, Mismatch
from tests.guards import needs
from tests.support import assert_same, loop_device, mounted, pattern, whole, zram
from tests.unit import lying
from tests.unit.command import dmabuf

SIZE = 3_000_001
QUICK = ("--rounds", 4, "--seed", 5)
REGION = ("--region", "1000001+1MiB", "--destroy")
START, END = 1000001, 1000001 + (1 << 20)


@pytest.fixture
def target(tmp_path):
    path = tmp_path / "target"
    path.write_bytes(pattern(SIZE, 3))
    return path


class Lying:
    """Files on which a completed transfer by `route` may leave other bytes than it should.

    `fault(right, before)` answers what the range holds in the end: `right` is what it should hold,
    `before` what it held when the transfer began.
    """

    def __init__(self, monkeypatch, target, route="direct"):
        self.fault = {"read": None, "write": None}
        self.beside = False
        self._target, self._route = target, route
        for direction, verb in (("read", "read_into"), ("write", "write_from")):
            real = getattr(package.File, verb)
            monkeypatch.setattr(package.File, verb, self._lying(direction, real))

    def _lying(self, direction, real):
        def move(file, buffer, size, *, file_offset, buffer_offset, route, **how):
            def held():
                if direction == "read":
                    return buffer.pread(size, buffer_offset)
                return lying.os_pread(self._target, size, file_offset)

            before = held()
            record = real(
                file, buffer, size, file_offset=file_offset, buffer_offset=buffer_offset,
                route=route, **how,
            )  # fmt: skip
            fault = self.fault[direction]
            if route != self._route:
                return record
            if fault is not None and size > 1024:
                wrong = fault(held(), before)
                if direction == "read":
                    buffer.pwrite(wrong, buffer_offset)
                else:
                    lying.os_pwrite(self._target, wrong, file_offset)
            end = buffer_offset + size
            if self.beside and direction == "read" and end < buffer.size:
                buffer.pwrite(bytes([buffer.pread(1, end)[0] ^ 1]), end)
            return record

        return move


@pytest.fixture
def liar(monkeypatch, target):
    return Lying(monkeypatch, target)


def rows(told):
    return {(row["direction"], row["route"]): row for row in told["results"]}


def test_a_target_that_is_only_read(target, capsys):
    os.chmod(target, 0o444)
    before = target.read_bytes(), target.stat().st_mtime_ns, target.stat().st_ctime_ns
    ended = dmabuf(capsys, "verify", *QUICK, target)
    assert (ended.status, ended.err) == (0, "")
    assert f"{target}: reads only; exporter" in ended.out and "seed 5" in ended.out
    assert "every byte was the same" in ended.out and "unchanged" in ended.out
    for route in ("direct", "staged", "buffered"):
        assert f"\nread  {route:<8} " in ended.out
    assert "write" not in ended.out
    assert (target.read_bytes(), target.stat().st_mtime_ns, target.stat().st_ctime_ns) == before


def test_a_region_is_overwritten_and_nothing_beside_it(target, capsys):
    before = target.read_bytes()
    ended = dmabuf(capsys, "verify", *QUICK, *REGION, "--json", target)
    assert (ended.status, ended.err) == (0, "")
    after = target.read_bytes()
    assert_same(after[:START], before[:START], "before the region")
    assert_same(after[END:], before[END:], "after the region")
    assert after[START:END] != before[START:END]
    told = json.loads(ended.out)
    assert told["ok"] and told["seed"] == 5 and told["region"] == [START, 1 << 20]
    assert told["failures"] == []
    for (direction, route), row in rows(told).items():
        if route == "native":
            assert row["unavailable"] and not row["transfers"]
            continue
        assert row["transfers"] > 5 and row["failed"] == 0, (direction, route)
        assert row["nbytes"] >= 1 << 20
        assert row["mismatches"] == dict.fromkeys(map(str, Mismatch), 0)


def test_the_seed_repeats_it(target, capsys):
    one, two, other = (
        json.loads(dmabuf(capsys, "verify", "--rounds", 2, "--seed", seed, "--json", target).out)
        for seed in (5, 5, 6)
    )
    assert one == two
    assert one["results"] != other["results"]


def test_queue_depths_and_alignments(target, capsys, monkeypatch):
    depths, cases = set(), []
    make, read = package.Engine.__init__, package.File.read_into

    def making(engine, **how):
        depths.add((how["queue_depth"], how["block_size"]))
        make(engine, **how)

    def reading(file, buffer, size, *, file_offset, buffer_offset, **how):
        cases.append((size, file_offset, buffer_offset))
        return read(file, buffer, size, file_offset=file_offset, buffer_offset=buffer_offset, **how)

    monkeypatch.setattr(package.Engine, "__init__", making)
    monkeypatch.setattr(package.File, "read_into", reading)
    ended = dmabuf(capsys, "verify", "--rounds", 40, "--seed", 1, "--routes", "buffered", target)
    assert ended.status == 0
    assert {depth for depth, _ in depths} == {1, 2, 4, 8, 16, 32, 64}
    assert len(depths) == 7 * 4
    assert len(cases) > 40 * 7
    for size, file_offset, buffer_offset in cases:
        assert 0 <= file_offset <= SIZE - size and buffer_offset >= 0
    for unit in (4096, 512, 4, 1):
        for what in zip(*cases, strict=True):
            assert any(n % unit == 0 and n % (8 * unit) for n in what), unit
    assert any((file - buffer) % 512 for _, file, buffer in cases)
    assert any(file % 4096 == buffer % 4096 == 512 for _, file, buffer in cases)


@pytest.mark.parametrize(
    ("fault", "direction", "kind"),
    [
        (lying.nothing, "read", "unchanged"),
        (lying.nothing, "write", "unchanged"),
        (lying.zeros, "read", "zeros"),
        (lying.zeros, "write", "zeros"),
        (lying.foreign, "read", "foreign"),
        (lying.foreign, "write", "foreign"),
        (lying.shifted, "read", "shifted"),
        (lying.last_byte, "write", "foreign"),
    ],
)
def test_wrong_bytes_of_one_direction(target, liar, capsys, fault, direction, kind):
    liar.fault[direction] = fault
    ended = dmabuf(capsys, "verify", *QUICK, *REGION, "--json", "--routes", "direct,staged", target)
    assert ended.status == 1
    told = json.loads(ended.out)
    assert not told["ok"] and told["seed"] == 5
    found = rows(told)
    assert found[direction, "direct"]["mismatches"][kind] >= 5
    for (which, route), row in found.items():
        assert bool(row["failed"]) == ((which, route) == (direction, "direct"))
    assert kind in told["failures"][0]["counts"]
    few = ("--rounds", 1, "--seed", 5, "--routes", "direct")
    people = dmabuf(capsys, "verify", *few, *REGION, target)
    assert people.status == 1
    assert f"{direction} direct, transfer " in people.out and f"bytes {kind}" in people.out
    assert "--seed 5 --rounds 1 repeats this" in people.out
    assert "every byte was the same" not in people.out


def test_bytes_beside_the_range(target, liar, capsys):
    liar.beside = True
    few = ("--rounds", 2, "--seed", 5, "--routes", "direct")
    ended = dmabuf(capsys, "verify", *few, "--json", target)
    assert ended.status == 1
    assert rows(json.loads(ended.out))["read", "direct"]["mismatches"]["outside"] > 3


def test_a_target_that_another_program_writes_to(target, liar, capsys):
    def written(right, before):
        data = bytearray(target.read_bytes())
        at = data.find(right)
        if len(right) == 4096:
            lying.os_pwrite(target, os.urandom(16), at)
            return b"other" + right[5:]
        return right

    liar.fault["read"] = written
    ended = dmabuf(capsys, "verify", "--rounds", 8, "--seed", 5, target)
    assert ended.status == 0
    assert "without a verdict: another program wrote to the target" in ended.out


def test_stale_and_shifted_bytes_are_told_apart():
    wanted, before = pattern(8192, 1), pattern(8192, 2)
    findings = Findings()
    got = wanted[:1000] + before[1000:2000] + wanted[2000:4096] + wanted[:2048] + wanted[6144:]
    assert not findings.add(100, wanted, got, poison=pattern(8192, 3), before=before)
    assert findings.first == 1100 and findings.kind == "stale"
    assert set(findings.counts) == {"stale", "misdirected"}
    assert 2950 < findings.wrong <= 3048
    assert str(findings).startswith(f"{findings.counts[Mismatch.MISDIRECTED]} bytes misdirected, ")
    stale, moved = findings.runs
    assert str(stale).startswith("1000 bytes stale at 1100")
    assert (moved.position, moved.size, moved.distance) == (4196, 2048, -4096)


def test_many_wrong_places_are_counted_and_some_are_kept():
    wanted, findings = pattern(200 * CELL, 1), Findings()
    got = bytearray(wanted)
    for cell in range(0, 200, 2):
        got[cell * CELL] ^= 0xFF
    assert not findings.add(0, wanted, bytes(got))
    assert (findings.wrong, findings.first, len(findings.runs)) == (100, 0, MOST_RUNS)
    assert [run.position for run in findings.runs] == [2 * CELL * at for at in range(MOST_RUNS)]
    with pytest.raises(ValueError, match="2 and 1 bytes"):
        findings.add(0, b"12", b"1")


def test_the_script_that_repeats_a_failure(target, liar, capsys, monkeypatch):
    liar.fault["read"] = lying.nothing
    ended = dmabuf(capsys, "verify", *QUICK, "--json", target)
    assert ended.status == 1
    told = json.loads(ended.out)
    assert told["failures"][0]["runs"][0].endswith(f"at {told['failures'][0]['offset']}")
    monkeypatch.undo()
    exec(told["reproducer"], {})
    assert capsys.readouterr().out == "1000 transfers without a wrong byte\n"

    class Engine(lying.Lying):
        fault = staticmethod(lying.nothing)
        routes = tuple(package.Route)

    monkeypatch.setattr(package, "Engine", Engine)
    with pytest.raises(SystemExit, match=r"attempt 0: .* are wrong, the first at file offset"):
        exec(told["reproducer"], {})


# -- what is refused, and leaves the target as it is


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--region", "0+4096"], 2, "--region needs --destroy"),
        (["--destroy"], 2, "--destroy needs --region OFFSET+SIZE"),
        (["--destroy", "--region", "4096"], 2, "OFFSET+SIZE, such as 1GiB+64MiB"),
        (["--destroy", "--region", "4096+0"], 2, "OFFSET+SIZE, such as 1GiB+64MiB"),
        (["--destroy", "--region=-1+5"], 2, "OFFSET+SIZE"),
        (["--destroy", "--region", "x+5"], 2, "OFFSET+SIZE"),
        (["--destroy", "--region", f"{SIZE}+1"], 1, f"the region ends at {SIZE + 1}, and the"),
        (["--routes", "direct,scenic"], 2, "invalid routes 'direct,scenic': of native"),
        (["--exporter", "nonesuch"], 1, "invalid exporter 'nonesuch'"),
        (["--routes", "native", "--exporter", "memfd"], 1, "which is not a dma-buf"),
        (["--seed", "-1"], 2, "--seed"),
    ],
)
def test_refusals(target, capsys, arguments, status, message):
    before = target.read_bytes(), target.stat().st_mtime_ns
    ended = dmabuf(capsys, "verify", *arguments, target)
    assert (ended.status, ended.out) == (status, "")
    assert message in ended.err
    assert (target.read_bytes(), target.stat().st_mtime_ns) == before


def test_targets_that_cannot_be_tested(tmp_path, capsys):
    (tmp_path / "empty").touch()
    assert "is empty" in dmabuf(capsys, "verify", tmp_path / "empty").err
    assert dmabuf(capsys, "verify", tmp_path / "none").status == 1
    assert "a character device cannot be read twice" in dmabuf(capsys, "verify", "/dev/zero").err
    assert "directory" in dmabuf(capsys, "verify", tmp_path).err


def test_a_small_target(tmp_path, capsys):
    path = tmp_path / "small"
    for size in (1, 4097):
        path.write_bytes(pattern(size, 3))
        ended = dmabuf(capsys, "verify", "--rounds", 1, "--destroy", "--region", f"0+{size}", path)
        assert (ended.status, path.stat().st_size) == (0, size)


# -- devices


@needs("loop")
def test_a_loop_device(tmp_path, capsys):
    with loop_device(tmp_path / "image", 8 << 20) as device:
        ended = dmabuf(
            capsys, "verify", *QUICK, "--region", "2MiB+1MiB", "--destroy", "--json", device
        )
        assert (ended.status, ended.err) == (0, "")
        assert rows(json.loads(ended.out))["write", "direct"]["transfers"] > 5
        fd = os.open(device, os.O_RDONLY)
        content = whole(fd)
        os.close(fd)
        assert not any(content[: 2 << 20]) and not any(content[3 << 20 :])
        assert any(content[2 << 20 : 3 << 20])


@needs("zram")
def test_a_zram_device(capsys):
    with zram(8 << 20) as device:
        assert (
            dmabuf(capsys, "verify", *QUICK, "--region", "1+3MiB", "--destroy", device).status == 0
        )


@needs("ext4")
def test_a_mounted_device_is_not_written(tmp_path, capsys):
    with (
        loop_device(tmp_path / "image", 16 << 20) as device,
        mounted(device, "ext4", tmp_path / "mount") as folder,
    ):
        (folder / "file").write_bytes(b"here")
        os.sync()
        image = (tmp_path / "image").read_bytes()
        ended = dmabuf(capsys, "verify", "--region", "0+1MiB", "--destroy", device)
        assert ended.status == 1 and "the block device is mounted" in ended.err
        assert (tmp_path / "image").read_bytes() == image
