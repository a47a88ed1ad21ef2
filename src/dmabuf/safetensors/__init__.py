"""Models in safetensors files: loaded into one Buffer, opened tensor by tensor, and saved.

    >>> from dmabuf import safetensors
    >>> model = safetensors.load("model.safetensors")
    >>> model["encoder.weight"]              # a PyTorch tensor over the buffer's memory
    >>> safetensors.save(model, "copy.safetensors")

`load_file`, `save_file`, `load_model`, `save_model` and `safe_open` take the arguments of those in
the safetensors package, which is not needed. NumPy is needed (`pip install dmabuf[arrays]`), and
PyTorch for its tensors.

What may enter: what the safetensors format defines, and where its tensors lie in files and buffers.
Moving the bytes is the work of `File.read_segments` and `File.write_segments`; arrays over memory
are that of `Buffer.asarray`. Other formats belong in packages of their own.

The modules: ``header`` (the format), ``layout`` (places in a buffer), ``files`` (the files of a
model), ``views`` (tensors over bytes), ``loading``, ``shared`` (the copy that all processes of a
host have), ``opening`` and ``slicing`` (single tensors and their parts), ``device`` (CUDA),
``saving``, ``checkpoints`` (in the background, and as shards), ``pending`` (their order), and
``modules`` (those of PyTorch).
"""

from dmabuf.safetensors.checkpoints import save_async, save_sharded
from dmabuf.safetensors.files import Source, files_of
from dmabuf.safetensors.header import Entry
from dmabuf.safetensors.loading import Tensors, load, load_file
from dmabuf.safetensors.modules import load_model, save_model
from dmabuf.safetensors.opening import SafeOpen, Slice, safe_open
from dmabuf.safetensors.pending import Saving
from dmabuf.safetensors.saving import save, save_file
from dmabuf.safetensors.shared import SharedModel, shared_models
from dmabuf.safetensors.views import Framework, Tensor

__all__ = [
    "Entry",
    "Framework",
    "SafeOpen",
    "Saving",
    "SharedModel",
    "Slice",
    "Source",
    "Tensor",
    "Tensors",
    "files_of",
    "load",
    "load_file",
    "load_model",
    "safe_open",
    "save",
    "save_async",
    "save_file",
    "save_model",
    "save_sharded",
    "shared_models",
]
