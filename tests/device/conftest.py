"""Devices beside storage: what `lab/run --devices all` adds to the guest, or such hardware."""

from tests.kernel.conftest import no_dma_buf_is_left

__all__ = ["no_dma_buf_is_left"]
