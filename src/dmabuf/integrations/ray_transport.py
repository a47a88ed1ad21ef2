"""The tensor transport "DMABUF" of Ray, which `dmabuf.ray` registers: Buffers by `dmabuf.remote`.

The process that returns a Buffer serves it as a node; who gets the object is a client of that node.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import ray
from ray.experimental import (
    CommunicatorMetadata,
    TensorTransportManager,
    TensorTransportMetadata,
)

from dmabuf import remote
from dmabuf.memory import Buffer, allocate
from dmabuf.remote import Certificates, Lending, Node, certificates_from_environment

NAME = "DMABUF"
_TYPE = "uint8"


class Settings(NamedTuple):
    """The arguments of `dmabuf.ray.use`."""

    engine: Literal["auto", "tcp", "nixl"] = "auto"
    certificates: Certificates | None = None
    trusted_network: bool = False
    timeout: float = 30.0


class Place:
    """A range of a Buffer, with what Ray compares with the object."""

    dtype = _TYPE

    def __init__(self, buffer: Buffer, start: int, size: int) -> None:
        self.buffer, self.start, self.shape = buffer, start, (size,)

    def is_contiguous(self) -> bool:
        """Return whether the bytes follow one another."""
        return True


@dataclass
class _Metadata(TensorTransportMetadata):  # type: ignore[misc]
    """Where a reference's Buffers are served, and under which names."""

    address: str = ""
    names: Sequence[str] = ()


class BufferTransport(TensorTransportManager):  # type: ignore[misc]
    """What Ray calls in each process of the transport; a subclass has other settings."""

    settings = Settings()

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lending = Lending()
        self._serving = ExitStack()
        self._address = ""
        self._nodes: dict[str, Node] = {}

    def tensor_transport_backend(self) -> str:
        """Return the name of the transport."""
        return NAME

    @staticmethod
    def is_one_sided() -> bool:
        """Return that the receiver fetches, and the sender's threads serve it."""
        return True

    @staticmethod
    def can_abort_transport() -> bool:
        """Return that no transfer needs to be aborted: `timeout` limits its waiting."""
        return True

    def abort_transport(self, obj_id: str, communicator_metadata: CommunicatorMetadata) -> None:
        """Do nothing; see `can_abort_transport`."""

    def actor_has_tensor_transport(self, actor: Any) -> bool:
        """Return that an actor has it: Ray sends it to each that this process creates."""
        return True

    def get_communicator_metadata(
        self, src_actor: Any, dst_actor: Any, backend: str | None = None
    ) -> CommunicatorMetadata:
        """Return nothing: the metadata of an object is enough."""
        return CommunicatorMetadata()

    def send_multiple_tensors(
        self,
        tensors: list[Any],
        tensor_transport_metadata: TensorTransportMetadata,
        communicator_metadata: CommunicatorMetadata,
    ) -> None:
        """Do nothing: the receiver fetches."""

    def extract_tensor_transport_metadata(self, obj_id: str, rdt_object: list[Buffer]) -> _Metadata:
        """Serve the Buffers of an object, and return where."""
        names = [f"{obj_id}.{index}" for index in range(len(rdt_object))]
        for name, buffer in zip(names, rdt_object, strict=True):
            buffer.closes_unasked = True  # when Ray drops it
            self._lending.add(name, buffer)
        meta = [((buffer.size,), _TYPE) for buffer in rdt_object]
        return _Metadata(meta, "cpu", self._listen(), names)

    def _listen(self) -> str:
        with self._lock:
            if not self._address:
                known, ip = self.settings, ray.util.get_node_ip_address()
                certificates = known.certificates
                if certificates is None and not known.trusted_network:
                    certificates = certificates_from_environment()
                listener = self._serving.enter_context(
                    remote.serving(
                        f"[{ip}]:0" if ":" in ip else f"{ip}:0",
                        store=self._lending,
                        certificates=certificates,
                        trusted_network=known.trusted_network,
                    )
                )
                self._address = listener.address
            return self._address

    def garbage_collect(
        self, obj_id: str, tensor_transport_meta: TensorTransportMetadata, tensors: list[Any]
    ) -> None:
        """Serve the Buffers of an object no more."""
        for index in range(len(tensors)):
            self._lending.remove(f"{obj_id}.{index}")

    def recv_multiple_tensors(
        self,
        obj_id: str,
        tensor_transport_metadata: TensorTransportMetadata,
        communicator_metadata: CommunicatorMetadata,
        target_buffers: list[Any] | None = None,
    ) -> list[Buffer]:
        """Fetch the Buffers of an object into new ones, or into the places of `get`."""
        meta = tensor_transport_metadata
        node, places = self._node(meta.address), list[Place](target_buffers or ())
        with ExitStack() as stack:
            if not places:
                for (size,), _ in meta.tensor_meta:
                    made = stack.enter_context(allocate(size))
                    made.closes_unasked = True
                    places.append(Place(made, 0, size))
            for name, place in zip(meta.names, places, strict=True):
                try:
                    node.fetch(name, place.buffer, buffer_offset=place.start)
                finally:
                    node.revoke(place.buffer)
            stack.pop_all()
        return [place.buffer for place in places]

    def _node(self, address: str) -> Node:
        with self._lock:
            node = self._nodes.get(address)
            if node is None or node.closed:
                known = self.settings
                node = self._nodes[address] = remote.connect(
                    address,
                    engine=known.engine,
                    certificates=known.certificates,
                    trusted_network=known.trusted_network,
                    timeout=known.timeout,
                )
            return node
