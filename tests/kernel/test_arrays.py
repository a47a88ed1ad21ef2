"""Arrays over real dma-bufs, and models into them and back."""

import contextlib
import errno
import os

import numpy as np
import pytest
import safetensors.numpy

import dmabuf
from dmabuf import formats
from dmabuf import safetensors as models
from tests.guards import needs
from tests.kernel.conftest import BUFFERS, PINNED, heap_read_only
from tests.kernel.nvme_drive import everything
from tests.resources import held
from tests.support import assert_same, pattern, raises_errno, run

SIZE = 2 << 20  # a huge page


pytestmark = pytest.mark.usefixtures("leaves_nothing")


@everything
@pytest.mark.parametrize("kind", BUFFERS)
def test_an_array_is_the_memory(kind):
    with BUFFERS[kind](SIZE) as buffer:
        buffer.pwrite(pattern(SIZE, 1), 0)
        array = buffer.asarray()
        assert_same(array.tobytes(), pattern(SIZE, 1), "the array")
        array[:] = np.frombuffer(pattern(SIZE, 2), "u1")
        assert_same(buffer.pread(SIZE, 0), pattern(SIZE, 2), "the buffer")
        part = np.from_dlpack(buffer)[4096:8192]
        assert_same(part.tobytes(), pattern(SIZE, 2)[4096:8192], "by DLPack")
        found = dmabuf.from_dlpack(part)
        assert (found.buffer, found.offset, found.size) == (buffer, 4096, 4096)
        with pytest.raises(BufferError, match="exported pointers"):
            buffer.close()
        del array, part


@everything
@pytest.mark.parametrize("kind", BUFFERS)
def test_an_array_sees_what_a_drive_writes_and_a_drive_what_is_in_it(drive, kind):
    drive.write(pattern(SIZE, 3))
    with BUFFERS[kind](SIZE) as buffer:
        array = buffer.asarray("<u4")
        array[:] = 0xDEADBEEF
        with dmabuf.open(drive.disk, "r+") as disk:
            disk.read_into(buffer, SIZE)
            with buffer.map("r"):
                assert_same(array.tobytes(), pattern(SIZE, 3), "the array")
            with buffer.map("r+"):
                array[::2] ^= 0xFFFFFFFF
            disk.write_from(buffer, SIZE)
        expected = array.tobytes()
        assert_same(drive.read(SIZE), expected, "the drive")
        del array


@needs("dma_heap")
def test_a_read_only_dma_buf_gives_read_only_arrays():
    with heap_read_only(SIZE) as buffer:
        array, other = buffer.asarray("<u4"), np.from_dlpack(buffer)
        for one in (array, other):
            assert not one.flags.writeable
            with pytest.raises(ValueError, match="WRITEABLE"):
                one.flags.writeable = True
        assert dmabuf.from_dlpack(other).mode == "rb"
        with pytest.raises(BufferError):
            buffer.__dlpack__()
        del array, other, one


@pytest.fixture
def model():
    return {
        f"layer.{number}": np.frombuffer(pattern(50_000 + 4 * number, number), "<f4")
        for number in range(20)
    } | {"odd": np.frombuffer(pattern(13, 20), "u1"), "mask": np.ones(7, "?")}


@everything
@pytest.mark.parametrize("kind", BUFFERS)
def test_a_model_goes_in_and_out(kind, model, tmp_path):
    path, copy = tmp_path / "model.safetensors", tmp_path / "copy.safetensors"
    safetensors.numpy.save_file(model, path)
    with BUFFERS[kind](1 << 22) as buffer:
        loaded = models.load(path, buffer=buffer, framework="np")
        for name, value in model.items():
            assert_same(loaded[name].tobytes(), value.tobytes(), name)
        models.save(loaded, copy)
        assert_same(copy.read_bytes(), path.read_bytes(), "the copy")
        with dmabuf.open(path) as file:
            assert loaded.transfers[0].route == file.plan(buffer, size=1 << 20).route
        if kind in PINNED:
            assert str(loaded.transfers[0].route) == "direct"
            assert loaded.transfers[0].copied < 8192


@everything
@pytest.mark.parametrize("kind", BUFFERS)
def test_shards_and_snapshots_go_through_every_kind_of_buffer(kind, model, tmp_path):
    models.save_sharded(model, tmp_path / "shards", max_shard_size="300KiB")
    with BUFFERS[kind](1 << 22) as buffer:
        loaded = models.load(tmp_path / "shards", buffer=buffer, framework="np")
        assert len(loaded.transfers) > 3
        for name, value in model.items():
            assert_same(loaded[name].tobytes(), value.tobytes(), name)
        if kind in PINNED:
            assert {str(one.route) for one in loaded.transfers} == {"direct"}
        del loaded
        for _ in range(2):
            models.save_async(model, tmp_path / "whole", buffer=buffer).result()
            found = models.load(buffer, framework="np")  # the snapshot is the file
            for name, value in model.items():
                assert_same(found[name].tobytes(), value.tobytes(), name)
            del found
            assert (tmp_path / "whole").read_bytes() == safetensors.numpy.save(model)


@everything
@pytest.mark.parametrize("exporter", ["udmabuf", "system", "memfd"])
def test_single_tensors_slices_and_other_formats(exporter, model, tmp_path):
    safetensors.numpy.save_file(model, tmp_path / "x")
    with models.safe_open(tmp_path / "x", "np", exporter=exporter) as opened:
        for name, value in model.items():
            assert_same(opened.get_tensor(name).tobytes(), value.tobytes(), name)
        part = opened.get_slice("layer.3")[5:9000:7]
        assert_same(part.tobytes(), model["layer.3"][5:9000:7].tobytes(), "a slice")
        del part
    np.savez(tmp_path / "x.npz", **model)
    loaded = formats.load(tmp_path / "x.npz", exporter=exporter)
    assert loaded.buffer.exporter == exporter
    for name, value in model.items():
        assert_same(loaded.content[name].tobytes(), value.tobytes(), name)
    del loaded


@needs("udmabuf")
def test_a_model_lands_in_a_udmabuf_that_goes_with_its_last_tensor(model, tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(model, path)
    before = held()
    tensors = models.load(path, framework="np", name="model")
    assert tensors.buffer.exporter == "udmabuf" and tensors.buffer.is_dmabuf
    one = tensors["odd"]
    del tensors
    assert held() != before
    assert one.tobytes() == model["odd"].tobytes()
    del one
    assert held() == before
    with contextlib.suppress(KeyError):
        models.load(path, tensors=["no such"], framework="np")
    assert held() == before


@needs("root")
@pytest.mark.parametrize("inside", [True, False], ids=["in a buffer", "elsewhere"])
def test_a_full_disk_keeps_the_old_file(inside, model, tmp_path):
    whole, folder = tmp_path / "model.safetensors", tmp_path / "mnt"
    safetensors.numpy.save_file(model, whole)
    folder.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", folder)
    try:
        path = folder / "old.safetensors"
        path.write_bytes(b"old")
        tensors = models.load(whole, framework="np") if inside else model
        with raises_errno(errno.ENOSPC, filename=str(path)):
            models.save(tensors, path)
        assert path.read_bytes() == b"old" and os.listdir(folder) == [path.name]
        del tensors
    finally:
        run("umount", folder)
