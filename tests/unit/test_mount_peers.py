"""A mount beside the store's other clients, which neither knows of."""

import os
import signal
from pathlib import Path

import pytest

from tests.guards import demand
from tests.mounting import mount, mounted


@pytest.fixture(scope="module", autouse=True)
def fuse() -> None:
    demand("fuse", "pyfuse3")


def test_a_name_that_another_client_took_meanwhile_is_that_clients(tmp_path: Path) -> None:
    with mounted(tmp_path) as files:
        file = os.open(files.path / "secret", os.O_CREAT | os.O_RDWR, 0o644)
        with files.store.create("secret", 6, mode=0o600) as theirs:
            theirs.pwrite(b"theirs", 0)
            if os.geteuid() == 0:
                files.store.chown("secret", 1234, 1234)
            before = files.store.stat("secret")
            os.write(file, b"ours")
            with pytest.raises(FileExistsError):
                os.close(file)
            assert files.store.stat("secret") == before
            assert theirs.pread(6, 0) == b"theirs"
        assert os.listdir(files.path) == ["secret"]
        assert (files.path / "secret").read_bytes() == b"theirs"
        assert files.store.usage().charged == 4096
        files.process.send_signal(signal.SIGTERM)
        assert "secret: there is a buffer of that name" in files.process.stderr.read()


def test_one_of_two_mounts_has_a_file_that_both_create(tmp_path: Path) -> None:
    with mounted(tmp_path) as files:
        other = tmp_path / "other"
        other.mkdir()
        with mount(other, tmp_path / "store.sock"):
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
            first, second = (os.open(folder / "lock", flags) for folder in (files.path, other))
            os.write(first, b"first")
            os.write(second, b"second")
            os.close(second)
            with pytest.raises(FileExistsError):
                os.close(first)
            for folder in (files.path, other):
                assert (folder / "lock").read_bytes() == b"second"
