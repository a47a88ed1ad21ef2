"""`dmabuf.ray` over stand-ins for Ray and pyarrow; tests/integrations/test_ray.py has them."""

import contextlib
import errno
import os

import numpy as np
import pytest

import dmabuf
from dmabuf import ray as dmabuf_ray
from tests.nodes import node, url_of
from tests.support import assert_same, pattern, poison, raises_errno
from tests.unit import fake_modules, fake_ray

SIZE = (1 << 20) + 4096
DATA = pattern(SIZE, 41)

pytestmark = pytest.mark.usefixtures("leaves_nothing")


@pytest.fixture
def driver(monkeypatch):
    """Ray's driver. Its process is this one, as is that of the actor."""
    names = [f"dmabuf.integrations.ray_{name}" for name in ("transport", "files")]
    fake_modules.forget(*names)
    yield fake_ray.install(monkeypatch)
    fake_modules.forget(*names)


@contextlib.contextmanager
def ended(*transports):
    """End what the processes of these transports would hold until they end."""
    try:
        yield
    finally:
        for one in transports:
            for there in one._nodes.values():
                there.close()
            one._serving.close()


@pytest.fixture
def actor(driver):
    """The transport in another process, which has Buffers."""
    dmabuf_ray.use(engine="tcp", trusted_network=True)
    made = driver.registered["DMABUF"][0]()
    with ended(driver.mine, made):
        yield made


def reference(actor, *contents, number="7f"):
    """What an actor returns: Buffers with these contents, of whole pages."""
    buffers = []
    for content in contents:
        buffers.append(dmabuf.allocate(len(content), exporter="memfd"))
        buffers[-1].pwrite(content, 0)
    metadata = actor.extract_tensor_transport_metadata(number, buffers)
    assert metadata.tensor_meta == [((len(content),), "uint8") for content in contents]
    return fake_ray.Reference(number, metadata), buffers


def test_the_transport_is_registered_once_for_buffers(driver):
    dmabuf_ray.use(trusted_network=True, timeout=5)
    dmabuf_ray.use(timeout=7)
    [(name, (manager, devices, kind))] = driver.registered.items()
    assert (name, devices, kind) == ("DMABUF", ["cpu"], dmabuf.Buffer)
    assert manager.settings == ("auto", None, True, 5)
    with ended(driver.mine):
        assert driver.mine.tensor_transport_backend() == "DMABUF"
        assert manager.is_one_sided() and manager.can_abort_transport()
        assert driver.mine.actor_has_tensor_transport(None)
        driver.mine.abort_transport("7f", None)
        driver.mine.send_multiple_tensors([], None, None)


def test_an_object_arrives_in_new_buffers(driver, actor):
    contents = [DATA, DATA[77 : 77 + 8192], DATA[:4096]]
    ref, buffers = reference(actor, *contents)
    for _ in range(2):
        found = driver.get(ref)
        assert len(found) == 3
        for got, content in zip(found, contents, strict=True):
            with got:
                assert_same(got.pread(len(content), 0), content, "a new buffer")
    actor.garbage_collect("7f", ref.metadata, buffers)
    with raises_errno(errno.ENOENT, "no buffer has this name"):
        driver.get(ref)
    for one in buffers:
        one.close()


def test_an_object_arrives_in_a_range_of_a_buffer(driver, actor):
    ref, [source] = reference(actor, DATA)
    expected = poison(4096) + DATA + poison(SIZE + 8192)[4096 + SIZE :]
    with source, dmabuf.allocate(SIZE + 8192, exporter="memfd") as buffer:
        buffer.pwrite(poison(buffer.size), 0)
        got = dmabuf_ray.get(ref, buffer, buffer_offset=4096, size=SIZE)
        assert got is buffer
        assert_same(buffer.pread(buffer.size, 0), expected, "the buffer")
        with pytest.raises(ValueError, match="Shape"):
            dmabuf_ray.get(ref, buffer)
        with pytest.raises(ValueError, match="ends past the buffer"):
            dmabuf_ray.get(ref, buffer, buffer_offset=buffer.size, size=SIZE)
        assert_same(buffer.pread(buffer.size, 0), expected, "the buffer after refusals")


def test_an_actor_that_has_ended_gives_no_buffer(driver, actor):
    ref, [source] = reference(actor, DATA)
    with source, dmabuf.allocate(SIZE, exporter="memfd") as buffer:
        dmabuf_ray.get(ref, buffer)
        buffer.pwrite(poison(SIZE), 0)
        actor._serving.close()
        for _ in range(2):  # by the connection that ended, and by a new one
            with pytest.raises(OSError):
                dmabuf_ray.get(ref, buffer)
        with pytest.raises(OSError):
            driver.get(ref)
        assert_same(buffer.pread(SIZE, 0), poison(SIZE), "the buffer")


@pytest.fixture(params=["paths", "URLs"])
def served(request, driver, tmp_path):
    """A folder, and what its files' names begin with: its path, or the URL of a node."""
    folder = tmp_path / "served"
    folder.mkdir()
    with node(folder, f"unix:{tmp_path}/node"):
        yield folder, str(folder) if request.param == "paths" else url_of(tmp_path / "node")


def test_files_are_rows(served):
    folder, where = served
    contents = {"a": DATA, "b": DATA[77:5000], "empty": b"", "c": DATA[: 1 << 19]}
    expected = []
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        for at in range(0, len(content) or 1, 300_000):
            part = content[at : at + 300_000]
            expected.append({"path": f"{where}/{name}", "offset": at, "bytes": part})
    source = dmabuf_ray.files_source([f"{where}/{name}" for name in contents], row_size=300_000)
    assert source.get_name() == "DmabufFiles" and source.made
    assert source.estimate_inmemory_data_size() == sum(map(len, contents.values()))
    for parallelism in (0, 1, 3, 100):
        tasks = source.get_read_tasks(parallelism, 5)
        assert len(tasks) <= max(parallelism, 1)
        assert [row for task in tasks for row in task()] == expected
        assert sum(task.metadata.size_bytes for task in tasks) == sum(map(len, contents.values()))
        assert {task.per_task_row_limit for task in tasks} == {5}
        for task in tasks:
            assert set(task.metadata.input_files) == {row["path"] for row in task()}
    os.truncate(folder / "a", 5)
    with pytest.raises(dmabuf.ShortReadError, match="shrank"):
        tasks[0]()


def test_the_tensors_of_a_model_are_rows(served):
    folder, where = served
    models = {
        "1.safetensors": {"large": np.frombuffer(DATA[:300_000], "u1").reshape(-1, 1000)},
        "2.safetensors": {"a": np.arange(7.0), "none": np.empty((0, 5), "f4")},
    }
    known, expected = {"uint8": "U8", "float64": "F64", "float32": "F32"}, []
    for name, tensors in models.items():
        dmabuf.safetensors.save(tensors, folder / name)
        for key, tensor in tensors.items():
            expected.append({
                "path": f"{where}/{name}", "name": key, "dtype": known[str(tensor.dtype)],
                "shape": list(tensor.shape), "bytes": tensor.tobytes(),
            })  # fmt: skip
    tasks = dmabuf_ray.model_source([f"{where}/{name}" for name in models]).get_read_tasks(2)
    rows = [{**row, "shape": list(row["shape"])} for task in tasks for row in task()]
    assert sorted(rows, key=str) == sorted(expected, key=str)


def test_invalid_sources_are_refused(served):
    with pytest.raises(FileNotFoundError):
        dmabuf_ray.files_source(f"{served[1]}/none")
    with pytest.raises(ValueError, match="invalid row_size 0"):
        dmabuf_ray.files_source(f"{served[1]}/none", row_size=0)
