"""Files and Buffers in other processes: sent by multiprocessing, and after a fork."""

import errno
import multiprocessing
import multiprocessing.resource_sharer
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import dmabuf
from tests import forking
from tests.guards import needs

ROOT = Path(__file__).parents[2]
SIZE = 1 << 16


def send(*arguments):
    """Run the program, which leaves processes of multiprocessing behind that end with it."""
    program = [sys.executable, "-W", "ignore", "-m", "tests.unit.sending", *arguments]
    subprocess.run(program, cwd=ROOT, check=True, timeout=110)


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_multiprocessing_sends_files_and_buffers(path, method):
    send("processes", method, path)


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_a_task_of_a_pool_raises_where_its_file_cannot_be_opened(path, method):
    send("pool", method, path)


@needs("torch")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_data_loader_with_workers_reads_one_file(path, method):
    send("loader", method, path)


def sent(thing):
    """What another process makes of it, here."""
    return pickle.loads(multiprocessing.reduction.ForkingPickler.dumps(thing))


@pytest.mark.parametrize("with_memfd", [True, False])
def test_a_buffer_of_several_slabs_is_sent(kernel, with_memfd):
    kernel.limit = 4096
    with dmabuf.allocate(4 * 4096, exporter="udmabuf") as buffer:
        memfd = buffer.memfd
        if not with_memfd:  # as with dma-bufs that were made elsewhere
            buffer.memfd = None
        with sent(buffer) as again:
            assert [slab[1:] for slab in again.slabs] == [slab[1:] for slab in buffer.slabs]
            assert len(again.slabs) == 4 and again.is_dmabuf and again.exporter == "udmabuf"
            assert (again.pin_refusal is None) == with_memfd  # whether the direct route remains
            if with_memfd:
                again.pwrite(b"back", 4096)
                assert buffer.pread(4, 4096) == b"back"
        buffer.memfd = memfd
    multiprocessing.resource_sharer.stop()


def test_a_file_is_sent_by_its_path_and_checked(path, buf, tmp_path):
    with dmabuf.open(path) as file:
        with sent(file) as other:
            assert other.read_into(buf).nbytes == SIZE
        (tmp_path / "new").write_bytes(b"")
        os.rename(path, tmp_path / "old")
        os.rename(tmp_path / "new", path)
        other = sent(sent(sent(file)))
        for _ in range(2):
            with pytest.raises(OSError, match="the path is another file's now") as error:
                other.read_into(buf)
            assert error.value.errno == errno.ESTALE and error.value.filename == str(path)
        os.rename(tmp_path / "old", path)
        assert other.read_into(buf).nbytes == SIZE
        other.close()
    for closed in (file, other):
        with pytest.raises(dmabuf.ClosedError):
            sent(closed)


def test_a_file_without_a_path_is_not_sent(path):
    read, write = os.pipe()
    with path.open() as given, dmabuf.Engine() as engine:
        for what in (
            dmabuf.open(given.fileno()),
            dmabuf.open(write, "w"),
            dmabuf.open(path, engine=engine),
        ):
            with what, pytest.raises(TypeError, match="open it there"):
                sent(what)
    os.close(read)
    os.close(write)


def test_a_file_after_a_fork(path, buf, tmp_path):
    def child():
        for _ in range(2):
            assert kept.read_into(buf).nbytes == SIZE
        assert kept.size == SIZE and kept.fileno() >= 0
        kept.close()
        assert kept.closed and repr(kept)
        with pytest.raises(FileNotFoundError):
            gone.read_into(buf)
        gone.close()

    with dmabuf.open(path) as kept, dmabuf.open(tmp_path / "other", "x") as gone:
        kept.read_into(buf)
        (tmp_path / "other").unlink()
        forking.in_child(child)
        assert kept.read_into(buf).nbytes == SIZE
        assert gone.write_from(buf, 5).nbytes == 5


def test_a_file_explains_what_it_is_not(path):
    with dmabuf.open(path) as file:
        for name in ("read", "write", "seek", "flush", "readlines", "peek", "pread"):
            with pytest.raises(AttributeError, match=r"no '\w+'; use read_into\(\) and write_from"):
                getattr(file, name)
        assert not hasattr(file, "nothing")
