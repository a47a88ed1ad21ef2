"""probe(): what is found by doing, and what becomes of it where things are refused."""

import dataclasses
import errno
import os
import resource
from pathlib import Path

import pytest

from dmabuf import _uapi, exporters, machine
from dmabuf._ffi import lib
from dmabuf.exporters import heap, udmabuf
from tests.support import in_child


def answers(group: tuple[machine.Answer, ...]) -> dict[str, machine.Answer]:
    return {answer.name: answer for answer in group}


def test_frozen_and_printing_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    found = machine.probe()
    assert capsys.readouterr() == ("", "")
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.release = "x"
    assert found.release == os.uname().release
    for group in (found.kernel, found.io_uring, found.exporters, found.limits):
        assert len(answers(group)) == len(group), "each name once"
        for answer in group:
            assert answer.detail
            assert answer.ok or answer.detail, "a no has a reason"


def test_it_leaves_nothing_behind() -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    machine.probe()
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_it_says_what_allocate_does() -> None:
    found = answers(machine.probe().exporters)
    for name in ("udmabuf", "memfd"):
        try:
            exporters.allocate(4096, exporter=name).close()
        except OSError:
            assert not found[name].ok
        else:
            assert found[name].ok


def test_io_uring_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def __getattr__(self, name: str) -> object:
            return getattr(lib, name)

        def dmb_uring_probe(self) -> int:
            return -errno.EPERM

    monkeypatch.setattr(machine, "lib", Refusing())
    (answer,) = machine.probe().io_uring
    assert not answer.ok
    assert "EPERM" in answer.detail
    assert "threads take its place" in answer.detail
    assert "seccomp" in answer.fix or "sysctl" in answer.fix


def test_udmabuf_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(udmabuf, "DEVICE", str(tmp_path / "udmabuf"))
    answer = answers(machine.probe().exporters)["udmabuf"]
    assert (answer.ok, answer.detail) == (False, f"{tmp_path}/udmabuf: no such device")
    assert "CONFIG_UDMABUF" in answer.fix


def test_udmabuf_limits_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "size_limit_mb").write_text("64\n")
    (tmp_path / "list_limit").write_text("1024\n")
    monkeypatch.setattr(udmabuf, "SIZE_LIMIT", str(tmp_path / "size_limit_mb"))
    assert machine._udmabuf_limits() == "at most 64 MiB a buffer, 1024 items"


def test_heaps_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(heap, "FOLDER", str(tmp_path))
    assert not answers(machine.probe().exporters)["dma-heap"].ok
    (tmp_path / "cma").touch()  # a file, so the allocation is refused: ENOTTY
    found = answers(machine.probe().exporters)
    assert "dma-heap" not in found
    assert not found["dma-heap cma"].ok
    assert _uapi


def test_pinning_is_tried_where_a_capability_promises_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a user namespace CAP_IPC_LOCK is shown, and does not count."""
    limits = {resource.RLIMIT_MEMLOCK: (8 << 20, 8 << 20), resource.RLIMIT_NOFILE: (100, 200)}
    monkeypatch.setattr(resource, "getrlimit", limits.__getitem__)
    monkeypatch.setattr(machine, "_effective_capability", lambda _n: True)
    monkeypatch.setattr(machine, "_pin", lambda size: 0 if size > 8 << 20 else 1)
    found = answers(machine.probe().limits)
    assert found["pinned memory"].ok
    assert not found["descriptors"].ok
    assert found["descriptors"].fix == "ulimit -n 200"
    monkeypatch.setattr(machine, "_pin", lambda _size: -errno.ENOMEM)
    found = answers(machine.probe().limits)
    assert not found["pinned memory"].ok
    assert "does not count in this user namespace" in found["pinned memory"].detail
    monkeypatch.setattr(machine, "_effective_capability", lambda _n: False)
    found = answers(machine.probe().limits)
    assert not found["pinned memory"].ok
    assert "CAP_IPC_LOCK" in found["pinned memory"].fix
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    limits[resource.RLIMIT_MEMLOCK] = unlimited
    assert answers(machine.probe().limits)["pinned memory"].ok


def test_everything_refused() -> None:
    """seccomp refuses io_uring, memfd_create and statx: every line is a no, and none a crash."""
    code = """
import os
def refuse(*a, **k):
    raise PermissionError(1, "Operation not permitted")
os.memfd_create = refuse
from dmabuf import machine
found = machine.probe()
by_name = {answer.name: answer for group in (found.kernel, found.exporters) for answer in group}
print(by_name["memfd"].ok, by_name["cachestat"].ok, by_name["memfd"].detail)
"""
    assert in_child(code) == "False False Operation not permitted\n"
