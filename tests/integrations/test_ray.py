"""Buffers between actors of Ray, on one node and on two."""

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dmabuf
from tests.guards import needs
from tests.nodes import node, url_of
from tests.support import assert_same, pattern, poison, wait_until

ray = pytest.importorskip("ray", reason="needs Ray (make integrations installs it)")

from dmabuf.ray import files_source, get, model_source, use  # noqa: E402 - it needs Ray

SIZE = (9 << 20) + 4096
DATA = pattern(SIZE, 41)

use(engine="tcp", trusted_network=True)  # before the actors

pytestmark = pytest.mark.timeout(300)

# With their usual low priority the workers starve on a busy machine, and a transfer may take long.
PATIENT = {"RAY_worker_niceness": "0", "RAY_rdt_fetch_fail_timeout_milliseconds": "240000"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray on this machine."""
    os.environ |= {"RAY_AUTH_MODE": "disabled", **PATIENT}
    ray.init(
        num_cpus=4, include_dashboard=False, object_store_memory=80 << 20,
        log_to_driver=False,
    )  # fmt: skip
    try:
        yield
    finally:
        ray.shutdown()


class Storage:
    """An actor that makes Buffers."""

    def __init__(self, path: str) -> None:
        self.path = path

    @ray.method(tensor_transport="DMABUF")
    def load(self, count: int = 1) -> dict:
        with dmabuf.open(self.path) as file:
            return {index: self.read(file, index) for index in range(count)}

    @ray.method(tensor_transport="DMABUF")
    def one(self) -> dmabuf.Buffer:
        with dmabuf.open(self.path) as file:
            return self.read(file, 0)

    def read(self, file: dmabuf.File, index: int) -> dmabuf.Buffer:
        buffer = dmabuf.allocate(SIZE, exporter="memfd", name=f"ray {index}")
        file.read_into(buffer, SIZE - index, file_offset=index)
        return buffer

    def pid(self) -> int:
        return os.getpid()


class Worker:
    """An actor that gets them."""

    def content(self, buffers: dict) -> dict:
        return {index: buffer.pread(SIZE - index, 0) for index, buffer in buffers.items()}

    def pid(self) -> int:
        return os.getpid()


@pytest.fixture
def storage(cluster: None, tmp_path: Path) -> Iterator[object]:
    (tmp_path / "a.bin").write_bytes(DATA)
    made = ray.remote(enable_tensor_transport=True)(Storage).remote(str(tmp_path / "a.bin"))
    yield made
    ray.kill(made)


def buffers_of(actor: object) -> list[str]:
    """The Buffers that an actor has mapped."""
    maps = Path(f"/proc/{ray.get(actor.pid.remote())}/maps").read_text()
    return [line.split("/memfd:")[1] for line in maps.splitlines() if "/memfd:ray" in line]


def test_an_argument_arrives_at_another_actor_and_is_freed_at_both(storage: object) -> None:
    worker = ray.remote(enable_tensor_transport=True)(Worker).remote()
    ref = storage.load.remote(3)
    for _ in range(2):
        found = ray.get(worker.content.remote(ref))
        assert sorted(found) == [0, 1, 2]
        for index, content in found.items():
            assert_same(content, DATA[index:], f"buffer {index}")
    assert len(buffers_of(storage)) == 3
    del ref
    gc.collect()
    wait_until(lambda: not buffers_of(storage), "Ray to drop the object")
    ray.kill(worker)


def test_the_driver_gets_a_new_buffer_or_one_of_its_own(storage: object) -> None:
    ref = storage.one.remote()
    with ray.get(ref) as buffer:
        assert_same(buffer.pread(SIZE, 0), DATA, "a new buffer")
    with dmabuf.allocate(SIZE + 8192, exporter="memfd") as buffer:
        buffer.pwrite(poison(buffer.size), 0)
        assert get(ref, into=buffer, buffer_offset=4096, size=SIZE) is buffer
        expected = bytearray(poison(buffer.size))
        expected[4096 : 4096 + SIZE] = DATA
        assert_same(buffer.pread(buffer.size, 0), bytes(expected), "a buffer that was there")
        with pytest.raises(ValueError, match="Shape"):
            get(ref, into=buffer)


def test_an_actor_that_was_killed_gives_no_buffer(storage: object) -> None:
    ref = storage.one.remote()
    with ray.get(ref) as buffer:
        buffer.pwrite(poison(SIZE), 0)
        pid = ray.get(storage.pid.remote())
        ray.kill(storage)
        wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the end of the actor")
        with pytest.raises((OSError, ray.exceptions.RayError)):
            get(ref, into=buffer)
        assert_same(buffer.pread(SIZE, 0), poison(SIZE), "the buffer")


@pytest.fixture(params=["paths", "URLs"])
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and what its files' names begin with: its path, or the URL of a node."""
    pytest.importorskip("pyarrow", reason="needs pyarrow (make integrations installs it)")
    folder = tmp_path / "served"
    folder.mkdir()
    with node(folder, f"unix:{tmp_path}/node"):
        yield folder, str(folder) if request.param == "paths" else url_of(tmp_path / "node")


of_ray = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
"""Ray uses what it has deprecated itself."""


def rows_of(source: object) -> list[dict]:
    return ray.data.read_datasource(source, override_num_blocks=3).take_all()


@of_ray
def test_files_are_rows_of_ray_data(cluster: None, served: tuple[Path, str]) -> None:
    folder, where = served
    contents = {"a": DATA[: 3 << 20], "b": DATA[77:5000], "empty": b"", "c": DATA[: 1 << 20]}
    expected = []
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        for at in range(0, len(content) or 1, 1_000_000):
            part = content[at : at + 1_000_000]
            expected.append({"path": f"{where}/{name}", "offset": at, "bytes": part})
    source = files_source([f"{where}/{name}" for name in contents], row_size=1_000_000)
    assert source.estimate_inmemory_data_size() == sum(map(len, contents.values()))
    assert len(source.get_read_tasks(3)) == 3
    rows = rows_of(source)
    assert sorted(rows, key=str) == sorted(expected, key=str)
    with pytest.raises(FileNotFoundError):
        files_source(f"{where}/none")
    os.truncate(folder / "a", 5)
    with pytest.raises(ray.exceptions.RayTaskError, match="the file shrank meanwhile"):
        rows_of(source)


@of_ray
def test_the_tensors_of_a_model_are_rows_of_ray_data(
    cluster: None, served: tuple[Path, str]
) -> None:
    np, (folder, where) = pytest.importorskip("numpy"), served
    models = {
        "1.safetensors": {"large": np.frombuffer(DATA[:3_000_000], "u1").reshape(-1, 1000)},
        "2.safetensors": {"a": np.arange(7.0), "none": np.empty((0, 5), "f4"), "b": np.int16(5)},
    }
    expected = []
    for name, tensors in models.items():
        dmabuf.safetensors.save(tensors, folder / name)
        for key, tensor in tensors.items():
            known = {"uint8": "U8", "float64": "F64", "float32": "F32", "int16": "I16"}
            expected.append({
                "path": f"{where}/{name}", "name": key, "dtype": known[str(tensor.dtype)],
                "shape": list(tensor.shape), "bytes": tensor.tobytes(),
            })  # fmt: skip
    rows = rows_of(model_source([f"{where}/{name}" for name in models]))
    assert sorted(rows, key=str) == sorted(expected, key=str)


@needs("netns")
@pytest.mark.parametrize("engine", ["nixl", "tcp"])
def test_the_example_on_two_nodes(tmp_path: Path, engine: str) -> None:
    if engine == "nixl":
        pytest.importorskip("nixl_cu13", reason="needs NIXL (make integrations installs it)")
    (tmp_path / "a.bin").write_bytes(DATA)
    example = Path(__file__).parents[2] / "examples" / "ray_two_nodes.py"
    command = [sys.executable, example, tmp_path / "a.bin", engine]
    done = subprocess.run(command, env=os.environ | PATIENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "an argument: " in done.stdout and "its own Buffer: " in done.stdout
