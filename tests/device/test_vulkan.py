"""A GPU's jobs on our buffers and ours on a GPU's, by a real Vulkan driver: Mesa's lavapipe."""

import array
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.guards import needs
from tests.resources import held
from tests.support import assert_same, pattern

EXAMPLES = Path(__file__).parents[2] / "examples"
SIZE = 1 << 20


@pytest.fixture(autouse=True)
def nothing_left_behind():
    before = held()
    yield
    assert held() == before


def swapped(data):
    words = array.array("I", data)
    words.byteswap()
    return words.tobytes()


@needs("vulkan", "nvme", "udmabuf")
def test_the_example_from_drive_to_drive(tmp_path):
    drives = [os.environ[f"DMABUF_TEST_NVME{number}"] for number in (0, 1)]
    folders = [tmp_path / "source", tmp_path / "target"]
    try:
        for drive, folder in zip(drives, folders, strict=True):
            subprocess.run(["mkfs.ext4", "-q", "-F", drive], check=True)
            folder.mkdir()
            subprocess.run(["mount", drive, folder], check=True)
        source, target = folders[0] / "in.raw", folders[1] / "out.raw"
        source.write_bytes(pattern(4 * SIZE, 1))
        done = subprocess.run(
            [sys.executable, "-W", "error", EXAMPLES / "gpu_swap.py", source, target],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.stderr, done.returncode) == ("", 0)
        assert_same(target.read_bytes(), swapped(pattern(4 * SIZE, 1)), "what the GPU made")
        _, read, written = done.stdout.splitlines()
        assert read.endswith("4,194,304 bytes, direct, 0 bytes copied by the CPU")
        assert written.endswith("4,194,304 bytes, direct, 0 bytes copied by the CPU")
    finally:
        for folder in folders:
            if folder.is_mount():
                subprocess.run(["umount", folder], check=True)


@needs("vulkan")
def test_the_shader_is_what_its_source_compiles_to(tmp_path):
    made = tmp_path / "swap.spv"
    source = EXAMPLES / "swap.comp"
    subprocess.run(["glslangValidator", "-V", source, "-o", made], check=True)
    assert without_generator(made) == without_generator(EXAMPLES / "swap.spv")


def without_generator(path):
    """A SPIR-V module's words, but for the compiler's version (the third of its header)."""
    words = array.array("I", path.read_bytes())
    del words[2]
    return words
