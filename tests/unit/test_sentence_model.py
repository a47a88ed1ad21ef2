"""The example that runs a real model from tensors in a buffer."""

import os
import subprocess
import sys
from pathlib import Path

from tests.guards import needs

EXAMPLE = Path(__file__).parents[2] / "examples/sentence_model.py"


@needs("sentence_model")
def test_its_embeddings_are_those_of_the_ordinary_way():
    done = subprocess.run(
        [sys.executable, EXAMPLE, "One sentence.", "Another."],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("103 weights in a ")
    assert lines[1].startswith("90,860,184 bytes by route ")
    assert lines[2] == "2 embeddings of 384 numbers, equal to the ordinary way's"
