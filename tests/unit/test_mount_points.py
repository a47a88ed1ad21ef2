"""Where a mount is, by any name that a directory may have."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dmabuf.mount.session import _mounted
from tests.guards import demand, needs
from tests.mounting import mount, start
from tests.serving import as_a_program

NAMES = (
    "plain",
    "→",
    "ä b\tc",
    "back\\slash\\040",
    "new\nline\r",
    "no\u00a0break\u0085",
    b"\xff\xe4",
)


@pytest.fixture(scope="module")
def socket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("points") / "store.sock"
    with as_a_program(path):
        yield path


@needs("root")
@pytest.mark.parametrize("name", NAMES)
def test_a_directory_of_any_name_is_found_among_the_mounts(
    tmp_path: Path, name: str | bytes
) -> None:
    folder = tmp_path / os.fsdecode(name)
    folder.mkdir()
    assert _mounted(str(folder)) is None
    subprocess.run(["mount", "-t", "tmpfs", "none", folder], check=True)
    try:
        assert _mounted(str(folder)) == "tmpfs"
        assert _mounted(str(tmp_path)) is None
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("name", ["→ \\", "link"])
def test_a_mount_is_seen_by_any_name_of_its_directory(
    tmp_path: Path, socket: Path, name: str
) -> None:
    demand("fuse", "pyfuse3")
    folder = tmp_path / "→ \\"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    dead = start(folder, socket)
    assert dead.stdout.readline().startswith("mounted")
    dead.kill()
    dead.communicate()
    with mount(tmp_path / name, socket):
        assert os.path.ismount(folder)
        (folder / "x").write_bytes(b"works")
        assert (tmp_path / name / "x").read_bytes() == b"works"
        second = start(tmp_path / name, socket)
        out, err = second.communicate(timeout=30)
        assert (second.returncode, out) == (1, "")
        assert "a store is mounted there already" in err
        (folder / "x").unlink()
    assert not os.path.ismount(folder)
