"""vLLM's ``--load-format dmabuf``: the weights of a model by `dmabuf.safetensors.load`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from time import perf_counter
from typing import Any

from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from dmabuf.integrations.weights import Weights


class DmabufModelLoader(DefaultModelLoader):  # type: ignore[misc]
    """The loader of ``--load-format dmabuf``.

    ``--model-loader-extra-config`` takes the options of `Weights`. Without ``source``, which files
    a model has is decided as for ``--load-format safetensors``.
    """

    counter_before_loading_weights: float

    def __init__(self, load_config: LoadConfig) -> None:
        self._weights = Weights(load_config.model_loader_extra_config)
        plain = dataclasses.replace(
            load_config, load_format="safetensors", model_loader_extra_config={}
        )
        super().__init__(plain)

    def _get_weights_iterator(self, source: DefaultModelLoader.Source) -> Iterator[tuple[str, Any]]:
        files = self._weights.files
        if files is None:
            _, files, _, _ = self._prepare_weights(
                source.model_or_path,
                source.subfolder,
                source.revision,
                source.fall_back_to_pt,
                source.allow_patterns_overrides,
            )
        self.counter_before_loading_weights = self.counter_before_loading_weights or perf_counter()
        for name, tensor in self._weights.tensors(files):
            yield source.prefix + name, tensor


def register() -> None:
    """Register the load format; vLLM calls it in each of its processes."""
    register_model_loader("dmabuf")(DmabufModelLoader)
