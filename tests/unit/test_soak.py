"""A short soak: transfers of every kind from a seed, and nothing left of them."""

import pytest

from tests.soak.__main__ import run
from tests.soak.work import KINDS

EVERY = {*KINDS} - {"by the CPU", "truncate", "another buffer", "other engines"}


@pytest.mark.parametrize("seed", [1])
def test_a_short_soak(seed, tmp_path):
    differences, _, _, counts = run(2000, seed, tmp_path)
    assert not differences
    assert EVERY | {"direct", "staged", "buffered"} <= {*counts}
