"""GGUF, NumPy, PyTorch and Arrow files in one Buffer, parsed by the library of each format.

    >>> from dmabuf import formats
    >>> loaded = formats.load("model.gguf")
    >>> loaded.content["token_embd.weight"]   # an array over the buffer's memory

The whole file is read into a Buffer by the best route, past the page cache. The format's own
library then parses it there, and the arrays, tensors or tables are made over that memory.

What may enter: readers that need a few lines beside such a library. safetensors files, of which
single tensors can be read and written, are the room `dmabuf.safetensors`.
"""

from dmabuf.formats.reading import Content, Format, Loaded, load

__all__ = ["Content", "Format", "Loaded", "load"]
