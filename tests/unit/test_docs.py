"""What docs/ quotes of errors that need no device is what the code says: tests/device has more."""

import json
import re
import sys
from pathlib import Path

import pytest

import dmabuf
from dmabuf import safetensors
from dmabuf.devices import cuda, vulkan
from dmabuf.exporters import foreign
from tests.unit import test_vulkan
from tests.unit.fake_cuda import CUdevice_attribute, CUresult, FakeCuda
from tests.unit.test_cuda import install

DOCS = Path(__file__).parents[2] / "docs"
fake, buf = test_vulkan.fake, test_vulkan.buf


def told(attempt):
    """The last line of the traceback, the error's module left out."""
    with pytest.raises((ImportError, OSError, ValueError)) as caught:
        attempt()
    return f"{type(caught.value).__name__}: {caught.value}"


class Without:
    """As if a module were not installed."""

    def __init__(self, name):
        self.name = name

    def find_spec(self, name, path=None, target=None):
        if name == self.name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.fixture
def without(monkeypatch):
    def hide(name):
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setattr(sys, "meta_path", [Without(name), *sys.meta_path])

    return hide


def test_cuda(monkeypatch, without, tmp_path):
    driver = FakeCuda(count=0)
    install(monkeypatch, driver)
    found = []
    with monkeypatch.context() as only:
        only.setitem(sys.modules, "cuda.bindings.driver", None)
        found.append(told(cuda.Device))
    with monkeypatch.context() as only:
        only.setitem(driver.fail, "cuInit", RuntimeError("Failed to dlopen libcuda.so.1"))
        found.append(told(cuda.Device))
    found.append(told(cuda.Device))
    driver.count = 1
    (tmp_path / "file").write_bytes(bytes(4096))
    with (
        cuda.Device(block_size=4096) as gpu,
        gpu.allocate("2MiB") as memory,
        gpu.memory(memory.address + 512, 4096) as part,
        dmabuf.allocate(4096, exporter="memfd") as buffer,
        dmabuf.open(tmp_path / "file") as file,
    ):
        key = CUdevice_attribute.CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED
        with monkeypatch.context() as only:
            only.setitem(driver.attributes, key, 0)
            found.append(told(memory.export))
        found.append(told(part.export))
        with monkeypatch.context() as only:
            only.setattr(buffer, "_pin_refusal", foreign.pin_refusal("system"))
            found.append(told(lambda: gpu.register(buffer)))
        with gpu.register(buffer):
            found.append(told(lambda: gpu.register(buffer)))
        with monkeypatch.context() as only:
            lost = CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
            memory.read_from(file)
            only.setattr(gpu._staging._blocks, "_lost", OSError(str(lost)))
            found.append(told(lambda: memory.read_from(file)))
    table = (DOCS / "cuda.md").read_text().partition("\n## Errors")[2]
    rows = re.findall(r"^\| ([^|]+) \| ([A-Za-z.]+)", table, re.MULTILINE)[1:]
    assert len(rows) == len(found)
    for error, (words, kind) in zip(found, rows, strict=True):
        assert words in error
        number = getattr(dmabuf.errors.errno, kind, None)
        assert f"[Errno {number}]" in error if number else error.startswith(kind.split(".")[-1])


def test_gpus(fake, buf, without):
    found = []
    fake.extensions.discard("VK_EXT_external_memory_dma_buf")
    found.append(told(vulkan.open))
    fake.extensions.add("VK_EXT_external_memory_dma_buf")
    with vulkan.open() as device:
        fake.needs = 256
        found.append(told(lambda: device.import_buffer(buf)))
    without("vulkan")
    found.append(told(vulkan.open))
    page = (DOCS / "gpus.md").read_text()
    for error in found:
        assert f"`{error}`" in page, error


def test_models(tmp_path):
    text = (DOCS / "models.md").read_text()
    (line,) = re.findall(r"^ValueError: cut.safetensors: .*", text, re.MULTILINE)
    whole, cut = (int(number) for number in re.findall(r" (\d+)\b", line))
    for size in range(whole - 200, whole):
        header = {"t": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
        raw = json.dumps(header).encode()
        if 8 + len(raw) + size == whole:
            break
    path = tmp_path / "cut.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    with path.open("r+b") as file:
        file.truncate(cut)
    error = told(lambda: safetensors.load(path, framework="np"))
    assert error.replace(f"{tmp_path}/", "") == line
