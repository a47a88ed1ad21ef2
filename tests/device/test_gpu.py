"""Real dma-bufs in the bridges to GPU vendors, by the stand-ins of the unit tests."""

import pytest

import dmabuf
from tests.guards import needs
from tests.support import assert_same, pattern
from tests.unit.fake_gpus import Hip, LevelZero

SIZE = 1 << 20


@needs("gcc", "dma_heap")
@pytest.mark.device_table(["HIP", "Level Zero"], "import", by="a fake driver")
@pytest.mark.parametrize("vendor", [Hip, LevelZero])
def test_a_dma_buf_without_pages_is_imported(
    vendor: type[Hip] | type[LevelZero], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver maps the dma-buf that it was given: each side finds what the other wrote."""
    fake = vendor(monkeypatch)
    with fake.module.Device() as device, dmabuf.allocate(SIZE, exporter="system") as buffer:
        buffer.pwrite(pattern(SIZE, 1), 0)
        with device.register(buffer) as registered:
            assert registered.imported
            got = fake.as_kernel(registered.address, SIZE)
            assert_same(got, pattern(SIZE, 1), "what a kernel reads")
            fake.put(registered.address, pattern(SIZE, 2))
            assert_same(buffer.pread(SIZE, 0), pattern(SIZE, 2), "what a kernel wrote")
    fake.check()
    assert not fake.left()
