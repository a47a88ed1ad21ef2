"""docs/reference/devices.md: made of results, which runs of marked tests write."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.device_table import ASPECTS, place

ROOT = Path(__file__).parents[2]
HERE = "tests/unit/test_device_table.py::"

_spec = importlib.util.spec_from_file_location("table", ROOT / "tools/write_device_table.py")
table = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(table)

CASES = """
import pytest
proves = pytest.mark.device_table

@proves("a camera", "import", "read")
@proves(["a disk", "a drive"], "zero-copy")
def test_passes(): pass

@proves("a camera", "fence", by="a fake driver")
@pytest.mark.parametrize("size", [1, 2])
def test_passes_twice(size): pass

@proves("a camera", "export")
@pytest.mark.parametrize("size", [1, 2])
def test_fails_once(size): assert size == 1

@proves("a camera", "export")
@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.xfail), 2])
def test_is_expected_to_fail_once(size): assert size == 2

@proves("a camera", "export")
@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.skip), 2])
def test_is_skipped_once(size): pass

@proves("a camera", "export")
@pytest.mark.skip
def test_is_skipped(): pass

@proves("a camera", "export", by="a fake driver")
@pytest.mark.xfail
def test_of_a_fake_for_which_this_kernel_is_too_old(): assert False

@pytest.fixture
def stuck():
    yield
    raise OSError

@proves("a camera", "export")
def test_fails_at_its_end(stuck): pass

def test_without_a_marker(): pass
"""


def run(folder, source, *options):
    """Run tests with the plug-in alone, and return how that ended."""
    (folder / "test_cases.py").write_text(source)
    (folder / "conftest.py").write_text(
        "from tests.device_table import plug_in\ndef pytest_configure(config): plug_in(config)\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", folder]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "DMABUF_DEVICE_TABLE": str(folder / "results" / "run.json"),
    }
    return subprocess.run(
        [*command, *options, folder], env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("options", [(), ("--numprocesses", "1")], ids=["alone", "by a worker"])
def test_a_run_writes_its_results(tmp_path, options):
    """All cases of a test have to pass; a test that never ran has no result."""
    if options:
        pytest.importorskip("xdist", reason="pip install pytest-xdist")
    done = run(tmp_path, CASES, *options)
    assert done.returncode == 1, done.stderr
    found = {
        (one["test"].removeprefix("test_cases.py::"), one["subsystem"]): (
            one["on"], one["aspects"], one["passed"],
        )
        for one in json.loads((tmp_path / "results/run.json").read_text())
    }  # fmt: skip
    assert found == {
        ("test_passes", "a camera"): (place(), ["import", "read"], True),
        ("test_passes", "a disk"): (place(), ["zero-copy"], True),
        ("test_passes", "a drive"): (place(), ["zero-copy"], True),
        ("test_passes_twice", "a camera"): ("a fake driver", ["fence"], True),
        ("test_fails_once", "a camera"): (place(), ["export"], False),
        ("test_is_expected_to_fail_once", "a camera"): (place(), ["export"], False),
        ("test_is_skipped_once", "a camera"): (place(), ["export"], False),
        ("test_fails_at_its_end", "a camera"): (place(), ["export"], False),
    }


@pytest.mark.parametrize("aspects", ['"speed"', ""])
def test_a_marker_with_no_known_aspect(tmp_path, aspects):
    source = f"import pytest\n@pytest.mark.device_table('a', {aspects})\ndef test_it(): pass\n"
    done = run(tmp_path, source)
    assert done.returncode == 4
    assert "device_table takes aspects of: import, export" in done.stderr


def row(on, tests, subsystem="a camera"):
    return {"subsystem": subsystem, "on": on, "tests": tests}


def result(name, passed=True, on="Linux 7.3.4, x86-64", aspects=("read",)):
    test = f"{HERE}test_{name}"
    return {
        "test": test, "subsystem": "a camera", "on": on, "aspects": list(aspects), "passed": passed,
    }  # fmt: skip


@pytest.fixture
def declared(monkeypatch):
    """Tests "one" and "two" that are marked, with all aspects."""
    names = {(f"{HERE}test_{name}", "a camera"): set(ASPECTS) for name in ("one", "two")}
    monkeypatch.setattr(table, "marked", lambda: names)
    return names


def test_results_replace_those_of_the_same_test_and_place(declared):
    here, there = "Linux 7.3.4, x86-64", "Linux 7.3.4, arm64"
    one, two = f"{HERE}test_one", f"{HERE}test_two"
    rows = [row(here, {one: ["read"], two: ["read"]}), row(there, {one: ["read"]})]
    merged = table.merge(rows, [result("one", aspects=["write", "import"]), result("two", False)])
    assert merged == [row(there, {one: ["read"]}), row(here, {one: ["import", "write"]})]
    assert table.merge(rows, []) == rows[::-1]
    del declared[one, "a camera"]
    assert table.merge(rows, []) == [row(here, {two: ["read"]})]


def test_a_new_point_release_takes_the_place_of_the_last(declared):
    one = f"{HERE}test_one"
    old = "Linux 7.3.4, x86-64", "Linux 6.12.107, x86-64", "Linux 7.3.4, arm64", "a fake driver"
    rows = [row(on, {one: ["read"]}) for on in old]
    merged = table.merge(rows, [result("one", on="Linux 7.3.10, x86-64")])
    assert {one["on"] for one in merged} == {"Linux 7.3.10, x86-64", *old[1:]}


def test_the_page_is_made_of_the_results():
    rows = json.loads(table.JSON.read_text())
    assert table.PAGE.read_text() == table.page(rows), "run tools/write_device_table.py"
    assert rows and table.merge(rows, []) == rows, "run tools/write_device_table.py"


def test_each_row_names_tests_that_exist():
    declared = table.marked()
    for one in json.loads(table.JSON.read_text()):
        assert one["tests"]
        for test, aspects in one["tests"].items():
            assert set(aspects) <= declared[test, one["subsystem"]], test
