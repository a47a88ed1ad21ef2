"""The mount beside an ordinary file system: the same calls, at random, have the same results."""

import os
import random
from pathlib import Path

import pytest

from tests.fuzz.mount import compare
from tests.mounting import Mounted
from tests.support import together


@pytest.mark.parametrize("seed", range(3))
def test_the_same_calls_have_the_same_results(world: Mounted, tmp_path: Path, seed: int) -> None:
    compare(world, tmp_path, random.Random(seed), f"{seed}-")
    assert os.listdir(world.path) == []


def test_processes_beside_each_other(world: Mounted, tmp_path: Path) -> None:
    def work(number: int) -> None:
        folder = tmp_path / str(number)
        folder.mkdir()
        compare(world, folder, random.Random(100 + number), f"{number}-")

    together(work, 4)
    assert os.listdir(world.path) == []
