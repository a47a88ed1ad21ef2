"""Modules of PyTorch: saved without the second copy of tied weights, and loaded again."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from dmabuf.safetensors.files import Source
from dmabuf.safetensors.loading import load_file
from dmabuf.safetensors.saving import save_file
from dmabuf.transfer import Progress

if TYPE_CHECKING:
    import torch


def save_model(
    model: torch.nn.Module,
    filename: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    *,
    progress: Progress | None = None,
) -> None:
    """Write the tensors of a ``torch.nn.Module``: ``safetensors.torch.save_model``.

    Of tensors that are one and the same, such as tied weights, the file has the first by the order
    of the alphabet. The metadata has its name under the name of each other one. Tensors that only
    overlap are each written.

    Args:
        model: the module.
        filename: the file, which appears whole or not at all.
        metadata: text by text.
        progress: called with the bytes written and their sum.

    Raises:
        TypeError, ValueError, OSError: as `save`.
    """
    state = dict(model.state_dict())
    about = dict(metadata or {})
    for group in _ties(state):
        for name in group[1:]:
            about.setdefault(name, group[0])
            del state[name]
    save_file(state, filename, about or metadata, progress=progress)


def load_model(
    model: torch.nn.Module,
    filename: Source,
    strict: bool = True,
    device: object = "cpu",
    *,
    progress: Progress | None = None,
) -> tuple[set[str], list[str]]:
    """Copy tensors into a ``torch.nn.Module``: ``safetensors.torch.load_model``.

    A tensor that the file lacks counts as loaded if the module has it tied to one of the file. To
    have the module use the loaded memory itself, without a copy, call
    ``model.load_state_dict(load(filename), assign=True)``.

    Args:
        model: the module.
        filename: a file, or another source of `load`.
        strict: whether to raise where a name is missing or unexpected.
        device: where the tensors are loaded to first, as for `load_file`.
        progress: called with the bytes read and their sum.

    Returns:
        The names that the module has and the file lacks, and those that only the file has.

    Raises:
        RuntimeError: a name is missing or unexpected, after the others were copied; or a shape
            differs, as ``load_state_dict`` raises it.
        ValueError, KeyError, TypeError, OSError: as `load_file`.
    """
    tensors = load_file(filename, device, progress=progress)
    ties = _ties(model.state_dict())
    lacking, unexpected = model.load_state_dict(tensors, strict=False)
    missing = set(lacking)
    for group in ties:
        if not missing.issuperset(group):
            missing.difference_update(group)
    if strict and (missing or unexpected):
        text = f"load_model into {type(model).__name__}:"
        text += _listed(" missing", missing) + _listed(" unexpected", unexpected)
        raise RuntimeError(text)
    return missing, list(unexpected)


def _listed(what: str, names: Iterable[str]) -> str:
    found = sorted(names)
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    return f"{what} {', '.join(map(repr, found[:5]))}{more};" if found else ""


def _ties(state: Mapping[str, Any]) -> list[list[str]]:
    """Return the names of tensors that are one and the same, each group in order."""
    groups: dict[object, list[str]] = {}
    for name in sorted(state):
        one = state[name]
        if one.numel() and one.device.type != "meta":
            key = one.device, one.data_ptr(), one.dtype, one.shape, one.stride()
            groups.setdefault(key, []).append(name)
    return [group for group in groups.values() if len(group) > 1]
