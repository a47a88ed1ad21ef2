"""Models at nodes: loaded by their URLs, from several nodes, once for all processes, by vLLM."""

import contextlib
import dataclasses
import json
import os
import sys
import types
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy
import pytest

from dmabuf import safetensors
from dmabuf.remote import RemoteTransfer
from tests.nodes import node, relay, url_of
from tests.serving import as_a_program, in_a_thread
from tests.support import assert_same, pattern

MIB = 1 << 20
ARRAYS = {f"t{number}": numpy.arange(number * 7919 + 1, dtype="f4") for number in range(20)}

pytestmark = pytest.mark.usefixtures("leaves_nothing")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "served"
    made.mkdir()
    return made


@pytest.fixture
def host(folder: Path, tmp_path: Path) -> Iterator[str]:
    """The URL of a node that serves the folder."""
    with node(folder, f"unix:{tmp_path / 'node.sock'}"):
        yield url_of(tmp_path / "node.sock")


def check(model: safetensors.Tensors) -> None:
    """Compare every byte of every tensor."""
    assert {name: tensor.tobytes() for name, tensor in model.items()} == {
        name: array.tobytes() for name, array in ARRAYS.items()
    }


def test_a_model_at_a_node_is_loaded(folder: Path, host: str) -> None:
    safetensors.save_file(ARRAYS, folder / "m.safetensors", metadata={"a": "b"})
    safetensors.save_file({"other": numpy.ones(5)}, folder / "n.safetensors")
    model = safetensors.load(f"{host}/m.safetensors", framework="np", require="uncached")
    check(model)
    assert model.metadata == {"a": "b"}
    assert model.transfers[0].transport == "unix"
    both = [f"{host}/{name}.safetensors" for name in "mn"]
    some = safetensors.load(both, tensors=["t3", "other"], framework="np")
    assert sorted(some) == ["other", "t3"]
    assert some["t3"].tobytes() == ARRAYS["t3"].tobytes()
    (folder / "a.bin").write_bytes(pattern(100, 1))
    with pytest.raises(FileNotFoundError):
        safetensors.load(f"{host}/none", framework="np")
    with pytest.raises(ValueError, match=r"load dmabuf://.*a\.bin: it has"):
        safetensors.load(f"{host}/a.bin", framework="np")


def test_a_model_of_several_files_is_loaded_by_the_url_of_its_index(
    folder: Path, host: str
) -> None:
    (folder / "below").mkdir()
    safetensors.save_sharded(ARRAYS, folder / "below", max_shard_size="200kB")
    url = f"{host}/below/model.safetensors.index.json"
    model = safetensors.load(url, framework="np")
    check(model)
    shards = sorted(one.name for one in folder.glob("below/*.safetensors"))
    assert len(model.transfers) == len(shards) > 3
    assert safetensors.files_of(url) == [f"{host}/below/{name}" for name in shards]
    (folder / "bad.json").write_text(json.dumps({"weight_map": {"t": "../m.safetensors"}}))
    with pytest.raises(ValueError, match="not a file below it"):
        safetensors.load(f"{host}/bad.json", framework="np")


def test_a_model_that_changes_after_its_header_was_read(folder: Path, host: str) -> None:
    path = folder / "m.safetensors"
    safetensors.save_file({"t": numpy.ones(1 << 20, "f4")}, path)
    with pytest.raises(ValueError, match="changed after its header"):
        safetensors.load(
            f"{host}/m.safetensors",
            framework="np",
            progress=lambda *_: os.utime(path, ns=(1, 1)),
        )


def test_single_tensors_and_slices_of_a_model_at_a_node(folder: Path, tmp_path: Path) -> None:
    safetensors.save_sharded(ARRAYS, folder, max_shard_size="200kB", metadata={"a": "b"})
    address, url = f"unix:{tmp_path / 'node.sock'}", url_of(tmp_path / "node.sock")
    with node(folder, address):
        model = safetensors.safe_open(f"{url}/model.safetensors.index.json", "np")
        assert (set(model.keys()), model.metadata()) == (set(ARRAYS), {"a": "b"})
        for name, array in ARRAYS.items():
            assert model.get_tensor(name).tobytes() == array.tobytes(), name
            part = model.get_slice(name)[-5000:-1:3]
            assert part.tobytes() == array[-5000:-1:3].tobytes(), name
    with model:
        with pytest.raises(ConnectionError):
            model.get_tensor("t9")
        with node(folder, address):  # it connects again
            assert model.get_tensor("t9").tobytes() == ARRAYS["t9"].tobytes()
            for path in folder.glob("*.safetensors"):
                os.utime(path, ns=(5, 5))
            with pytest.raises(ValueError, match="changed after its header"):
                model.get_tensor("t9")


def test_a_model_at_a_node_has_one_copy_on_this_host(
    folder: Path, host: str, tmp_path: Path
) -> None:
    path, socket = folder / "m.safetensors", tmp_path / "here.sock"
    safetensors.save_file(ARRAYS, path)
    with in_a_thread(socket) as server:
        how = {"framework": "np", "shared": socket}
        first = safetensors.load(f"{host}/m.safetensors", **how)
        check(first)
        assert isinstance(first.transfers[0], RemoteTransfer)
        second = safetensors.load(f"{host}/m.safetensors", **how)
        check(second)
        assert second.transfers == ()
        assert os.fstat(first.buffer.fileno()).st_ino == os.fstat(second.buffer.fileno()).st_ino
        with pytest.raises(ValueError, match="read-only"):
            second["t3"][0] = 1
        os.utime(path, ns=(5, 5))  # it may have another content now
        third = safetensors.load(f"{host}/m.safetensors", **how)
        check(third)
        assert third.transfers and server.usage.names == 2
        first.buffer.close(), second.buffer.close(), third.buffer.close()


def test_a_load_goes_on_when_one_of_three_nodes_is_killed_under_way(tmp_path: Path) -> None:
    arrays = {"large": numpy.frombuffer(pattern(40 * MIB, 3), "u1"), "small": ARRAYS["t2"]}
    with contextlib.ExitStack() as stack:
        addresses = []
        for name in "abc":
            (tmp_path / name).mkdir()
            path = tmp_path / name / "m.safetensors"
            if name == "a":
                safetensors.save_file(arrays, path)
            else:
                os.link(tmp_path / "a" / "m.safetensors", path)
            options = ["--listen", "127.0.0.1:0", "--files", tmp_path / name]
            process = stack.enter_context(as_a_program(tmp_path / f"{name}.sock", *options))
            address = process.stderr.readline().split()[2].rstrip(",")
            if name == "b":
                address = stack.enter_context(relay(address, 5 * MIB, process.kill))
                killed = process
            addresses.append(address)
        model = safetensors.load(f"dmabuf://{','.join(addresses)}/m.safetensors", framework="np")
        for name, array in arrays.items():
            assert_same(model[name].tobytes(), array.tobytes(), name)
        [done] = model.transfers
        assert done.nodes.keys() == {addresses[0], addresses[2]}
        assert killed.wait() < 0


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The parts of vLLM that its plug-in uses, as of vLLM 0.32."""

    class DefaultModelLoader:
        counter_before_loading_weights = 0.0

        class Source:
            def __init__(self, path: str) -> None:
                self.model_or_path, self.prefix = path, "model."
                self.subfolder = self.revision = self.allow_patterns_overrides = None
                self.fall_back_to_pt = True

        def __init__(self, load_config: object) -> None:
            self.load_config = load_config

        def _prepare_weights(self, path: str, *_: object) -> tuple[str, list[str], bool, None]:
            return path, sorted(str(one) for one in Path(path).glob("*.safetensors")), True, None

    @dataclasses.dataclass
    class LoadConfig:
        load_format: str = "dmabuf"
        model_loader_extra_config: dict[str, object] | None = None

    found = types.SimpleNamespace(
        LoadConfig=LoadConfig,
        DefaultModelLoader=DefaultModelLoader,
        register_model_loader=lambda name: lambda loader: loader,
    )
    layers = ".model_executor.model_loader"
    for name in ("", ".config", ".config.load", layers[:15], layers, f"{layers}.default_loader"):
        module = types.ModuleType(f"vllm{name}")
        module.__dict__.update(vars(found))
        monkeypatch.setitem(sys.modules, f"vllm{name}", module)
    monkeypatch.delitem(sys.modules, "dmabuf.integrations.vllm_loader", raising=False)
    from dmabuf.integrations import vllm_loader, weights

    # With arrays in the place of PyTorch's tensors.
    monkeypatch.setattr(weights, "load", partial(safetensors.load, framework="np"))
    yield vllm_loader
    sys.modules.pop("dmabuf.integrations.vllm_loader")


def test_vllm_gets_the_weights_of_a_node(
    vllm: types.ModuleType, folder: Path, host: str, tmp_path: Path
) -> None:
    safetensors.save_sharded(ARRAYS, folder, max_shard_size="200kB")

    def weights(path: Path, **options: object) -> dict[str, bytes]:
        config = sys.modules["vllm.config.load"].LoadConfig(model_loader_extra_config=options)
        loader = vllm.DmabufModelLoader(config)
        found = loader._get_weights_iterator(loader.Source(str(path)))
        return {name: tensor.tobytes() for name, tensor in found}

    expected = {f"model.{name}": array.tobytes() for name, array in ARRAYS.items()}
    assert weights(folder) == expected
    empty, index = tmp_path / "empty", f"{host}/model.safetensors.index.json"
    empty.mkdir()  # a node without weights
    assert weights(empty, source=index) == expected
    assert weights(empty, source=safetensors.files_of(index), require="uncached") == expected
    with in_a_thread(tmp_path / "here.sock") as server:
        for _ in range(2):
            assert weights(empty, source=index, shared=str(tmp_path / "here.sock")) == expected
        assert server.usage.names == len(safetensors.files_of(index))
    with pytest.raises(ValueError, match="use require, shared, source"):
        weights(empty, fast=True)
