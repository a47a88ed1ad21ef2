"""Models into the memory of a CUDA device, over fakes of the driver and of PyTorch."""

import numpy as np
import pytest
import safetensors.numpy

from dmabuf import safetensors as models
from tests.resources import held
from tests.support import pattern, poison
from tests.unit import fake_cuda, fake_torch
from tests.unit.fake_cuda import CUresult, FakeCuda

pytestmark = pytest.mark.usefixtures("leaves_nothing")

MODEL = {
    "weights": np.frombuffer(pattern(3_000_000, 1), "<f4").reshape(750, 1000),
    "numbers": np.frombuffer(pattern(800, 2), "<i8"),
    "small": np.frombuffer(pattern(5, 3), "u1"),
    "nothing": np.zeros((0, 3), "<f4"),
}


@pytest.fixture
def driver(monkeypatch):
    before = held()
    driver = FakeCuda(16 << 20)
    driver.gpu.memory[:] = poison(len(driver.gpu.memory))
    fake_cuda.install(monkeypatch, driver)
    fake_torch.install(monkeypatch, driver)
    yield driver
    driver.gpu.check()
    driver.allocated.clear()  # the memory of the tensors is PyTorch's
    assert driver.left() == {}
    assert held() == before


@pytest.fixture
def path(tmp_path):
    safetensors.numpy.save_file(MODEL, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def assert_there(got, expected, device="cuda:0"):
    assert set(got) == set(expected)
    for name, value in expected.items():
        assert got[name].device == device
        assert got[name].array.dtype == value.dtype and got[name].array.shape == value.shape
        assert got[name].array.tobytes() == value.tobytes(), name


@pytest.mark.parametrize("device", ["cuda:0", "cuda", 0])
def test_a_file_on_a_device(driver, path, device):
    calls = []
    model = models.load_file(path, device, progress=lambda *done: calls.append(done))
    assert_there(model, MODEL)
    assert len(driver.allocated) == 1  # the bytes are in one piece of memory
    done, total = calls[-1]
    assert done == total >= sum(one.nbytes for one in MODEL.values())
    assert ("cuEventRecord", 0x77) in [(name, *rest[1:]) for name, *rest in driver.calls]


def test_shards_on_a_device(driver, path):
    more = {"more": np.frombuffer(pattern(100_000, 4), "<i8")}
    safetensors.numpy.save_file(more, path.parent / "b")
    assert_there(models.load_file([path, path.parent / "b"], 0), MODEL | more)


def test_single_tensors_and_slices_on_a_device(driver, path):
    with models.safe_open(path, "pt", "cuda:0") as model:
        assert_there({name: model.get_tensor(name) for name in MODEL}, MODEL)
        part = {"a": model.get_slice("weights")[:, 250:500]}
        assert_there(part, {"a": MODEL["weights"][:, 250:500].copy()})
        del part


@pytest.mark.parametrize("how", ["load_file", "safe_open"])
def test_what_is_in_memory_is_copied_to_a_device(driver, path, how):
    raw = path.read_bytes()
    if how == "load_file":
        assert_there(models.load_file(raw, 0), MODEL)
    else:
        with models.safe_open(raw, "pt", 0) as model:
            assert_there(model.get_tensors(), MODEL)


def test_a_device_that_fails_or_is_none(driver, path):
    with pytest.raises(OSError, match="open CUDA device 7: this machine has 1"):
        models.load_file(path, "cuda:7")
    for device in ("mps", "fpga:0"):
        with pytest.raises(ValueError, match=f"invalid device '{device}': "):
            models.load_file(path, device)
    driver.fail["cuMemcpyHtoDAsync"] = CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(OSError, match="illegal address"):
        models.load_file(path, 0)
    with models.safe_open(path, "pt", 0) as model, pytest.raises(OSError, match="illegal address"):
        model.get_tensor("weights")


@pytest.mark.parametrize("how", ["save", "save_async"])
def test_tensors_of_a_device_are_saved(driver, tmp_path, how):
    """In the background, with one of them at a time on the CPU beside the snapshot."""
    there = {
        name: fake_torch.Tensor(value, "cuda:0")
        for name, value in MODEL.items()
        if value.dtype.name in fake_torch.DTYPES
    }
    fake_torch.MOST[0] = 0
    if how == "save":
        models.save(there, tmp_path / "x")
    else:
        models.save_async(there, tmp_path / "x").result()
        assert fake_torch.MOST[0] == 1
    found = safetensors.numpy.load_file(tmp_path / "x")
    assert set(found) == set(there) and len(found) > 2
    for name in there:
        assert found[name].tobytes() == MODEL[name].tobytes()
