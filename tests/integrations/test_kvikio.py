"""The same program by KvikIO itself, and by dmabuf.compat.kvikio.

KvikIO's host memory path needs no GPU but loads the driver, libcuda.so.1. Where there is none, that
of the benchmarks is compiled, whose functions fail.
"""

import ctypes
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, sys
import numpy as np
{imported} as kvikio

path = sys.argv[1]
values = np.random.default_rng(1).integers(0, 256, 3_000_001, "u1")
with kvikio.CuFile(path, "w") as file:
    print(file.closed, file.open_flags() & os.O_ACCMODE == os.O_WRONLY, file.fileno() >= 0)
    print(file.write(values), file.pwrite(values[:100], 50, 4_000_000).get())
print(file.closed, os.path.getsize(path))

def show(array):
    print(array.nbytes, int(array.astype("u8").sum()), hash(array.tobytes()))

with kvikio.CuFile(path, "r+") as file:
    for size, offset, task in [(None, 0, None), (1, 0, None), (4096, 4096, 1000), (0, 5, None),
                               (70_001, 4095, 199), (2_000_000, 999_999, 65536)]:
        into = np.zeros(3_000_001, "u1")
        print(file.read(into, size, offset, task))
        show(into)
    parts = [np.zeros(300_000, "u1") for _ in range(10)]
    futures = [file.pread(part, file_offset=300_000 * i) for i, part in enumerate(parts)]
    print(sum(future.get() for future in futures))
    show(np.concatenate(parts))
    matrix = np.arange(60_000, dtype="f8").reshape(200, 300)
    for array in (matrix, np.asfortranarray(matrix), matrix[50:60], matrix.astype(">i4")):
        print(file.write(array, file_offset=77))
        back = np.zeros_like(array)
        print(file.read(back, file_offset=77), bool((back == array).all()))
    for array, size in ((values, values.nbytes + 1), (matrix[:, ::2], None)):
        try:
            file.pread(array, size)
        except ValueError as error:
            print("ValueError")
for flags in ("a", "x"):
    try:
        kvikio.CuFile(path, flags)
    except ValueError:
        print("ValueError")
with open(path, "rb") as plain:
    print(hash(plain.read()))
"""
DRIVER = Path(__file__).parents[2] / "benchmarks/libcuda.c"


def run(imported, path, folder):
    environment = os.environ | {"PYTHONHASHSEED": "0", "LD_LIBRARY_PATH": str(folder)}
    program = PROGRAM.format(imported=imported)
    done = subprocess.run(
        [sys.executable, "-c", program, path], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def driver(tmp_path):
    """A folder with a libcuda.so.1, if this machine has none."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        library = tmp_path / "libcuda.so.1"
        how = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
        subprocess.run(["gcc", *how, "-o", library, DRIVER], check=True)
    return tmp_path


def test_one_program_prints_the_same_by_both(driver, tmp_path):
    theirs = run("import kvikio", tmp_path / "theirs", driver)
    ours = run("from dmabuf.compat import kvikio", tmp_path / "ours", driver)
    assert theirs.count("\n") == 30
    assert ours == theirs
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_the_arguments_are_those_of_kvikio():
    import kvikio

    from dmabuf.compat import kvikio as ours

    for name, method in inspect.getmembers(ours.CuFile, inspect.isfunction):
        if not name.startswith("_") or name == "__init__":
            theirs = inspect.signature(getattr(kvikio.CuFile, name)).parameters.values()
            own = inspect.signature(method).parameters.values()
            assert [(one.name, one.kind, one.default) for one in own] == [
                (one.name, one.kind, one.default) for one in theirs
            ], name
