"""vLLM generates the same with weights that dmabuf has loaded."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from dmabuf.safetensors import shared_models
from dmabuf.store import connect
from tests import serving
from tests.nodes import node

pytest.importorskip("vllm", reason="needs vllm (make integrations-vllm installs it)")

pytestmark = pytest.mark.timeout(900)

MODEL = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(1)
config = LlamaConfig(
    hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=4, vocab_size=2000, max_position_embeddings=256,
)
model = LlamaForCausalLM(config).to(torch.bfloat16)
model.save_pretrained(sys.argv[1], max_shard_size="2MB")
"""
GENERATE = """
import hashlib, json, sys
from vllm import LLM, SamplingParams

def weights(model):
    digest = hashlib.sha256()
    for name, value in sorted(model.named_parameters()):
        digest.update(name.encode() + value.detach().float().numpy().tobytes())
    return digest.hexdigest()

if __name__ == "__main__":
    path, load_format, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    llm = LLM(
        path, load_format=load_format, model_loader_extra_config=options, skip_tokenizer_init=True,
        enforce_eager=True, dtype="bfloat16", max_model_len=128, max_num_seqs=2,
        kv_cache_memory_bytes=64 << 20, disable_log_stats=True,
    )
    how = SamplingParams(
        temperature=0, max_tokens=24, ignore_eos=True, logprobs=3, detokenize=False
    )
    prompts = [{"prompt_token_ids": [1, 5, 900, 17, 3]}, {"prompt_token_ids": list(range(40, 80))}]
    found = []
    for one in llm.generate(prompts, how):
        output = one.outputs[0]
        chances = [{str(k): v.logprob for k, v in each.items()} for each in output.logprobs]
        found.append([list(output.token_ids), chances])
    print("FOUND", json.dumps([found, llm.apply_model(weights)]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    subprocess.run([sys.executable, "-c", MODEL, folder / "model"], check=True)
    assert len(list((folder / "model").glob("*.safetensors"))) > 3
    (folder / "generate.py").write_text(GENERATE)
    return folder


@pytest.fixture(scope="module")
def expected(model):
    """What vLLM's default loader generates, and the checksum of its parameters."""
    found = generate(model, "auto", {})
    tokens = found[0][0][0]
    assert len(tokens) == 24 and len(set(tokens)) > 5
    return found


def generate(folder, load_format, options, path="model"):
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # so that apply_model need not send its function
        "VLLM_NO_USAGE_STATS": "1",
    }
    command = [sys.executable, folder / "generate.py", folder / path, load_format]
    done = subprocess.run(
        [*command, json.dumps(options)], env=environment, capture_output=True, text=True
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert found, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads(found[0].removeprefix("FOUND "))


def test_a_generation_is_that_of_the_default_loader(model, expected):
    assert generate(model, "dmabuf", {"require": "uncached"}) == expected
    with serving.in_a_thread(model / "sock"):
        assert generate(model, "dmabuf", {"shared": str(model / "sock")}) == expected
        with connect(model / "sock") as store:
            assert len(shared_models(store)) == len(list(model.glob("model/*.safetensors")))


def test_a_machine_without_weights_generates_the_same(model, expected):
    """They come from two nodes, straight or by this machine's store."""
    (model / "bare").mkdir()
    shutil.copy(model / "model" / "config.json", model / "bare")
    folders = [model / "model", model / "copy" / "model"]
    shutil.copytree(*folders)
    with (
        node(folders[0]) as one,
        node(folders[1]) as other,
        serving.in_a_thread(model / "here.sock"),
    ):
        index = f"dmabuf://{one.address},{other.address}/model.safetensors.index.json"
        for options in ({}, {"shared": str(model / "here.sock")}):
            found = generate(model, "dmabuf", {"source": index, **options}, "bare")
            assert found == expected
        with connect(model / "here.sock") as store:
            assert len(shared_models(store)) == len(list(folders[0].glob("*.safetensors")))


def test_unknown_options_are_refused(model):
    with pytest.raises(AssertionError, match="use require, shared"):
        generate(model, "dmabuf", {"fast": True})
