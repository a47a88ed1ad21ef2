"""Models into a buffer and back, by PyTorch, beside safetensors.torch."""

import faulthandler
import gc
import json
import os
import signal
import warnings

import pytest

from dmabuf import safetensors as models
from tests.guards import problem_with, required
from tests.resources import held
from tests.serving import in_a_thread

if problem_with("torch") and not required("torch"):
    pytest.skip(f"needs torch: {problem_with('torch')}", allow_module_level=True)

import safetensors.torch
import torch

DTYPES = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 uint16 uint32 uint64 bool"
DTYPES += " complex64 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz"


pytestmark = pytest.mark.usefixtures("leaves_nothing")


def a_model():
    chance = torch.Generator().manual_seed(5)
    found = {}
    for number, name in enumerate(DTYPES.split()):
        dtype = getattr(torch, name)
        shape = (3, 500 + number)
        raw = torch.randint(0, 256, (*shape[:1], shape[1] * dtype.itemsize), generator=chance)
        raw = raw % 2 if name == "bool" else raw
        found[name] = raw.to(torch.uint8).view(dtype)
    found["scalar"] = torch.tensor(1.5)
    found["nothing"] = torch.zeros(3, 0)
    return found


def assert_same(got, expected):
    assert set(got) == set(expected)
    for name, value in expected.items():
        assert got[name].dtype == value.dtype and got[name].shape == value.shape
        flat = got[name].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8)
        assert torch.equal(*flat), name


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(a_model(), path, metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("alignment", [None, 64, 4096])
def test_load(path, alignment):
    model = models.load(path, alignment=alignment)
    assert_same(model, safetensors.torch.load_file(path))
    for value in model.values():
        assert value.data_ptr() % (alignment or value.itemsize) == 0


def test_load_file_is_theirs_through_a_buffer(path):
    model = models.load_file(path, torch.device("cpu"))
    assert type(model) is dict
    assert_same(model, safetensors.torch.load_file(path))
    for device in ("mps", "no", torch.device("meta"), None):
        with pytest.raises(ValueError, match="invalid device"):
            models.load_file(path, device)


def test_save_file_is_theirs_to_the_byte(path, tmp_path):
    models.save_file(a_model(), tmp_path / "ours", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == path.read_bytes()


def test_there_and_back_from_the_buffer(path, tmp_path):
    model = models.load(path)
    models.save(model, tmp_path / "ours", metadata=model.metadata)
    assert (tmp_path / "ours").read_bytes() == path.read_bytes()
    safetensors.torch.save_file(dict(model), tmp_path / "theirs", metadata=model.metadata)
    assert (tmp_path / "theirs").read_bytes() == path.read_bytes()


def test_two_in_a_byte(tmp_path):
    packed = torch.arange(12, dtype=torch.uint8).reshape(3, 4).view(torch.float4_e2m1fn_x2)
    models.save({"a": packed}, tmp_path / "ours")
    safetensors.torch.save_file({"a": packed}, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    model = models.load(tmp_path / "ours")
    assert model.entries["a"].shape == (3, 8)
    assert_same(model, {"a": packed})


def test_an_odd_number_of_them_and_a_dtype_that_pytorch_lacks(tmp_path):
    header = {
        "a": {"dtype": "F4", "shape": [2, 1], "data_offsets": [0, 1]},
        "b": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [1, 4]},
    }
    raw = json.dumps(header).encode()
    path = tmp_path / "x"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + b"abcd")
    model = models.load(path)
    with pytest.raises(ValueError, match="tensor 'a' in PyTorch: F4 needs an even last dimension"):
        model["a"]
    with pytest.raises(TypeError, match=r"has no dtype for F6_E2M3: raw\(\) returns the bytes"):
        model["b"]


def test_parameters_views_and_strides(tmp_path):
    weight = torch.nn.Parameter(torch.arange(12.0).reshape(3, 4))
    tensors = {
        "parameter": weight,
        "turned": weight.detach().t(),
        "part": weight.detach()[::2, 1:],
        "conjugate": torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex64).conj(),
    }
    models.save(tensors, tmp_path / "x")
    found = safetensors.torch.load_file(tmp_path / "x")
    for name, value in tensors.items():
        assert torch.equal(found[name], value), name


def test_sparse_ones_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is sparse, which the format lacks"):
        models.save({"a": torch.eye(3).to_sparse()}, tmp_path / "x")
    with pytest.raises(TypeError, match=r"dtype torch\.complex128, which safetensors files lack"):
        models.save({"a": torch.zeros(3, dtype=torch.complex128)}, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_module_keeps_the_buffer_until_it_dies(path):
    before = held()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = torch.nn.Linear(500 + 1, 3, bias=False)
        module.load_state_dict({"weight": models.load(path)["float32"]}, assign=True)
        gc.collect()
        assert held() != before
        expected = safetensors.torch.load_file(path)["float32"]
        assert torch.equal(module.weight.view(torch.uint8), expected.view(torch.uint8))
        del module
        assert held() == before


def test_tensors_over_shared_memory(path, tmp_path):
    with in_a_thread(tmp_path / "s"):
        for _ in range(2):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                model = models.load(path, shared=tmp_path / "s")
                assert_same(model, safetensors.torch.load_file(path))
            tensor = model["float32"]
            assert not model.buffer.writable()
            tensor.clone().add_(1)
            del model
        pid = os.fork()
        if pid == 0:
            faulthandler.disable()
            tensor.add_(1)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGSEGV
        del tensor


# -- single tensors, and modules


def test_single_tensors_and_slices_are_theirs(path):
    with models.safe_open(path, "pt") as ours, safetensors.safe_open(path, "pt") as theirs:
        assert_same({name: ours.get_tensor(name) for name in ours.keys()}, a_model())  # noqa: SIM118
        for name in ("float32", "bfloat16", "bool", "float8_e4m3fn"):
            for index in (1, slice(1, 3), (slice(None), slice(100, 300)), (..., 3)):
                got = ours.get_slice(name)[index]
                expected = theirs.get_slice(name)[index]
                assert got.is_contiguous()
                assert_same({name: got}, {name: expected.contiguous()})


def test_items_that_share_a_byte_are_not_sliced(tmp_path):
    packed = torch.arange(12, dtype=torch.uint8).reshape(3, 4).view(torch.float4_e2m1fn_x2)
    models.save({"a": packed}, tmp_path / "x")
    with models.safe_open(tmp_path / "x", "pt") as model:
        assert_same({"a": model.get_tensor("a")}, {"a": packed})
        with pytest.raises(TypeError, match="items of F4 share bytes; use get_tensor"):
            model.get_slice("a")


class Tied(torch.nn.Module):
    """Two names of one weight, and a part of another that is no tensor of its own."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(30, 8)
        self.head = torch.nn.Linear(8, 30, bias=True)
        self.head.weight = self.embedding.weight
        self.register_buffer("table", torch.arange(12.0).reshape(3, 4).t())


def test_a_module_with_tied_weights_is_theirs_both_ways(tmp_path):
    torch.manual_seed(1)
    module = Tied()
    models.save_model(module, tmp_path / "ours", {"format": "pt"})
    safetensors.torch.save_model(module, tmp_path / "theirs", {"format": "pt"})
    ours, theirs = models.load(tmp_path / "ours"), models.load(tmp_path / "theirs")
    assert_same(ours, dict(theirs))
    assert ours.metadata == theirs.metadata == {"format": "pt", "head.weight": "embedding.weight"}
    for place in ("ours", "theirs"):
        other = Tied()
        assert models.load_model(other, tmp_path / place) == (set(), [])
        assert_same(other.state_dict(), module.state_dict())
        assert other.head.weight is other.embedding.weight
    assert safetensors.torch.load_model(Tied(), tmp_path / "ours") == (set(), [])


def test_names_that_are_missing_or_unexpected(tmp_path):
    state = Tied().state_dict()
    del state["table"], state["head.bias"]
    models.save_file(state | {"more": torch.zeros(2)}, tmp_path / "x")
    with pytest.raises(
        RuntimeError, match=r"Tied: missing 'head.bias', 'table'; unexpected 'more'"
    ):
        models.load_model(Tied(), tmp_path / "x")
    found = models.load_model(Tied(), tmp_path / "x", strict=False)
    assert found == ({"table", "head.bias"}, ["more"])
    with pytest.raises(RuntimeError, match="size mismatch"):
        models.load_model(torch.nn.Embedding(3, 4), _renamed(tmp_path))


def _renamed(folder):
    models.save_file({"weight": torch.zeros(2, 2)}, folder / "y")
    return folder / "y"
