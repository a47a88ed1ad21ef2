"""NVMe over TCP: a target of this machine by the kernel's configfs, and connections to targets.

``python3 -m tests.nvmet ADDRESS PORT DEVICE...`` serves devices until its standard input ends.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

CONFIG = Path("/sys/kernel/config/nvmet")
NQN = "nqn.2026-11.lab:dmabuf"
_HOST = "7a7f4f43-4c43-4b43-8c43-4c43f44c4301"
_PATIENCE = 100
"""Seconds without an answer until the kernel gives a connection up. The lab is often slow."""


class Target:
    """A subsystem with a namespace for each device, and a port for each number."""

    def __init__(self, address: str, ports: Sequence[int], devices: Sequence[str]) -> None:
        subprocess.run(["modprobe", "-a", "nvmet-tcp"], check=True)
        self._subsystem = CONFIG / "subsystems" / NQN
        self._subsystem.mkdir()
        (self._subsystem / "attr_allow_any_host").write_text("1")
        (self._subsystem / "attr_serial").write_text("fabrics")
        for number, device in enumerate(devices, 1):
            folder = self._subsystem / "namespaces" / str(number)
            folder.mkdir()
            (folder / "device_path").write_text(device)
            uuid = f"5f0a1f5e-4c43-4b43-8c43-{number:012}"  # the same after a boot of the target
            (folder / "device_uuid").write_text(uuid)
            (folder / "device_nguid").write_text(uuid)
            self.show(number)
        self._ports = [CONFIG / "ports" / str(port) for port in ports]
        for folder, port in zip(self._ports, ports, strict=True):
            folder.mkdir()
            values = {"trtype": "tcp", "adrfam": "ipv4", "traddr": address, "trsvcid": port}
            for name, value in values.items():
                (folder / f"addr_{name}").write_text(str(value))
            self.offer(port)

    def offer(self, port: int) -> None:
        """Listen on a port."""
        with contextlib.suppress(FileExistsError):
            (CONFIG / "ports" / str(port) / "subsystems" / NQN).symlink_to(self._subsystem)

    def withdraw(self, port: int) -> None:
        """Stop listening on a port, and end its connections."""
        (CONFIG / "ports" / str(port) / "subsystems" / NQN).unlink(missing_ok=True)

    def show(self, namespace: int = 1) -> None:
        """Make a namespace available; hosts are told."""
        (self._subsystem / "namespaces" / str(namespace) / "enable").write_text("1")

    def hide(self, namespace: int = 1) -> None:
        """Take a namespace away; hosts are told."""
        (self._subsystem / "namespaces" / str(namespace) / "enable").write_text("0")

    def close(self) -> None:
        """Remove all of it."""
        for port in self._ports:
            self.withdraw(int(port.name))
            port.rmdir()
        for folder in (self._subsystem / "namespaces").iterdir():
            self.hide(int(folder.name))
            folder.rmdir()
        self._subsystem.rmdir()


@contextlib.contextmanager
def target(address: str, ports: Sequence[int], devices: Sequence[str]) -> Iterator[Target]:
    """A target for the time of a block."""
    made = Target(address, ports, devices)
    try:
        yield made
    finally:
        made.close()


def connect(address: str, port: int, **options: object) -> Path:
    """Connect to a target, as ``nvme connect`` does, and return the controller in sysfs."""
    subprocess.run(["modprobe", "nvme-tcp"], check=True)
    wanted = {
        "transport": "tcp",
        "traddr": address,
        "trsvcid": port,
        "nqn": NQN,
        "hostnqn": f"nqn.2014-08.org.nvmexpress:uuid:{_HOST}",
        "hostid": _HOST,
        "reconnect_delay": 1,
        "ctrl_loss_tmo": _PATIENCE,
        "keep_alive_tmo": _PATIENCE,
    } | options
    fd = os.open("/dev/nvme-fabrics", os.O_RDWR | os.O_CLOEXEC)
    try:
        os.write(fd, ",".join(f"{name}={value}" for name, value in wanted.items()).encode())
        answer = os.read(fd, 256).decode()  # "instance=2,cntlid=1"
    finally:
        os.close(fd)
    number = dict(part.split("=") for part in answer.strip().split(","))["instance"]
    return Path("/sys/class/nvme", f"nvme{number}")


def disconnect(controller: Path) -> None:
    """Delete a controller, as ``nvme disconnect`` does; returns when its devices are gone."""
    with contextlib.suppress(FileNotFoundError):  # it was given up meanwhile
        (controller / "delete_controller").write_text("1")


def main(address: str, port: str, *devices: str) -> None:
    """Serve devices until the standard input ends."""
    with target(address, [int(port)], devices):
        print("serving", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
