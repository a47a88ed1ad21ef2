"""vLLM's ``--load-format dmabuf``: the weights of a model by `dmabuf.safetensors.load`.

vLLM copies each tensor into its own parameters, so the buffer of a file closes when vLLM has
copied its last tensor. With ``shared`` the bytes are read once for all processes of the host, and
with ``source`` they come from other nodes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from time import perf_counter
from typing import Any

from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from dmabuf.safetensors import files_of, load

_OPTIONS = ("require", "shared", "source")


class DmabufModelLoader(DefaultModelLoader):  # type: ignore[misc]
    """The loader of ``--load-format dmabuf``.

    ``--model-loader-extra-config`` takes ``require`` and ``shared``, the arguments of
    `dmabuf.safetensors.load`. ``source`` is the model's file or index, or a list of its files, such
    as ``"dmabuf://10.0.0.5:7777/llama/model.safetensors.index.json"``; without it, which files a
    model has is decided as for ``--load-format safetensors``.
    """

    counter_before_loading_weights: float

    def __init__(self, load_config: LoadConfig) -> None:
        options = dict(load_config.model_loader_extra_config or {})
        unknown = sorted(options.keys() - set(_OPTIONS))
        if unknown:
            known = ", ".join(_OPTIONS)
            raise ValueError(f"load format dmabuf: unknown options {unknown}; use {known}")
        self._source = options.pop("source", None)
        self._load = partial(load, **options)
        plain = dataclasses.replace(
            load_config, load_format="safetensors", model_loader_extra_config={}
        )
        super().__init__(plain)

    def _get_weights_iterator(self, source: DefaultModelLoader.Source) -> Iterator[tuple[str, Any]]:
        if self._source is not None:
            files = files_of(self._source)
        else:
            _, files, _, _ = self._prepare_weights(
                source.model_or_path,
                source.subfolder,
                source.revision,
                source.fall_back_to_pt,
                source.allow_patterns_overrides,
            )
        self.counter_before_loading_weights = self.counter_before_loading_weights or perf_counter()
        with ThreadPoolExecutor(1, "dmabuf vllm") as thread:
            ahead = thread.submit(self._load, files[0])
            for following in [*files[1:], None]:
                tensors = ahead.result()
                if following is not None:
                    ahead = thread.submit(self._load, following)
                for name in tensors:
                    yield source.prefix + name, tensors[name]
                del tensors


def register() -> None:
    """Register the load format; vLLM calls it in each of its processes."""
    register_model_loader("dmabuf")(DmabufModelLoader)
