"""The marker `device_table`: tests that prove cells of docs/reference/devices.md.

    @pytest.mark.device_table("V4L2 codec", "import", "zero-copy")

names a subsystem, or a list of several, and the aspects of it that the test proves where it runs:
see ASPECTS. A test of a fake has ``by="a fake driver"``, which takes the place of the kernel and
the processor. A module marks all its tests by ``pytestmark``. The arguments are literals, because
tools/write_device_table.py reads them in the source. A test whose cases did not all pass proves
nothing. One that was skipped keeps what an earlier run of it proved.

A run writes the results as JSON: to the file that DMABUF_DEVICE_TABLE names, and in the lab to
$LAB_OUT/devices-PID.json. tools/write_device_table.py merges such files into the page.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

ASPECTS = {
    "import": "the device uses memory of a Buffer that something else made",
    "export": "the device's memory is a Buffer, which others use",
    "fence": "transfers or the CPU wait for the device, or the device waits for others",
    "read": "a file or drive was read into the memory; every byte was compared",
    "write": "the memory was written to a file or drive; every byte was compared",
    "zero-copy": "bytes went to or from storage, or to another device, without a copy by the CPU",
}
"""What a test may prove of a subsystem, in the order of the table's columns."""
_PROCESSORS = {"x86_64": "x86-64", "aarch64": "arm64"}


def place() -> str:
    """Return the kernel and the processor that this runs on, as the table names them."""
    machine = os.uname()
    release = re.match(r"[\d.]*\d", machine.release)
    assert release is not None
    page = os.sysconf("SC_PAGESIZE")
    parts = [f"Linux {release[0]}", _PROCESSORS.get(machine.machine, machine.machine)]
    return ", ".join(parts if page == 4096 else [*parts, f"pages of {page >> 10} KiB"])


def target() -> Path | None:
    """Return the file for the results of this run, None where nobody asked for them."""
    named, lab = os.environ.get("DMABUF_DEVICE_TABLE"), os.environ.get("LAB_OUT")
    if named:
        return Path(named)
    return Path(lab, f"devices-{os.getpid()}.json") if lab else None


class Recorder:
    """A plug-in of pytest: collects the results of marked tests, and writes them at the end."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._results: dict[tuple[str, str, str], tuple[list[str], bool]] = {}
        self._ran: set[tuple[str, str, str]] = set()

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        """Check the markers, and attach them to the test's reports: a worker sends those on."""
        for mark in item.iter_markers("device_table"):
            subsystems, *aspects = mark.args
            if not aspects or not ASPECTS.keys() >= set(aspects):
                names = ", ".join(ASPECTS)
                raise pytest.UsageError(f"{item.nodeid}: device_table takes aspects of: {names}")
            for subsystem in [subsystems] if isinstance(subsystems, str) else subsystems:
                cells = (subsystem, mark.kwargs.get("by") or place(), aspects)
                item.user_properties.append(("device_table", cells))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take one step of a test into account."""
        cells: Any
        for name, cells in report.user_properties:
            if name == "device_table":
                subsystem, on, aspects = cells
                key = report.nodeid.partition("[")[0], subsystem, on
                expected = hasattr(report, "wasxfail")
                passed = report.passed and not expected
                before = self._results.get(key, ([], True))
                self._results[key] = (sorted({*before[0], *aspects}), before[1] and passed)
                # What a kernel lacks shows nothing about a fake, which another kernel may prove.
                if report.failed or (report.when == "call" and (on == place() or not expected)):
                    self._ran.add(key)

    def pytest_sessionfinish(self) -> None:
        """Write the results, if any were asked for."""
        keys = ("test", "subsystem", "on", "aspects", "passed")
        rows = [
            dict(zip(keys, (*key, *found), strict=True))
            for key, found in self._results.items()
            if key in self._ran
        ]
        if self._path is not None and rows:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps(rows, indent=1) + "\n")


def plug_in(config: pytest.Config) -> None:
    """Register the marker, and the recorder; a worker of pytest-xdist writes nothing."""
    text = "device_table(subsystem, *aspects, by=None): proves cells of docs/reference/devices.md"
    config.addinivalue_line("markers", text)
    config.pluginmanager.register(Recorder(None if hasattr(config, "workerinput") else target()))
