"""Stand-ins for the parts of Ray and pyarrow that `dmabuf.ray` and its modules use."""

import dataclasses
import struct
import types

from tests.unit import fake_modules


@dataclasses.dataclass
class TensorTransportMetadata:
    tensor_meta: list
    tensor_device: str


@dataclasses.dataclass
class Reference:
    """The reference of an object: where its Buffers are."""

    number: str
    metadata: TensorTransportMetadata


class Ray:
    """A driver, which fetches the objects of other processes by the transport that was registered.

    It compares shapes and types with a target as Ray does.
    """

    def __init__(self):
        self.registered = {}
        self._targets = {}

    def register_tensor_transport(self, name, devices, manager, data_type):
        if name in self.registered:
            raise ValueError(f"{name} is registered already")
        self.registered[name] = manager, devices, data_type
        self.mine = manager()

    def set_target_for_ref(self, ref, targets):
        self._targets[ref.number] = targets

    def get(self, ref):
        targets = self._targets.pop(ref.number, None)
        if targets is not None:
            for one, (shape, dtype) in zip(targets, ref.metadata.tensor_meta, strict=True):
                assert one.is_contiguous()
                if (one.shape, one.dtype) != (shape, dtype):
                    raise ValueError(f"Shape of tensor_buffer {one.shape} is not {shape}")
        known = self.mine.get_communicator_metadata(None, None)
        return self.mine.recv_multiple_tensors(ref.number, ref.metadata, known, targets)


class Datasource:
    def __init__(self):
        self.made = True


@dataclasses.dataclass
class BlockMetadata:
    num_rows: int | None
    size_bytes: int
    exec_stats: object
    input_files: tuple


@dataclasses.dataclass
class ReadTask:
    read: object
    metadata: BlockMetadata
    per_task_row_limit: int | None

    def __call__(self):
        return [row for table in self.read() for row in table]


class Array:
    @staticmethod
    def from_buffers(kind, length, buffers):
        """Return a column of values that follow one another."""
        missing, offsets, content = buffers
        assert kind == "large_binary" and missing is None
        ends = struct.unpack(f"={length + 1}q", offsets)
        return [bytes(content[ends[n] : ends[n + 1]]) for n in range(length)]


def table(columns, schema):
    """Return the rows of a table."""
    names = [name for name, _ in schema]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def install(monkeypatch):
    """Have `import ray` find it, and return the driver."""
    driver = Ray()
    fake_modules.install(
        monkeypatch, "ray", get=driver.get,
        util=types.SimpleNamespace(get_node_ip_address=lambda: "127.0.0.1"),
    )  # fmt: skip
    fake_modules.install(
        monkeypatch, "ray.experimental",
        CommunicatorMetadata=types.SimpleNamespace, TensorTransportManager=object,
        TensorTransportMetadata=TensorTransportMetadata,
        register_tensor_transport=driver.register_tensor_transport,
        set_target_for_ref=driver.set_target_for_ref,
    )  # fmt: skip
    fake_modules.install(monkeypatch, "ray.data.block", BlockMetadata=BlockMetadata)
    fake_modules.install(
        monkeypatch, "ray.data.datasource", Datasource=Datasource, ReadTask=ReadTask
    )
    fake_modules.install(
        monkeypatch, "pyarrow", Array=Array, table=table, Table=object,
        schema=list, py_buffer=memoryview, list_=lambda kind: f"list of {kind}",
        string=lambda: "string", int64=lambda: "int64", large_binary=lambda: "large_binary",
    )  # fmt: skip
    return driver
