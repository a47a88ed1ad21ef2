"""The load formats of vLLM and SGLang, over stand-ins for what these call and are called by.

tests/integrations/test_vllm.py and test_sglang.py have the libraries.
"""

import dataclasses
import importlib
import json

import numpy as np
import pytest
import safetensors.numpy

from tests.support import pattern
from tests.unit import fake_modules, fake_torch
from tests.unit.fake_cuda import FakeCuda

pytestmark = pytest.mark.usefixtures("leaves_nothing")

SHARDS = {
    f"model-{number}.safetensors": {
        f"{number}.weight": np.frombuffer(pattern(40_000, number), "<f4").reshape(100, 100),
        f"{number}.bias": np.frombuffer(pattern(800, number + 9), "<i8"),
    }
    for number in range(4)
}


@dataclasses.dataclass
class LoadConfig:
    load_format: str = "dmabuf"
    model_loader_extra_config: dict | None = None
    draft_model_idx: int | None = None


@dataclasses.dataclass
class Source:
    model_or_path: str
    prefix: str = ""
    subfolder: str | None = None
    revision: str | None = "main"
    fall_back_to_pt: bool = True
    allow_patterns_overrides: list | None = None
    model_config: object = None


class DefaultModelLoader:
    """What is alike in both engines' own loaders, which choose the files of a model."""

    Source = Source
    counter_before_loading_weights = 0.0

    def __init__(self, load_config):
        assert load_config.load_format == "safetensors"
        assert not load_config.model_loader_extra_config  # theirs refuse options that they lack
        self.load_config = load_config

    def _prepare_weights(self, folder, *rest):
        assert rest == self.arguments
        return folder, [f"{folder}/{name}" for name in sorted(SHARDS)], *self.more

    def _filter_mtp_weights(self, weights, prefix, index):
        return ((prefix + name, value) for name, value in weights if name.startswith(f"{index}."))


class Hooks:
    BEFORE = "before"
    registered = ()

    @classmethod
    def register(cls, *hook):
        cls.registered = hook


@pytest.fixture(params=["vllm", "sglang"])
def engine(request, monkeypatch):
    """The name of an engine, and the module of its loader."""
    fake_torch.install(monkeypatch, FakeCuda(1 << 20))
    formats, base = {}, DefaultModelLoader
    if request.param == "vllm":
        base = type("Base", (base,), {"arguments": (None, "main", True, None), "more": (1, 2)})
        where = "vllm.model_executor.model_loader"
        fake_modules.install(monkeypatch, "vllm.config.load", LoadConfig=LoadConfig)
        fake_modules.install(
            monkeypatch, where,
            register_model_loader=lambda name: lambda found: formats.__setitem__(name, found),
        )  # fmt: skip
        fake_modules.install(monkeypatch, f"{where}.default_loader", DefaultModelLoader=base)
    else:
        base = type("Base", (base,), {"arguments": ("main", True, None), "more": (1,)})
        monkeypatch.setattr(Hooks, "registered", ())
        for name, content in {
            "configs.load_config": {"LoadConfig": LoadConfig},
            "model_loader.loader": {"DefaultModelLoader": base},
            "model_loader.weight_utils": {"maybe_add_mtp_safetensors": with_draft},
            "plugins.hook_registry": {"HookRegistry": Hooks, "HookType": Hooks},
            "server_args": {
                "add_load_format_choices": lambda names: formats.update(dict.fromkeys(names))
            },
        }.items():
            fake_modules.install(monkeypatch, f"sglang.srt.{name}", **content)
    module = importlib.import_module(f"dmabuf.integrations.{request.param}_loader")
    module.register()
    assert "dmabuf" in formats
    yield request.param, module
    fake_modules.forget(module.__name__)


def with_draft(files, folder, index, config):
    """SGLang's function that adds the file of a draft model."""
    assert index == "model.safetensors.index.json" and config == "hf"
    return [*files, f"{folder}/draft.safetensors"]


@pytest.fixture
def folder(tmp_path):
    for name, tensors in SHARDS.items():
        safetensors.numpy.save_file(tensors, tmp_path / name)
    return tmp_path


def loader_of(module, **options):
    config = LoadConfig(model_loader_extra_config=options)
    if hasattr(module, "_take_class"):  # as SGLang does before it checks the format
        path, hook, when = Hooks.registered
        assert (path.rpartition(".")[2], when) == ("_verify_load_format", "before")
        other = LoadConfig("auto")
        hook(other)
        hook(config)
        assert (other.load_format, config.load_format) == ("auto", module.DmabufModelLoader)
        return config.load_format(config)
    return module.DmabufModelLoader(config)


def check(found, prefix=""):
    """Compare every byte, and that the shards come in order."""
    expected = {
        prefix + name: value for _, part in sorted(SHARDS.items()) for name, value in part.items()
    }
    count = 0
    for name, tensor in found:
        value = expected.pop(name)
        assert tensor.array.dtype == value.dtype and tensor.array.shape == value.shape
        assert tensor.array.tobytes() == value.tobytes(), name
        count += 1
    assert count == 8 and not expected


def test_every_tensor_of_the_files_that_the_engine_chose(engine, folder):
    loader = loader_of(engine[1], require="any")
    check(loader._get_weights_iterator(Source(str(folder), "model.")), "model.")
    if engine[0] == "vllm":
        assert loader.counter_before_loading_weights > 0


def test_a_source_takes_the_place_of_the_files_that_the_engine_chooses(engine, folder, tmp_path):
    index = {"weight_map": {name: file for file, part in SHARDS.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    loader = loader_of(engine[1], source=str(folder / "model.safetensors.index.json"))
    check(loader._get_weights_iterator(Source("/nowhere")))


def test_a_file_that_is_missing_or_cut_short_ends_the_load(engine, folder):
    (folder / "model-3.safetensors").write_bytes(b"\x08")
    loader, found = loader_of(engine[1]), []
    with pytest.raises(ValueError, match="model-3"):
        for name, _ in loader._get_weights_iterator(Source(str(folder))):
            found.append(name)
    assert len(found) == 6
    (folder / "model-0.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-0"):
        list(loader._get_weights_iterator(Source(str(folder))))


def test_unknown_options_are_refused(engine):
    with pytest.raises(
        ValueError, match=r"unknown options \['fast'\]; use require, shared, source"
    ):
        loader_of(engine[1], fast=True)


@pytest.mark.parametrize("engine", ["sglang"], indirect=True)
def test_sglang_loads_the_draft_model_of_a_model(engine, folder):
    extra = {"9.draft": np.arange(5.0, dtype="<f4")}
    safetensors.numpy.save_file(extra, folder / "draft.safetensors")
    config = type("ModelConfig", (), {"hf_config": "hf"})
    loader, source = loader_of(engine[1]), Source(str(folder), "m.", model_config=config)
    assert [name for name, _ in loader._get_weights_iterator(source)][-1] == "m.9.draft"
    loader.load_config.draft_model_idx = 2
    found = [name for name, _ in loader._get_weights_iterator(source, prefetch=True)]
    assert sorted(found) == ["m.2.bias", "m.2.weight"]
