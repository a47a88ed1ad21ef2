"""Models in safetensors files: loaded into one Buffer, and saved from it.

    >>> from dmabuf import safetensors
    >>> model = safetensors.load("model.safetensors")
    >>> model["encoder.weight"]              # a PyTorch tensor over the buffer's memory
    >>> safetensors.save(model, "copy.safetensors")

`load_file` and `save_file` take the arguments of those in ``safetensors.torch``. NumPy is needed
(`pip install dmabuf[arrays]`), and PyTorch for its tensors. The safetensors package is not needed.

What may enter: what the safetensors format defines, and where its tensors lie in files and buffers.
Moving the bytes is the work of `File.read_segments` and `File.write_segments`; arrays over memory
are that of `Buffer.asarray`. Other formats belong in packages of their own.

The modules: ``header`` (the format), ``layout`` (places in a buffer), ``files`` (the files of a
model), ``loading`` and ``saving``, and ``shared``, the copy that all processes of a host have.
"""

from dmabuf.safetensors.header import Entry
from dmabuf.safetensors.loading import Framework, Tensors, load, load_file
from dmabuf.safetensors.saving import save, save_file
from dmabuf.safetensors.shared import SharedModel, shared_models

__all__ = [
    "Entry",
    "Framework",
    "SharedModel",
    "Tensors",
    "load",
    "load_file",
    "save",
    "save_file",
    "shared_models",
]
