"""`python -m build` makes a sdist and a wheel that work outside the checkout, with cffi alone."""

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import dmabuf
from lab.project import checkout_files
from tests.pages import run_apart

ROOT = Path(__file__).parents[2]
UNPACKAGED = (".ci/", ".github/", ".gitignore")
"""Files that only a checkout needs."""

pytestmark = pytest.mark.timeout(900)


def run(*argv: str | Path, cwd: Path) -> str:
    """Run a program to success, without variables for Python; return its output."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(argv, cwd=cwd, env=clean, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the paths of the sdist and of the wheel that is built from it, both in isolation."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder)
    (sdist,) = folder.glob("*.tar.gz")
    (wheel,) = folder.glob("*.whl")
    return {"sdist": sdist, "wheel": wheel}


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """Return the interpreter of an empty virtual environment."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    return tmp_path / "venv/bin/python"


def install(python: Path, *wanted: str | Path) -> set[str]:
    """Install packages there; return the names of all that are there."""
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    run(*pip, "install", "--quiet", *wanted, cwd=python.parent)
    return {
        each["name"] for each in json.loads(run(*pip, "list", "--format=json", cwd=ROOT.parent))
    }


def test_the_wheel_installs_with_cffi_alone_and_moves_bytes(
    built: dict[str, Path], python: Path, tmp_path: Path
) -> None:
    assert install(python, built["wheel"]) == {"cffi", "dmabuf", "pycparser"}
    example = tmp_path / "example.py"
    example.write_bytes((ROOT / "examples/round_trip.py").read_bytes())
    source = tmp_path / "source"
    source.write_bytes(os.urandom(1_234_567))
    assert "is byte for byte" in run(python, example, source, tmp_path / "copy", cwd=tmp_path)
    command = python.with_name("dmabuf")
    assert run(command, "--version", cwd=tmp_path) == f"dmabuf {dmabuf.__version__}\n"
    assert "O_DIRECT" in run(command, "doctor", source, cwd=tmp_path)


def test_the_tutorial_runs_with_the_wheel(
    built: dict[str, Path], python: Path, tmp_path: Path
) -> None:
    install(python, f"{built['wheel']}[arrays]")
    ended = run_apart(ROOT / "docs/getting-started.md", tmp_path, python)
    assert ended.returncode == 0, ended.stderr


def test_the_sdist_builds_and_tests_itself(
    built: dict[str, Path], python: Path, tmp_path: Path
) -> None:
    with tarfile.open(built["sdist"]) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.glob("dmabuf-*")
    install(python, built["sdist"], "hypothesis", "pytest", "pytest-timeout", "setuptools")
    few = ("tests/unit/test_lone.py", "tests/unit/test_imports.py")
    assert " passed" in run(python, "-m", "pytest", "-q", *few, cwd=folder)


def test_the_sdist_has_every_file_of_the_checkout(built: dict[str, Path]) -> None:
    with tarfile.open(built["sdist"]) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    missing = set(checkout_files(ROOT)) - packed
    assert {name for name in missing if not name.startswith(UNPACKAGED)} == set()


def test_the_wheel_is_for_every_later_python_and_has_the_package_only(
    built: dict[str, Path],
) -> None:
    assert "-cp311-abi3-linux_" in built["wheel"].name
    with zipfile.ZipFile(built["wheel"]) as archive:
        names = archive.namelist()
        (place,) = (name for name in names if name.endswith("/METADATA"))
        about: Message = Parser().parsestr(archive.read(place).decode())
    assert {name.split("/")[0].split("-")[0] for name in names} == {"dmabuf"}
    assert {"dmabuf/_ext.abi3.so", "dmabuf/py.typed"} <= set(names)
    assert about["Version"] == dmabuf.__version__
    needed = [text for text in about.get_all("Requires-Dist", []) if "extra ==" not in text]
    assert [text.partition(">")[0] for text in needed] == ["cffi"]


@pytest.mark.parametrize(
    ("setting", "missing", "fix"),
    [
        ({"CC": "no-such-compiler"}, "no C compiler (no-such-compiler)", "apt install gcc"),
        ({"CFLAGS": "-nostdinc"}, "the header liburing.h is missing", "apt install liburing-dev"),
    ],
)
def test_a_build_that_lacks_something_names_the_package(
    setting: dict[str, str], missing: str, fix: str, tmp_path: Path
) -> None:
    argv = (sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path)
    done = subprocess.run(argv, cwd=ROOT, env=os.environ | setting, text=True, capture_output=True)
    assert done.returncode == 1
    assert missing in done.stderr and fix in done.stderr
