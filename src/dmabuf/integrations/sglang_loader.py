"""SGLang's ``--load-format dmabuf``: the weights of a model by `dmabuf.safetensors.load`.

SGLang's list of load formats can be extended, and its function that chooses a loader takes a class
in place of a format. Its configuration refuses formats that are not SGLang's own, so a hook of its
plug-in interface puts the class there before that check.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.model_loader.loader import DefaultModelLoader
from sglang.srt.model_loader.weight_utils import maybe_add_mtp_safetensors
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.server_args import add_load_format_choices

from dmabuf.integrations.weights import Weights


class DmabufModelLoader(DefaultModelLoader):  # type: ignore[misc]
    """The loader of ``--load-format dmabuf``.

    ``--model-loader-extra-config`` takes the options of `Weights`. Without ``source``, which files
    a model has is decided as for ``--load-format safetensors``.
    """

    load_config: LoadConfig

    def __init__(self, load_config: LoadConfig) -> None:
        self._weights = Weights(load_config.model_loader_extra_config)
        plain = dataclasses.replace(
            load_config, load_format="safetensors", model_loader_extra_config={}
        )
        super().__init__(plain)

    def _get_weights_iterator(
        self, source: DefaultModelLoader.Source, **_prefetch: object
    ) -> Iterator[tuple[str, Any]]:
        found = self._weights.tensors(self._weights.files or self._files_of(source))
        draft = self.load_config.draft_model_idx
        if draft is not None:
            return self._filter_mtp_weights(found, source.prefix, draft)  # type: ignore[no-any-return]
        return ((source.prefix + name, tensor) for name, tensor in found)

    def _files_of(self, source: DefaultModelLoader.Source) -> list[str]:
        folder, files, _ = self._prepare_weights(
            source.model_or_path,
            source.revision,
            source.fall_back_to_pt,
            source.allow_patterns_overrides,
        )
        if source.model_config is not None:
            index = "model.safetensors.index.json"
            files = maybe_add_mtp_safetensors(files, folder, index, source.model_config.hf_config)
        return list(files)


def _take_class(load_config: LoadConfig) -> None:
    if load_config.load_format == "dmabuf":
        load_config.load_format = DmabufModelLoader


def register() -> None:
    """Register the load format; SGLang calls it in each of its processes."""
    add_load_format_choices(["dmabuf"])
    check = "sglang.srt.configs.load_config.LoadConfig._verify_load_format"
    HookRegistry.register(check, _take_class, HookType.BEFORE)
