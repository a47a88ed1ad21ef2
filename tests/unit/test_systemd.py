"""The units of contrib/systemd under a real systemd: a manager of this user, made for a test."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

import dmabuf.store
from tests.restarting import at_work, busy
from tests.support import PATIENCE, assert_same, has_program, pattern, wait_until

UNITS = Path(__file__).parents[2] / "contrib/systemd/user"
SYSTEMD = "/lib/systemd/systemd"
# The manager starts only where systemd runs the machine, which /run/systemd/system shows.
_START = f"""
mount -t tmpfs tmpfs /run && mkdir -p /run/systemd/system "$0" &&
echo $$ >"$0/cgroup.procs" && exec {SYSTEMD} --user --log-target=console
"""
# The manager's PATH may lack this dmabuf, and killing often is what a test does.
_DROP_IN = """
[Unit]
StartLimitIntervalSec=0
[Service]
Environment=PATH={path}
"""


def own_cgroup() -> Path | None:
    """The folder of this process in the hierarchy that systemd uses; None if it is read-only."""
    for line in Path("/proc/self/cgroup").read_text().splitlines()[::-1]:
        _, name, path = line.split(":", 2)
        mount = {"name=systemd": "/sys/fs/cgroup/systemd", "": "/sys/fs/cgroup"}.get(name)
        if mount and Path(mount, "cgroup.procs").exists():
            folder = Path(mount, path.lstrip("/"))
            return folder if os.access(folder, os.W_OK) else None
    return None


class Manager:
    """systemd --user with the units of contrib/systemd."""

    def __init__(self, folder: Path, cgroup: Path) -> None:
        self.socket = folder / "run/dmabuf.sock"
        self._cgroup = cgroup / f"dmabuf-test-{os.getpid()}"
        self._environment = os.environ | {
            "HOME": str(folder), "XDG_CONFIG_HOME": str(folder / "config"),
            "XDG_RUNTIME_DIR": str(folder / "run"),
        }  # fmt: skip
        units = folder / "config/systemd/user"
        (units / "dmabuf.service.d").mkdir(parents=True)
        (folder / "run").mkdir(mode=0o700)
        for unit in UNITS.iterdir():
            (units / unit.name).write_bytes(unit.read_bytes())
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        (units / "dmabuf.service.d/test.conf").write_text(_DROP_IN.format(path=path))
        self._process = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", _START, self._cgroup],
            env=self._environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            wait_until((folder / "run/systemd/private").exists, "the manager listens")
            self.systemctl("start", "dmabuf.socket")
        except BaseException:
            self.close()
            raise

    def systemctl(self, *command: str) -> str:
        """Run systemctl --user and return its output."""
        done = subprocess.run(
            ["systemctl", "--user", *command],
            env=self._environment, capture_output=True, text=True, timeout=PATIENCE,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def show(self, name: str) -> int:
        """A number among the properties of dmabuf.service."""
        return int(self.systemctl("show", "--value", "--property", name, "dmabuf.service"))

    def restart(self) -> None:
        """Let systemd restart the server."""
        before = self.show("MainPID")
        self.systemctl("restart", "dmabuf.service")
        assert self.show("MainPID") not in (0, before)

    def kill(self) -> None:
        """Kill the server, which systemd starts again."""
        before = self.show("MainPID")
        self.systemctl("kill", "--signal", "KILL", "dmabuf.service")
        wait_until(lambda: self.show("MainPID") not in (0, before), "another server")

    def close(self) -> None:
        """End the manager and what it runs."""
        self._process.terminate()
        _, said = self._process.communicate(timeout=PATIENCE)
        with suppress(OSError):
            self._cgroup.rmdir()
        print(said.decode(errors="replace"))


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    cgroup = own_cgroup()
    if os.geteuid() or cgroup is None or not has_program(SYSTEMD):
        pytest.skip("needs root, a writable /sys/fs/cgroup, and apt-get install systemd")
    with closing(Manager(tmp_path, cgroup)) as manager:
        yield manager


def test_names_outlive_each_end_of_a_server_under_systemd(manager: Manager) -> None:
    data = pattern(300_000, 1)
    with dmabuf.store.connect(manager.socket) as store:
        with store.create("kept", len(data)) as buffer:
            buffer.pwrite(data, 0)
        before = store.list()
    for end in (manager.restart, manager.kill, manager.restart):
        end()
        assert manager.show("NFileDescriptorStore") > 0
        with dmabuf.store.connect(manager.socket) as store, store.open("kept") as buffer:
            assert_same(buffer.pread(len(data), 0), data, end.__name__)
            assert store.list() == before


def test_clients_lose_nothing_while_systemd_restarts_the_server(manager: Manager) -> None:
    with busy(manager.socket) as clients:
        for end in (manager.restart, manager.kill) * 5:
            at_work(clients)
            end()
        at_work(clients)
