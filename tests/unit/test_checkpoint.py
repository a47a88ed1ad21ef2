"""torch.distributed.checkpoint by DmabufWriter and DmabufReader, beside torch's own classes."""

import os
import resource
import signal

import pytest

from tests.guards import problem_with, required
from tests.support import cached, drop_cache

if problem_with("torch") and not required("torch"):
    pytest.skip(f"needs torch: {problem_with('torch')}", allow_module_level=True)

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from dmabuf.integrations import DmabufReader, DmabufWriter

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch, about itself

OWN = DmabufWriter, DmabufReader
TORCHS = dcp.FileSystemWriter, dcp.FileSystemReader


def a_state(seed=1):
    chance = torch.Generator().manual_seed(seed)
    return {
        "small": torch.rand(5, 5, generator=chance),
        "large": torch.rand(1000, 3000, generator=chance),
        "bf16": torch.rand(333, 7, generator=chance).to(torch.bfloat16),
        "scalar": torch.tensor(1.5 + seed),
        "empty": torch.zeros(0, 3),
        "nested": {"step": seed, "name": f"run {seed}", "list": [seed, 2.5]},
        **{f"layer{number}": torch.rand(17, number, generator=chance) for number in range(1, 40)},
    }


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict):
            assert_equal(got[name], value)
        elif isinstance(value, torch.Tensor):
            assert got[name].dtype == value.dtype
            assert torch.equal(got[name], value), name
        else:
            assert got[name] == value, name


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize(
    ("writer", "reader"), [OWN, (OWN[0], TORCHS[1]), (TORCHS[0], OWN[1])], ids=["own", "to", "from"]
)
def test_a_saved_state_is_loaded(tmp_path, writer, reader, single, threads):
    how = {"single_file_per_rank": single, "thread_count": threads}
    dcp.save(a_state(1), storage_writer=writer(tmp_path / "new", **how))
    state = a_state(2)
    dcp.load(state, storage_reader=reader(tmp_path / "new"))
    assert_equal(state, a_state(1))


def test_the_files_are_those_of_torch(tmp_path):
    for name, writer in (("own", OWN[0]), ("torch", TORCHS[0])):
        dcp.save(a_state(), storage_writer=writer(tmp_path / name))
    own, torchs = (sorted(os.listdir(tmp_path / name)) for name in ("own", "torch"))
    assert own == torchs == [".metadata", "__0_0.distcp"]
    sizes = {(tmp_path / name / "__0_0.distcp").stat().st_size for name in ("own", "torch")}
    assert len(sizes) == 1


def test_a_part_of_a_state_is_loaded(tmp_path):
    dcp.save(a_state(1), storage_writer=DmabufWriter(tmp_path))
    state = {name: a_state(2)[name] for name in ("layer30", "bf16", "layer3")}
    dcp.load(state, storage_reader=DmabufReader(tmp_path))
    assert_equal(state, {name: a_state(1)[name] for name in state})


def test_more_bytes_than_are_read_at_once(tmp_path):
    chance = torch.Generator().manual_seed(1)
    saved = {
        str(number): torch.randint(0, 256, (size,), generator=chance, dtype=torch.uint8)
        for number, size in enumerate([1 << 27, 70_000_001, 3, 90_000_000, 5000, 140_000_000])
    }
    dcp.save(saved, storage_writer=DmabufWriter(tmp_path))
    state = {name: torch.zeros_like(value) for name, value in saved.items()}
    path = tmp_path / "__0_0.distcp"
    with path.open("rb") as plain:
        drop_cache(plain.fileno())
        dcp.load(state, storage_reader=DmabufReader(tmp_path, require="zero-copy"))
        assert cached(plain.fileno()) == 0
    assert_equal(state, saved)


def test_another_dtype_is_converted(tmp_path):
    dcp.save({"w": torch.arange(12.0).reshape(4, 3)}, storage_writer=DmabufWriter(tmp_path))
    state = {"w": torch.zeros(4, 3, dtype=torch.bfloat16)}
    dcp.load(state, storage_reader=DmabufReader(tmp_path))
    assert torch.equal(state["w"], torch.arange(12.0).reshape(4, 3).to(torch.bfloat16))


class Blob:
    def __init__(self, value):
        self.state = {"blob": value}

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def test_extensions_transform_the_files(tmp_path):
    from torch.distributed.checkpoint._extension import ExtensionRegistry
    from torch.testing._internal.distributed.checkpoint_utils import Rot13Example

    registry = ExtensionRegistry()
    registry.register(Rot13Example)
    saved = {"w": torch.rand(100, 100), "blob": Blob(b"SomeBlob")}
    dcp.save(saved, storage_writer=DmabufWriter(tmp_path, _extensions=[Rot13Example()]))
    state = {"w": torch.zeros(100, 100), "blob": Blob(b"")}
    dcp.load(state, storage_reader=DmabufReader(tmp_path, _extension_registry=registry))
    assert torch.equal(state["w"], saved["w"]) and state["blob"].state == {"blob": b"SomeBlob"}


def test_an_asynchronous_save(tmp_path):
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        state = a_state(1)
        saving = dcp.async_save(state, storage_writer=DmabufWriter(tmp_path / "new"))
        saving.result()
        state = a_state(2)
        dcp.load(state, storage_reader=DmabufReader(tmp_path / "new"))
    finally:
        dist.destroy_process_group()
    assert_equal(state, a_state(1))


def test_an_old_checkpoint_is_replaced_or_kept(tmp_path):
    dcp.save(a_state(1), storage_writer=DmabufWriter(tmp_path))
    with pytest.raises(CheckpointException, match="already exists"):
        dcp.save(a_state(2), storage_writer=DmabufWriter(tmp_path, overwrite=False))
    state = a_state(3)
    dcp.load(state, storage_reader=DmabufReader(tmp_path))
    assert_equal(state, a_state(1))
    dcp.save(a_state(2), storage_writer=DmabufWriter(tmp_path))
    dcp.load(state, storage_reader=DmabufReader(tmp_path))
    assert_equal(state, a_state(2))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_full_disk_is_reported_by_every_thread(tmp_path, threads):
    state = {str(number): torch.rand(2000, 2000) for number in range(4)}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000_000, limit[1]))
    try:
        with pytest.raises(CheckpointException, match="File too large"):
            dcp.save(state, storage_writer=DmabufWriter(tmp_path, thread_count=threads))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    assert os.listdir(tmp_path) == []


def test_a_file_that_was_cut_short(tmp_path):
    dcp.save(a_state(), storage_writer=DmabufWriter(tmp_path))
    path = tmp_path / "__0_0.distcp"
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(CheckpointException, match="get the file again"):
        dcp.load(a_state(), storage_reader=DmabufReader(tmp_path))
    path.unlink()
    with pytest.raises(CheckpointException, match="No such file"):
        dcp.load(a_state(), storage_reader=DmabufReader(tmp_path))


def test_invalid_terms(tmp_path):
    for one in OWN:
        with pytest.raises(ValueError, match="require"):
            one(tmp_path, require="fast")


@pytest.mark.parametrize("protocol", ["dmabuf+file", "dmabuf"])
def test_the_protocols_of_fsspec_are_checkpoint_ids(tmp_path, monkeypatch, protocol):
    from dmabuf.integrations import StoreFileSystem
    from tests import serving

    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    socket = tmp_path / "dmabuf.sock"
    monkeypatch.setattr("dmabuf.store.place.default_path", lambda: str(socket))
    folder = str(tmp_path / "new") if protocol == "dmabuf+file" else "run/1"
    with serving.in_a_thread(socket):
        dcp.save(a_state(1), checkpoint_id=f"{protocol}://{folder}")
        state = a_state(2)
        dcp.load(state, checkpoint_id=f"{protocol}://{folder}")
        assert_equal(state, a_state(1))
        if protocol == "dmabuf":
            assert "run/1/.metadata" in StoreFileSystem(str(socket)).find("")
    StoreFileSystem.clear_instance_cache()
