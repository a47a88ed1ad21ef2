"""A short soak with every kind of buffer and both drives; `make soak` runs the long one."""

import pytest

from tests.guards import needs
from tests.soak.__main__ import run

everything = needs("udmabuf", "dma_heap", "vgem", "hugepages", "nvme", "loop", "zram", "ext4")


@everything
@pytest.mark.timeout(300)
def test_a_short_soak(tmp_path):
    differences, _, _, counts = run(700, 1, tmp_path)
    assert not differences
    assert {"direct", "staged", "buffered", "lone", "awaited lone"} <= {*counts}
