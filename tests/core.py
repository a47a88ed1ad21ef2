"""The C core as tests use it: built with the seams of csrc/tests/testing.h.

`install` puts it in the place of `dmabuf._ext`, before dmabuf is imported. It is built once for
the sources that it is made of, and kept under build/. Run as a program, this only builds it: for a
machine without a compiler. With DMABUF_TESTS_CORE=virtual in the environment, the core runs on the
virtual kernel of csrc/tests/simulator instead.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import platform
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
OBJECTS = os.environ.get("DMABUF_TESTS_OBJECTS")
"""A folder where the compiler's objects stay: `make coverage` reads what they have counted."""
FOLDER = Path(OBJECTS) if OBJECTS else ROOT / "build/testing-core"
TARGET = os.environ.get(
    "DMABUF_TESTS_TARGET", f"{sys.implementation.cache_tag} {platform.machine()}"
)
"""The Python and the processor that run it: the lab builds it for another machine, too."""
VIRTUAL = os.environ.get("DMABUF_TESTS_CORE") == "virtual"


def _key() -> str:
    """Return a name for what the extension is made of."""
    seams = CSRC.glob("tests/simulator/*" if VIRTUAL else "tests/testing.[ch]")
    sources = [*CSRC.glob("*.[ch]"), *seams, CSRC / "build_ffi.py"]
    kind = "virtual " * VIRTUAL
    found = hashlib.sha256(f"{kind}{TARGET}".encode())
    for path in sorted(sources):
        found.update(f"{path.name}\0".encode() + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def _compile(target: Path) -> None:
    made = runpy.run_path(str(CSRC / "build_ffi.py"))["make"](
        str(CSRC), testing=not VIRTUAL, virtual=VIRTUAL
    )
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        os.replace(made.compile(tmpdir=OBJECTS or folder), target)


def build() -> Path:
    """Return the path of the extension, built where it is not there yet."""
    target = FOLDER / f"{_key()}.so"
    if target.exists():
        return target
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():  # in a process of its own: the compiler's tools change the folder
            subprocess.run([sys.executable, __file__, str(target)], check=True)
    return target


class Core:
    """The core's functions and constants. A test may replace any of them by setting it."""

    def __init__(self, lib: object) -> None:
        self._lib = lib

    def __getattr__(self, name: str) -> object:
        found = getattr(self._lib, name)
        self.__dict__[name] = found
        return found


def install() -> ModuleType:
    """Put the core with the seams in the place of the package's own, and return it.

    A program that has imported dmabuf keeps the core that it has, which is returned.
    """
    known = sys.modules.get("dmabuf._ext")
    if known is not None:
        return known
    path = build()
    spec = importlib.util.spec_from_file_location("dmabuf._ext", path)
    assert spec is not None and spec.loader is not None
    real = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(real)
    module = ModuleType("dmabuf._ext")
    module.__dict__.update(ffi=real.ffi, lib=Core(real.lib), __file__=str(path))
    sys.modules["dmabuf._ext"] = module
    return module


if __name__ == "__main__":
    _compile(Path(sys.argv[1])) if len(sys.argv) > 1 else build()
else:
    _core = install()
    ffi, lib = _core.ffi, _core.lib
