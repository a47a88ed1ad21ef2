"""One memory in three processes, of a camera, a GPU and NumPy: examples/three_processes.py."""

import array
import hashlib
import subprocess
import sys
from pathlib import Path

from tests.device.vivid import SINGLE, picture, reference
from tests.guards import needs

EXAMPLE = Path(__file__).parents[2] / "examples/three_processes.py"


@needs("udmabuf", "vivid", "vulkan")
def test_a_camera_a_gpu_and_numpy_share_a_buffer() -> None:
    still = reference("RGB3", 320, 180)
    words = array.array("I", still)
    words.byteswap()
    with picture(SINGLE):
        done = subprocess.run(
            [sys.executable, EXAMPLE, SINGLE], capture_output=True, text=True, timeout=300
        )
    assert done.returncode == 0, done.stdout + done.stderr
    camera, gpu, reader = done.stdout.splitlines()
    assert camera.startswith("camera ") and "exporter='udmabuf'" in camera
    assert gpu.startswith("gpu ") and "words swapped" in gpu
    assert reader.startswith("reader ")
    assert len({line.split()[1] for line in (camera, gpu, reader)}) == 3, "processes"
    assert reader.split()[-1] == hashlib.sha256(words.tobytes()).hexdigest()
