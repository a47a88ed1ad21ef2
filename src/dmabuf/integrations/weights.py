"""The weights of a model as the loaders of engines want them: the tensors one by one.

An engine copies each tensor into its own parameters, so the buffer of a file closes when the engine
has copied its last tensor. The next file is read meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from dmabuf.safetensors import files_of, load

OPTIONS = ("require", "shared", "source")


class Weights:
    """How to load the weights of a model: the options of a load format.

    ``require`` and ``shared`` are the arguments of `dmabuf.safetensors.load`. ``source`` is the
    model's file or index, or a list of its files, such as
    ``"dmabuf://10.0.0.5:7777/llama/model.safetensors.index.json"``.

    Raises:
        ValueError: there is no such option.
    """

    def __init__(self, options: Mapping[str, Any] | None) -> None:
        rest = dict(options or {})
        unknown = sorted(rest.keys() - set(OPTIONS))
        if unknown:
            known = ", ".join(OPTIONS)
            raise ValueError(f"load format dmabuf: unknown options {unknown}; use {known}")
        source = rest.pop("source", None)
        self.files = None if source is None else files_of(source)
        """The files to load; None for those that the engine finds."""
        self._load = partial(load, **rest)

    def tensors(self, files: Sequence[Any]) -> Iterator[tuple[str, Any]]:
        """Yield the names and tensors of files, at most two of which are in memory."""
        with ThreadPoolExecutor(1, "dmabuf weights") as thread:
            ahead = thread.submit(self._load, files[0])
            for following in [*files[1:], None]:
                tensors = ahead.result()
                if following is not None:
                    ahead = thread.submit(self._load, following)
                for name in tensors:
                    yield name, tensors[name]
                del tensors
