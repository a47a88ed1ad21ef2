"""Loaders of a file, one function each: `python benchmarks/peers.py NAME FILE load|verify`.

A function imports its library, makes the destination if the library accepts one, and returns the
load, which alone is timed. The load returns the tensors, or the whole file. A destination that is
given has been written to, so its pages exist. Prints JSON.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import model
from common import MIB

Load = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Peer:
    """One way to load a file."""

    label: str
    prepare: Callable[[str], Load]
    memory: str
    """The destination: existing memory (given), memory that it allocates while it loads (its own),
    or only the page cache."""
    cached: bool
    """Whether it reads through the page cache."""
    note: str = ""
    format: str = "safetensors"
    """The format of the file that it loads, of FORMATS."""
    package: str | None = None
    """The name of its package; None for dmabuf."""


# -- dmabuf


def _dmabuf(route: str, allocating: bool, path: str) -> Load:
    from dmabuf import allocate
    from dmabuf import open as open_file  # loads the engine, which `import dmabuf` leaves out

    size = os.path.getsize(path)
    ready = None if allocating else allocate(size)

    def load() -> Any:
        buffer = ready or allocate(size)
        with open_file(path) as file:
            transfer = file.read_into(buffer, size, route=route)
        assert transfer.nbytes == size, transfer
        assert transfer.route == route, transfer
        return buffer

    return load


# -- the others


def _filled(size: int) -> Any:
    import torch

    return torch.ones(size, dtype=torch.uint8)


def _deepspeed(path: str) -> Load:
    import torch
    from deepspeed.ops.op_builder import AsyncIOBuilder

    os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(sys.prefix, "torch-extensions"))
    handle = AsyncIOBuilder().load(verbose=False).aio_handle(MIB, 32, False, True, 2)
    # DeepSpeed's locked memory: it reads into other memory with a second copy.
    tensor = handle.new_cpu_locked_tensor(os.path.getsize(path), torch.empty(0, dtype=torch.uint8))
    tensor.fill_(1)

    def load() -> Any:
        if handle.sync_pread(tensor, path, 0) < 1:
            raise OSError("sync_pread read nothing")
        return memoryview(tensor.numpy())

    return load


def _kvikio(path: str) -> Load:
    import kvikio

    tensor = _filled(os.path.getsize(path))

    def load() -> Any:
        with kvikio.CuFile(path, "r") as file:
            assert file.read(tensor.numpy()) == len(tensor)
        return memoryview(tensor.numpy())

    return load


def _fastsafetensors(path: str) -> Load:
    import torch  # noqa: F401 - otherwise fastsafetensors imports it in the timed part
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    kept = []

    def load() -> Any:
        loader = SafeTensorsFileLoader(SingleGroup(), "cpu", nogds=True)
        loader.add_filenames({0: [path]})
        files = loader.copy_files_to_device()
        kept.append((loader, files))
        return {name: files.get_tensor(name) for name in loader.get_keys()}

    return load


def _runai(path: str) -> Load:
    from runai_model_streamer import SafetensorsStreamer

    def load() -> Any:
        with SafetensorsStreamer() as streamer:
            streamer.stream_file(path)
            return dict(streamer.get_tensors())

    return load


def _load_file(backend: str, path: str) -> Load:
    import torch
    from safetensors.torch import load_file

    def load() -> Any:
        tensors = load_file(path, backend=backend)
        for tensor in tensors.values():  # a mapping is read when it is accessed
            tensor.view(torch.uint8).flatten()[::4096].max()
        return tensors

    return load


def _load_file_copied(path: str) -> Load:
    from safetensors.torch import load_file

    places = _like(path)

    def load() -> Any:
        for name, tensor in load_file(path).items():
            places[name].copy_(tensor)
        return places

    return load


def _like(path: str) -> dict[str, Any]:
    """Return parameters that exist before the load, as for load_state_dict()."""
    import torch
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}


def _torch_load(path: str) -> Load:
    import torch

    return partial(torch.load, path, weights_only=True)


def _ranges(path: str) -> dict[str, tuple[int, int]]:
    """Return the first byte and the end of each tensor in the file."""
    with open(path, "rb") as file:
        head = file.read(model.HEADER)
    return model.ranges_of(head)


def _tensors(ranges: Iterable[str], values: Iterable[Any]) -> dict[str, Any]:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the bytes are read-only
        return {
            name: torch.frombuffer(value, dtype=torch.bfloat16)
            for name, value in zip(ranges, values, strict=True)
        }


def _obstore(path: str) -> Load:
    import torch  # noqa: F401 - as for fastsafetensors
    from obstore.store import LocalStore

    folder, name = os.path.split(path)
    store = LocalStore(folder)

    def load() -> Any:
        ranges = _ranges(path)
        starts, ends = zip(*ranges.values(), strict=True)
        return _tensors(ranges, store.get_ranges(name, starts=starts, ends=ends))

    return load


def _tensorstore(path: str) -> Load:
    import tensorstore
    import torch  # noqa: F401 - as for fastsafetensors

    folder, name = os.path.split(path)
    store = tensorstore.KvStore.open({"driver": "file", "path": f"{folder}/"}).result()

    def load() -> Any:
        ranges = _ranges(path)
        reads = [store.read(name, byte_range=slice(*span)) for span in ranges.values()]
        return _tensors(ranges, [read.result().value for read in reads])

    return load


def _tensorizer(path: str) -> Load:
    from tensorizer import TensorDeserializer

    def load() -> Any:
        return dict(TensorDeserializer(path, device="cpu"))

    return load


GIVEN, OWN, CACHE = "given", "its own", "page cache"

PEERS = {
    "dmabuf-direct": Peer("dmabuf, direct", partial(_dmabuf, "direct", False), GIVEN, False),
    "dmabuf-staged": Peer("dmabuf, staged", partial(_dmabuf, "staged", False), GIVEN, False),
    "dmabuf-buffered": Peer("dmabuf, buffered", partial(_dmabuf, "buffered", False), GIVEN, True),
    "dmabuf-own": Peer(
        "dmabuf, direct, allocating", partial(_dmabuf, "direct", True), OWN, False,
        "the buffer is allocated while it is timed",
    ),
    "deepspeed": Peer(
        "DeepSpeed AIO", _deepspeed, GIVEN, False,
        "libaio and O_DIRECT, blocks of 1 MiB, depth 32, 2 threads, into its own kind of locked "
        "memory; whole blocks only, no tensors",
        package="deepspeed",
    ),
    "kvikio": Peer(
        "KvikIO, host memory", _kvikio, GIVEN, True,
        "host memory only; on a machine without a GPU's driver with one whose functions fail",
        package="kvikio-cu12",
    ),
    "load_file-copied": Peer(
        "safetensors load_file, copied", _load_file_copied, GIVEN, True,
        "mapped, and copied into existing tensors, as load_state_dict() does",
        package="safetensors",
    ),
    "load_file": Peer(
        "safetensors load_file, mmap", partial(_load_file, "mmap"), CACHE, True,
        "a private mapping of the file: the tensors are pages of the page cache, which cannot be "
        "shared with a device; one byte of each page is read, so that it is loaded",
        package="safetensors",
    ),
    "load_file-pread": Peer(
        "safetensors load_file, pread", partial(_load_file, "pread"), OWN, True,
        package="safetensors",
    ),
    "fastsafetensors": Peer(
        "fastsafetensors, nogds", _fastsafetensors, OWN, False,
        "device cpu; 16 threads that pread with O_DIRECT, its default",
        package="fastsafetensors",
    ),
    "runai": Peer(
        "Run:ai Model Streamer", _runai, OWN, False, "io_uring and O_DIRECT, its default",
        package="runai-model-streamer",
    ),
    "obstore": Peer(
        "obstore, get_ranges", _obstore, OWN, True,
        "one range for each tensor; bytes, without shapes",
        package="obstore",
    ),
    "tensorstore": Peer(
        "TensorStore, file kvstore", _tensorstore, OWN, True,
        "one read for each tensor, all in flight; bytes, without shapes",
        package="tensorstore",
    ),
    "tensorizer": Peer(
        "tensorizer", _tensorizer, OWN, True, "its defaults, from a file in its format",
        format="tensorizer", package="tensorizer",
    ),
    "torch": Peer(
        "torch.load", _torch_load, OWN, True, "weights_only=True, from the file of torch.save",
        format="torch", package="torch",
    ),
}  # fmt: skip


def _bytes_of(loaded: Any) -> dict[str, memoryview]:
    import torch

    if isinstance(loaded, memoryview):
        return model.of_file(loaded)
    return {
        name: memoryview(tensor.contiguous().view(torch.uint8).flatten().numpy())
        for name, tensor in loaded.items()
    }


def _digest(loaded: Any) -> str:
    if hasattr(loaded, "map"):
        with loaded.map("r") as view:
            return model.digest_of(model.of_file(view))
    return model.digest_of(_bytes_of(loaded))


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


FORMATS = {"safetensors": "safetensors", "torch": "pt", "tensorizer": "tensors"}
"""The endings of the files of each format."""


def convert(path: str, target: str) -> None:
    """Write the tensors of a safetensors file to another, in the format of its ending."""
    import torch
    from safetensors.torch import load_file

    tensors = load_file(path)
    if target.endswith(FORMATS["torch"]):
        torch.save(tensors, target)
        return
    from tensorizer import TensorSerializer

    file = TensorSerializer(target)
    file.write_state_dict(tensors)
    file.close()


def main(arguments: Iterable[str]) -> None:
    """Run one load, as its process."""
    name, path, how = arguments
    if name == "convert":
        convert(path, how)
        return
    load = PEERS[name].prepare(path)
    begun, used = time.perf_counter(), _cpu()
    loaded = load()
    answer: dict[str, Any] = {"seconds": time.perf_counter() - begun, "cpu_of_load": _cpu() - used}
    if how == "verify":
        answer["digest"] = _digest(loaded)
    print(json.dumps(answer))
    sys.stdout.flush()
    os._exit(0)  # the time to unload libraries must not count


if __name__ == "__main__":
    main(sys.argv[1:])
