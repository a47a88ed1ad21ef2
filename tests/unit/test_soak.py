"""A short soak from a seed, of which nothing is left; and that what is left would be told."""

import dmabuf
from tests.guards import needs
from tests.soak.__main__ import run
from tests.soak.accounts import Account
from tests.soak.work import KINDS

MIB = 1 << 20
TRANSFERS = {*KINDS} - {"by the CPU", "truncate", "another buffer", "other engines"}
ROUTES = {"direct", "staged", "buffered", "lone", "awaited lone"}


def test_a_short_soak(tmp_path):
    differences, _, _, counts = run(1000, 1, tmp_path)
    assert not differences
    assert {*counts} >= TRANSFERS | ROUTES


@needs("io_uring")
def test_what_is_left_is_told(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(4 * MIB))
    before = Account.take()
    with (
        dmabuf.allocate(4 * MIB, exporter="memfd") as buffer,
        dmabuf.Engine() as engine,
        dmabuf.open(path, engine=engine) as file,
    ):
        assert file.read_into(buffer).registered
        kept = bytearray(4 * MIB)
        now = Account.take()
    told = [sentence.partition(":")[0] for sentence in now.differences(before)]
    assert told == ["descriptors", "mappings", "pinned_kb", "registered"]
    assert now.growth(before)["allocated_kb"] >= len(kept) >> 10
    del kept
    assert not before.settled().differences(before)
