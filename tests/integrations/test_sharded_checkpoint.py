"""Checkpoints of several processes, saved and loaded in different shards."""

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.multiprocessing import spawn

from dmabuf.integrations import DmabufReader, DmabufWriter

RANKS = 2


def a_rank(rank, folder, threads):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS
    )
    mesh = init_device_mesh("cpu", (RANKS,))
    whole = torch.arange(1000.0 * 77).reshape(1000, 77)
    shards = Shard(0), Shard(1), Replicate()
    for number, (one, other) in enumerate(itertools.permutations(shards, 2)):
        path = f"{folder}/{number}"
        saved = {"w": distribute_tensor(whole, mesh, [one]), "rank": rank, "plain": whole[:5]}
        dcp.save(saved, storage_writer=DmabufWriter(path, thread_count=threads))
        empty = distribute_tensor(torch.zeros_like(whole), mesh, [other])
        state = {"w": empty, "plain": torch.zeros(5, 77)}
        dcp.load(state, storage_reader=DmabufReader(path))
        assert torch.equal(state["w"].full_tensor(), whole), (one, other)
        assert torch.equal(state["plain"], whole[:5])
        other_way = {"w": distribute_tensor(torch.zeros_like(whole), mesh, [other])}
        dcp.load(other_way, storage_reader=dcp.FileSystemReader(path))
        assert torch.equal(other_way["w"].full_tensor(), whole), (one, other)
    dist.destroy_process_group()


@pytest.mark.parametrize("threads", [1, 2])
def test_shards_are_loaded_in_any_other_way(tmp_path, threads):
    spawn(a_rank, (str(tmp_path), threads), nprocs=RANKS)
