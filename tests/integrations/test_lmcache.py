"""A KV cache through LMCache's own adapter and memory, to files or a node's store, and back."""

import os
import select
import warnings

import pytest
import torch

from tests.nodes import node

pytest.importorskip("lmcache", reason="needs lmcache (make integrations installs it)")

with warnings.catch_warnings(action="ignore"):  # of LMCache, about what it uses
    from lmcache.v1.distributed.api import ObjectKey
    from lmcache.v1.distributed.l2_adapters.config import get_l2_adapter_config_class
    from lmcache.v1.distributed.l2_adapters.factory import create_l2_adapter_from_registry
    from lmcache.v1.memory_allocators.tensor_memory_allocator import TensorMemoryAllocator

pytestmark = pytest.mark.filterwarnings("ignore")

SHAPE = torch.Size([2, 4, 256, 130])  # keys and values, layers, tokens, values of each
COUNT = 20


def an_adapter(name, **parameters):
    config = get_l2_adapter_config_class("native_plugin").from_dict(
        {
            "type": "native_plugin",
            "module_path": "dmabuf.integrations.lmcache_files",
            "class_name": name,
            "adapter_params": parameters,
            "max_capacity_gb": 1,
        }
    )
    return create_l2_adapter_from_registry(config)


def wait(fd):
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(30_000)
    os.eventfd_read(fd)


def a_cache(seed):
    """Objects in memory of LMCache's allocator, with random values."""
    arena = torch.full((64 << 20,), 0x55, dtype=torch.uint8)
    allocator = TensorMemoryAllocator(arena)
    objects = [allocator.allocate(SHAPE, torch.bfloat16) for _ in range(COUNT)]
    if seed is not None:
        chance = torch.Generator().manual_seed(seed)
        for one in objects:
            one.tensor.copy_(torch.rand(SHAPE, generator=chance))
    return objects


@pytest.fixture(params=["files", "names"])
def how(request, tmp_path):
    """The name and the arguments of an adapter."""
    if request.param == "files":
        yield {"name": "KvFiles", "folder": str(tmp_path)}
        return
    (tmp_path / "served").mkdir()
    with node(tmp_path / "served", max_memory=64 << 20) as listener:
        yield {"name": "KvNames", "address": listener.address}


def test_a_cache_comes_back_byte_for_byte(how):
    keys = [ObjectKey(bytes([number]) * 32, "meta-llama/Llama-3", 1) for number in range(COUNT)]
    saved = a_cache(1)
    adapter = an_adapter(**how)
    try:
        task = adapter.submit_store_task(keys, saved)
        wait(adapter.get_store_event_fd())
        result = adapter.pop_completed_store_tasks()[task]
        assert result.is_successful()
        assert adapter.get_usage().total_bytes_used == COUNT * SHAPE.numel() * 2
    finally:
        adapter.close()

    adapter = an_adapter(**how)  # as after a restart
    try:
        asked = [*keys, ObjectKey(b"x" * 32, "meta-llama/Llama-3", 1)]
        task = adapter.submit_lookup_and_lock_task(asked, {})
        wait(adapter.get_lookup_and_lock_event_fd())
        found = adapter.query_lookup_and_lock_result(task)
        assert [found.test(number) for number in range(COUNT + 1)] == [True] * COUNT + [False]
        loaded = a_cache(None)
        task = adapter.submit_load_task(keys, loaded)
        wait(adapter.get_load_event_fd())
        done = adapter.query_load_result(task)
        assert all(done.test(number) for number in range(COUNT))
        for old, new in zip(saved, loaded, strict=True):
            assert bytes(old.byte_array) == bytes(new.byte_array)
        adapter.submit_unlock(keys)
        adapter.delete(keys[:5])
        task = adapter.submit_lookup_and_lock_task(keys, {})
        wait(adapter.get_lookup_and_lock_event_fd())
        found = adapter.query_lookup_and_lock_result(task)
        assert [found.test(number) for number in range(COUNT)] == [False] * 5 + [True] * 15
    finally:
        adapter.close()
    for one in (*saved, *loaded):
        one.ref_count_down()
