"""SGLang's loader yields the weights that dmabuf has loaded.

The package is the real one. It does not run a model on a CPU without AMX, so this ends where a
model would be filled: the plug-ins are loaded, the option and the configuration are checked, and a
loader is chosen, all by SGLang's functions.
"""

import json
import os
import subprocess
import sys

import pytest

from dmabuf.safetensors import shared_models
from dmabuf.store import connect
from tests import serving

pytest.importorskip("sglang", reason="needs sglang (make integrations-sglang installs it)")

import torch
from safetensors.torch import save_file

pytestmark = pytest.mark.timeout(900)

PROGRAM = """
import hashlib, json, sys
from sglang.srt.plugins import load_plugins
load_plugins()
import torch
from sglang.srt.arg_groups.choices import LOAD_FORMAT_CHOICES
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.model_loader.loader import get_model_loader
from sglang.srt.runtime_context import publish
from sglang.srt.server_args import ServerArgs

path = sys.argv[1]
publish(ServerArgs(path, device="cpu", skip_tokenizer_init=True), role="scheduler")
for load_format, options in json.loads(sys.argv[2]):
    assert load_format in LOAD_FORMAT_CHOICES
    config = LoadConfig(load_format=load_format, model_loader_extra_config=json.dumps(options))
    loader, found = get_model_loader(config), {}
    for name, tensor in loader._get_weights_iterator(loader.Source(path, None, prefix="model.")):
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        about = str(tensor.dtype), list(tensor.shape), hashlib.sha256(raw).hexdigest()
        assert found.setdefault(name, about) is about
    print("FOUND", type(loader).__module__, json.dumps(found))
"""
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 100,
    "max_position_embeddings": 128, "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path, owner = tmp_path_factory.mktemp("model"), {}
    (path / "config.json").write_text(json.dumps(CONFIG))
    for number in range(6):
        chance = torch.Generator().manual_seed(number)
        shard, name = f"model-{number + 1:05}-of-00006.safetensors", f"layers.{number}.weight"
        save_file({name: torch.randn(64, 301, generator=chance).bfloat16()}, path / shard)
        owner[name] = shard
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": owner}))
    return path


def run(model, *ways):
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, model, json.dumps(ways)],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )


def test_the_weights_are_those_of_the_default_loader(model, tmp_path):
    socket, index = tmp_path / "sock", model / "model.safetensors.index.json"
    with serving.in_a_thread(socket):
        done = run(
            model,
            ("auto", {}),
            ("dmabuf", {"require": "uncached"}),
            ("dmabuf", {"shared": str(socket)}),
            ("dmabuf", {"source": str(index)}),
        )
        with connect(socket) as store:
            assert len(shared_models(store)) == 6
    lines = [line.split(" ", 2)[1:] for line in done.stdout.splitlines() if "FOUND " in line]
    assert len(lines) == 4, done.stdout[-3000:] + done.stderr[-6000:]
    theirs, *ours = [(module, json.loads(found)) for module, found in lines]
    assert theirs[0] == "sglang.srt.model_loader.loader" and len(theirs[1]) == 6
    assert ours == [("dmabuf.integrations.sglang_loader", theirs[1])] * 3


def test_unknown_options_are_refused(model):
    done = run(model, ("dmabuf", {"fast": True}))
    assert done.returncode and "use require, shared, source" in done.stderr
