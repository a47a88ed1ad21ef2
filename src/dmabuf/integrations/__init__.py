"""Plug-ins for other programs: each makes `dmabuf` a part of a library that people already use.

`StoreFileSystem` and `DirectFileSystem` are the protocols ``dmabuf://`` and ``dmabuf+file://`` of
fsspec, which pandas, zarr and datasets open. `DmabufReader` and `DmabufWriter` are the storage of
torch.distributed.checkpoint. `vllm_loader`, `sglang_loader` and `lmcache_files` are named in the
configuration of vLLM, SGLang and LMCache, and `dmabuf.ray` registers `ray_transport`.
docs/guides/integrations.md shows each one.

What may enter this room: what another library's plug-in interface asks for, in terms of the rooms
below. The libraries themselves are never needed by any other room: a module here is loaded when one
of its names is used. Signatures are those that the other library calls, so some take keywords
that mean nothing here.
"""

TYPE_CHECKING = False  # typing's own
if TYPE_CHECKING:
    from dmabuf.integrations.checkpoint import DmabufReader, DmabufWriter
    from dmabuf.integrations.direct_files import DirectFileSystem
    from dmabuf.integrations.store_files import StoreFileSystem

__all__ = ["DirectFileSystem", "DmabufReader", "DmabufWriter", "StoreFileSystem"]

if not TYPE_CHECKING:
    _MODULES = {
        "DirectFileSystem": "direct_files",
        "DmabufReader": "checkpoint",
        "DmabufWriter": "checkpoint",
        "StoreFileSystem": "store_files",
    }

    def __getattr__(name):
        """Return a name of the face, loading its module and the other library (PEP 562)."""
        if name in _MODULES:
            from importlib import import_module

            return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
