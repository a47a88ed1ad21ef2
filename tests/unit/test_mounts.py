"""The mounts of /proc/self/mountinfo, whose names anybody may choose who may mount."""

from pathlib import Path

import pytest

from dmabuf.kernel import proc as kernel_proc
from dmabuf.memory import capacity

CGROUP = b"30 23 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 none rw,memory\n"
HOSTILE = "a\rb", "a\x0b\x0c\x1cb", "a\x85b", "a\u2028b", "a\udcffb", "a - b", "a\nb\\c\td"


def mountinfo(point: str) -> bytes:
    """A line as the kernel writes it: proc(5)."""
    name = "/mnt/" + point
    for character in "\\ \t\n":
        name = name.replace(character, f"\\{ord(character):03o}")
    return b"31 23 0:27 /sub %s rw - fuse.x source rw,user_id=0\n" % (
        name.encode(errors="surrogateescape")
    )


@pytest.mark.parametrize("point", HOSTILE)
def test_a_mount_of_any_name(tmp_path: Path, point: str) -> None:
    proc = tmp_path / "proc" / "self"
    proc.mkdir(parents=True)
    (proc / "mountinfo").write_bytes(mountinfo(point) + CGROUP)
    assert list(kernel_proc.mounts(str(tmp_path))) == [
        kernel_proc.Mount("/mnt/" + point, "/sub", "fuse.x", "rw,user_id=0"),
        kernel_proc.Mount("/sys/fs/cgroup", "/", "cgroup2", "rw,memory"),
    ]
    assert capacity.cgroup_mounts(str(tmp_path), 2) == [("/sys/fs/cgroup", "/")]


def test_without_proc(tmp_path: Path) -> None:
    assert capacity.cgroup_mounts(str(tmp_path), 2) == []
