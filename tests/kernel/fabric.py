"""A namespace behind NVMe over TCP as a drive that is reset, disconnected and connected again."""

import os
import re
from pathlib import Path

from tests import nvmet
from tests.kernel.hotplug import Slot

HOST, PORTS = "127.0.0.1", (4420, 4421)
"""Where a target of this machine listens."""


class Fabric(Slot):
    """A namespace of a target, by one connection, which is pulled by a disconnect."""

    def __init__(self, number: int = 1, address: str = HOST, **options: object) -> None:
        self.number, self._address, self._options = number, address, options
        self.plug()
        self.first = self.disk

    def _controller(self) -> Path:
        return self.controller

    def _namespace(self, pattern: str) -> str:
        """With native multipath, nvme2c3n1 is a path to nvme2n1, and ng2n1 the same namespace."""
        for name in os.listdir(self.controller):
            found = re.fullmatch(r"nvme(\d+)(?:c\d+)?(n\d+)", name)
            nsid = self.controller / name / "nsid"  # in the order of their discovery
            if found and int(nsid.read_text()) == self.number:
                return f"/dev/{pattern.partition('*')[0]}{found[1]}{found[2]}"
        raise FileNotFoundError("the controller shows no namespace yet")

    def pull(self) -> None:
        nvmet.disconnect(self.controller)

    def plug(self) -> None:
        self.controller = nvmet.connect(self._address, PORTS[0], **self._options)
        self.wait()
