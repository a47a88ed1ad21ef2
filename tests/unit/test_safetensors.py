"""Models into a buffer and back, by NumPy: beside the safetensors library."""

import errno
import gc
import json
import logging
import os
import stat
import sys
import warnings

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

import dmabuf
from dmabuf import safetensors as models
from dmabuf._replace import Replacement
from dmabuf._tensor_layout import UNIT
from dmabuf.file import File
from tests.resources import held
from tests.support import in_child, pattern

DTYPES = ["<f8", "<f4", "<f2", ml_dtypes.bfloat16, "<i8", "<i4", "<i2", "i1", "u1", "<u2", "<u4"]
DTYPES += ["<u8", "?", "<c8", ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]
DTYPES += [ml_dtypes.float8_e8m0fnu, ml_dtypes.float8_e4m3fnuz, ml_dtypes.float8_e5m2fnuz]


@pytest.fixture(autouse=True)
def nothing_left_behind():
    before = held()
    yield
    assert held() == before


def some(dtype, shape, seed):
    dtype = np.dtype(dtype)
    raw = np.frombuffer(pattern(int(np.prod(shape)) * dtype.itemsize, seed), "u1")
    raw = raw % 2 if dtype == np.bool_ else raw
    return raw.view(dtype).reshape(shape)


def a_model(scale=1):
    """One tensor of each dtype; some begin where their dtype would not."""
    found = {
        f"layer.{number}.{np.dtype(dtype).name}": some(dtype, (3, 5 * scale + number), number)
        for number, dtype in enumerate(DTYPES)
    }
    found["scalar"] = some("<f4", (), 98)
    found["nothing"] = some("<f8", (3, 0), 99)
    return found


def assert_equal(got, expected):
    assert got.dtype == expected.dtype and got.shape == expected.shape
    assert got.tobytes() == expected.tobytes()


@pytest.fixture
def path(tmp_path):
    """A file by the library's own writer."""
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(a_model(300), path, metadata={"format": "np"})
    return path


# -- load


@pytest.mark.parametrize("exporter", ["auto", "memfd"])
@pytest.mark.parametrize("alignment", [None, 1, 64, 4096, 1 << 16])
def test_every_tensor_has_its_bytes(path, exporter, alignment):
    model = models.load(path, framework="np", exporter=exporter, alignment=alignment)
    expected = a_model(300)
    assert set(model) == set(expected) and len(model) == len(expected)
    assert model.metadata == {"format": "np"}
    for name, value in expected.items():
        assert_equal(model[name], value)
        assert model.entries[name].offset % (alignment or value.dtype.itemsize) == 0
        assert model[name].flags.aligned and model[name].flags.writeable
        assert model.raw(name).tobytes() == value.tobytes()
    assert "layer" not in model and "scalar" in model
    with pytest.raises(KeyError):
        model["layer"]


def test_only_those_that_are_asked_for_are_read(path, monkeypatch):
    names = ["scalar", "layer.3.bfloat16", "nothing"]
    calls = []
    real = File.read_segments

    def read_segments(self, buffer, segments, **how):
        calls.append(list(segments))
        return real(self, buffer, segments, **how)

    monkeypatch.setattr(File, "read_segments", read_segments)
    model = models.load(path, tensors=iter(names), framework="np")
    assert sorted(model) == sorted(names)
    for name in names:
        assert_equal(model[name], a_model(300)[name])
    [segments] = calls
    assert sum(segments[2::3]) <= model["layer.3.bfloat16"].nbytes + 4 * UNIT
    [transfer] = model.transfers
    assert transfer.nbytes == sum(segments[2::3])
    assert model.buffer.size < os.path.getsize(path)


def test_most_of_it_goes_the_way_that_a_whole_file_goes(path):
    with dmabuf.allocate(os.path.getsize(path)) as buf, dmabuf.open(path) as file:
        whole = file.read_into(buf)
    [transfer] = models.load(path, framework="np").transfers
    assert transfer.route == whole.route
    if whole.route == "direct":
        assert transfer.copied < 2 * UNIT


def test_none_of_them(path):
    model = models.load(path, tensors=[], framework="np")
    assert len(model) == 0 and model.transfers == () and dict(model) == {}
    assert models.load(path, tensors=["nothing"], framework="np")["nothing"].shape == (3, 0)


def test_into_a_buffer_of_ones_own(path):
    with dmabuf.allocate("1MiB", exporter="memfd") as buf:
        model = models.load(path, framework="np", buffer=buf)
        assert model.buffer is buf
        assert_equal(model["scalar"], a_model(300)["scalar"])
        view = model["scalar"]
        with pytest.raises(BufferError, match="exported pointers"):
            buf.close()
        del view
    with pytest.raises(dmabuf.ClosedError):
        model["scalar"]


def test_a_buffer_that_is_too_small_is_not_touched(path):
    with dmabuf.allocate(4096, exporter="memfd") as buf:
        buf.pwrite(pattern(4096, 5), 0)
        with pytest.raises(ValueError, match=r"take \d+ bytes, and the buffer has 4096"):
            models.load(path, framework="np", buffer=buf)
        assert buf.pread(4096, 0) == pattern(4096, 5)


def test_the_buffer_lives_as_long_as_anything_over_it(path):
    before = held()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = models.load(path, framework="np")
        one = model["scalar"]
        del model
        gc.collect()
        assert held() != before
        assert_equal(one, a_model(300)["scalar"])
        del one
        assert held() == before


def test_closing_it_by_hand(path):
    before = held()
    model = models.load(path, framework="np")
    one = model["scalar"]
    with pytest.raises(BufferError, match="exported pointers"):
        model.buffer.close()
    del one
    model.buffer.close()
    assert held() == before
    assert "closed" in repr(model)


def test_load_file_is_a_dict(path):
    model = models.load_file(path, framework="np")
    assert type(model) is dict
    assert set(model) == set(a_model())
    for name, value in a_model(300).items():
        assert_equal(model[name], value)
    with pytest.raises(ValueError, match=r"on 'cpu'; \.to\(\) moves them"):
        models.load_file(path, "cuda:0", framework="np")


def test_dtypes_that_numpy_lacks(tmp_path):
    header = {
        "a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]},
        "b": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [2, 5]},
    }
    raw = json.dumps(header).encode()
    path = tmp_path / "x"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + b"abcde")
    model = models.load(path, framework="np")
    for name, expected in (("a", b"ab"), ("b", b"cde")):
        with pytest.raises(TypeError, match=r"NumPy has no F.* raw\(\) gives the bytes"):
            model[name]
        assert model.raw(name).tobytes() == expected


@pytest.mark.parametrize(
    ("how", "error", "match"),
    [
        ({"tensors": ["scalar", "none", "no"]}, KeyError, "'none', nor 1 more"),
        ({"tensors": "scalar"}, TypeError, "several names"),
        ({"framework": "tf"}, ValueError, "'pt' .PyTorch. or 'np' .NumPy."),
        ({"alignment": 3}, ValueError, "no power of two"),
        ({"alignment": 0}, ValueError, "no power of two"),
        ({"alignment": 2.0}, TypeError, "alignment must be an int"),
        ({"exporter": "none"}, ValueError, "unknown exporter"),
        ({"require": "magic"}, ValueError, "require"),
        ({"alignment": 1 << 70}, ValueError, "larger than Linux can address"),
        ({"alignment": 1 << 62}, ValueError, r"beyond 2\^64 bytes"),
        ({"buffer": bytearray(1 << 20)}, TypeError, r"a dmabuf\.Buffer is needed, not bytearray"),
    ],
)
def test_what_load_refuses(path, how, error, match):
    with pytest.raises(error, match=match):
        models.load(path, **({"framework": "np"} | how))


def test_files_that_are_none(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for target, error in [
        (tmp_path / "absent", FileNotFoundError),
        (tmp_path, FileNotFoundError),
        ("/dev/zero", OSError),
        (tmp_path / "fifo", OSError),
        ([], ValueError),
    ]:
        with pytest.raises(error):
            models.load(target, framework="np")
    os.mkdir(tmp_path / "is-a-folder.safetensors")
    with pytest.raises(OSError):
        models.load([tmp_path / "is-a-folder.safetensors"], framework="np")


def test_a_malformed_file_is_refused_before_any_is_read(path, tmp_path):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(path.read_bytes()[:-1])
    with dmabuf.allocate("1MiB", exporter="memfd") as buf:
        buf.pwrite(pattern(buf.size, 5), 0)
        with pytest.raises(ValueError, match=r"broken\.safetensors: its tensors end .* cut short"):
            models.load([path, broken], framework="np", buffer=buf)
        assert buf.pread(buf.size, 0) == pattern(buf.size, 5)


def test_a_file_that_shrinks_after_its_header_was_read(path, monkeypatch):
    real, whole = File.read_segments, path.read_bytes()

    def read_segments(self, *arguments, **how):
        os.truncate(path, 4096)
        return real(self, *arguments, **how)

    monkeypatch.setattr(File, "read_segments", read_segments)
    for tensors in (None, ["scalar", "layer.3.bfloat16"]):  # one segment, and several
        path.write_bytes(whole)
        with pytest.raises(dmabuf.ShortReadError):
            models.load(path, tensors=tensors, framework="np")


# -- shards


@pytest.fixture
def sharded(tmp_path):
    model = a_model(300)
    names = sorted(model)
    folder = tmp_path / "model"
    folder.mkdir()
    owner = {}
    for number in range(3):
        shard = f"model-{number + 1:05}-of-00003.safetensors"
        part = {name: model[name] for name in names[number::3]}
        safetensors.numpy.save_file(part, folder / shard, metadata={"format": "np"})
        owner |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": 1}, "weight_map": owner}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("how", ["folder", "index", "files"])
def test_a_sharded_model(sharded, how):
    source = {
        "folder": sharded,
        "index": sharded / "model.safetensors.index.json",
        "files": sorted(sharded.glob("*.safetensors")),
    }[how]
    model = models.load(source, framework="np")
    assert set(model) == set(a_model())
    for name, value in a_model(300).items():
        assert_equal(model[name], value)
    assert len(model.transfers) == 3


def test_a_shard_that_has_nothing_wanted_is_not_even_opened(sharded):
    names = sorted(a_model())
    for shard in list(sharded.glob("*-2-of*")) + list(sharded.glob("*00002-of*")):
        shard.unlink()
    model = models.load(sharded, tensors=[names[0], names[2]], framework="np")
    assert set(model) == {names[0], names[2]}
    with pytest.raises(FileNotFoundError, match="00002"):
        models.load(sharded, tensors=[names[1]], framework="np")
    with pytest.raises(KeyError, match="none"):
        models.load(sharded, tensors=["none"], framework="np")


def test_a_folder_with_one_file(path):
    assert set(models.load(path.parent, framework="np")) == set(a_model())


@pytest.mark.parametrize(
    ("weight_map", "match"),
    [
        ({"a": "../model.safetensors"}, "no file beside it"),
        ({"a": "/etc/passwd"}, "no file beside it"),
        ({"a": "sub/model.safetensors"}, "no file beside it"),
        ({"a": ".."}, "no file"),
        ({"a": ""}, "no file"),
        ({"a": "x\0y"}, "no file beside it"),
        ({"a": 1}, "no file beside it"),
        ({}, "no weight_map"),
        (None, "no weight_map"),
        (["a"], "no weight_map"),
        ({"absent": "model-00001-of-00003.safetensors"}, "that tensor 'absent' is in it, and it"),
    ],
)
def test_an_index_that_lies(sharded, weight_map, match):
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=match):
        models.load(sharded, framework="np")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map":{"a":"x","a":"y"}}', "{}"])
def test_an_index_that_is_none(sharded, text):
    index = sharded / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json: "):
        models.load(index, framework="np")


def test_a_name_in_two_files(path, tmp_path):
    twin = tmp_path / "twin.safetensors"
    twin.write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"is in .*model\.safetensors and in .*twin\.safetensors"):
        models.load([path, twin], framework="np")


# -- save


def test_a_file_is_the_librarys_to_the_byte(path, tmp_path):
    models.save(a_model(300), tmp_path / "ours", metadata={"format": "np"})
    assert (tmp_path / "ours").read_bytes() == path.read_bytes()


def test_from_a_buffer_and_back_again(path, tmp_path):
    model = models.load(path, framework="np")
    done = models.save(model, tmp_path / "ours", metadata=model.metadata)
    assert (tmp_path / "ours").read_bytes() == path.read_bytes()
    assert sum(one.nbytes for one in done) == os.path.getsize(path)
    with dmabuf.allocate(os.path.getsize(path)) as buf, dmabuf.open(tmp_path / "x", "w") as file:
        whole = file.write_from(buf)
    assert done[-1].route == whole.route
    if whole.route == "direct":  # the most of it, from where it was
        assert sum(one.copied for one in done) < 0.2 * os.path.getsize(path)


def test_from_here_and_there(path, tmp_path):
    model = models.load(path, framework="np")
    mixed = {
        name: value if number % 2 else np.array(value)
        for number, (name, value) in enumerate(model.items())
    }
    models.save_file(mixed, tmp_path / "ours", {"format": "np"})
    assert (tmp_path / "ours").read_bytes() == path.read_bytes()


DTYPE = st.sampled_from([np.dtype(dtype) for dtype in DTYPES])
TENSOR = st.tuples(DTYPE, st.lists(st.integers(0, 40), max_size=3), st.booleans())


@settings(max_examples=60)
@given(
    tensors=st.dictionaries(
        st.text(max_size=5).filter(lambda name: name != "__metadata__"), TENSOR, max_size=6
    ),
    gap=st.integers(0, 9),
)
def test_any_tensors_come_out_as_the_library_writes_and_reads_them(tmp_path_factory, tensors, gap):
    folder = tmp_path_factory.mktemp("any")
    path = folder / "x"
    with dmabuf.allocate("2MiB", exporter="memfd") as buf:
        given_, at = {}, 0
        for seed, (name, (dtype, shape, inside)) in enumerate(tensors.items()):
            value = some(dtype, shape, seed)
            if inside:
                given_[name] = buf.asarray(dtype, shape, at)
                given_[name][...] = value
                at += value.nbytes + gap
            else:
                given_[name] = value
        models.save(given_, path)
        assert path.read_bytes() == safetensors.numpy.save(given_)
        given_.clear()
    model = models.load(path, framework="np")
    for seed, (name, (dtype, shape, _)) in enumerate(tensors.items()):
        assert_equal(model[name], some(dtype, shape, seed))
    del model
    path.unlink()


def test_other_byte_orders_and_strides_are_written_as_they_read(tmp_path):
    big = np.arange(12, dtype=">f4").reshape(3, 4)
    given_ = {"big": big, "turned": big.T, "parts": big[::2, 1:], "one": big[1, 1]}
    models.save(given_, tmp_path / "x")
    found = safetensors.numpy.load_file(tmp_path / "x")
    assert found["big"].dtype == "<f4"
    for name, value in given_.items():
        assert np.array_equal(found[name], value) and found[name].shape == value.shape


def test_more_than_waits_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("dmabuf._tensor_save._STAGE", 2 * UNIT)
    model = a_model(2000)
    done = models.save(model, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == safetensors.numpy.save(model)
    assert len(done) > 10


@pytest.mark.parametrize(
    ("tensors", "error", "match"),
    [
        ({"a": [1, 2]}, TypeError, r"tensor 'a' is a builtins\.list"),
        ({"a": np.zeros(2, "O")}, TypeError, "which no safetensors file has"),
        ({"a": np.zeros(2, "c16")}, TypeError, "dtype complex128, which no"),
        ({"a": np.zeros(2, "M8[s]")}, TypeError, "which no safetensors file has"),
        ({"a": np.zeros(2, [("x", "<f4")])}, TypeError, "which no safetensors file has"),
        ({"a": np.zeros(2, ml_dtypes.int4)}, TypeError, "dtype int4, which no"),
        ({1: np.zeros(2)}, TypeError, "a tensor's name is text"),
        ({"__metadata__": np.zeros(2)}, ValueError, "no tensor can have the name"),
        ({"\ud800": np.zeros(2)}, ValueError, "surrogates not allowed"),
    ],
)
def test_what_save_refuses(path, tensors, error, match):
    before = path.read_bytes()
    with pytest.raises(error, match=match):
        models.save(tensors, path)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_save_knows_its_own_words(path):
    before = path.read_bytes()
    with pytest.raises(ValueError, match="require='magic': one of 'zero-copy'"):
        models.save({"a": np.zeros(2)}, path, require="magic")
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_a_failure_leaves_the_old_file_and_nothing_else(path, monkeypatch):
    before = path.read_bytes()

    def refuse(self, *arguments, **how):
        raise OSError(errno.EIO, "no more", self.name)

    for method in ("write_from", "write_segments"):
        model = models.load(path, framework="np")
        monkeypatch.setattr(File, method, refuse)
        with pytest.raises(OSError, match="no more") as error:
            models.save(model, path)
        assert error.value.filename == str(path)
        monkeypatch.undo()
        assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_it_is_on_the_medium_before_it_takes_the_name(path, monkeypatch):
    done = []
    fsync, commit = os.fsync, Replacement.commit

    def flush(fd):
        done.append(("flushed", os.fstat(fd).st_size if stat.S_ISREG(os.fstat(fd).st_mode) else 0))
        fsync(fd)

    def place(self, like, *, sync):
        done.append(("placed", sync))
        commit(self, like, sync=sync)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(Replacement, "commit", place)
    models.save({"a": np.arange(3)}, path)
    assert done == [("flushed", os.path.getsize(path)), ("placed", True), ("flushed", 0)]


def test_a_file_that_is_there_is_replaced_and_keeps_its_mode(path, tmp_path):
    path.chmod(0o640)
    (tmp_path / "link").symlink_to(path)
    with open(path, "rb") as old:
        models.save({"a": np.arange(3)}, tmp_path / "link")
        assert len(old.read()) > 1000  # whoever had it open has the old one
    assert stat.S_IMODE(path.stat().st_mode) == 0o640 and (tmp_path / "link").is_symlink()
    assert list(safetensors.numpy.load_file(path)) == ["a"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, who may not lose a device node")
def test_a_device_is_not_replaced(tmp_path):
    for target in ("/dev/null", tmp_path):
        with pytest.raises(OSError, match="no regular file to be replaced") as error:
            models.save({"a": np.arange(3)}, target)
        assert error.value.errno == errno.EINVAL
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="no regular file"):
        models.save({"a": np.arange(3)}, tmp_path / "fifo")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_no_such_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match="its directory"):
        models.save({"a": np.arange(3)}, tmp_path / "no" / "x")


def test_other_names_of_a_file_are_told_in_the_log(path, tmp_path, caplog):
    os.link(path, tmp_path / "other")
    with caplog.at_level(logging.INFO, "dmabuf"):
        models.save({"a": np.arange(3)}, path)
    assert "2 names (hard links)" in caplog.text


# -- what is not installed


@pytest.mark.parametrize(
    ("module", "framework", "command"),
    [
        ("numpy", "np", "pip install dmabuf[arrays]"),
        ("torch", "pt", "pip install torch, or take framework='np'"),
    ],
)
def test_a_module_that_is_missing(path, monkeypatch, module, framework, command):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError) as error:
        models.load(path, framework=framework)
    assert str(error.value).endswith(command)


def test_ml_dtypes_is_needed_for_its_dtypes_only(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    model = models.load(path, framework="np")
    assert_equal(model["scalar"], a_model(300)["scalar"])
    with pytest.raises(ImportError, match=r"for BF16, needs ml_dtypes .* dmabuf\[arrays\]"):
        model["layer.3.bfloat16"]


_LOADED = """
import sys
import dmabuf.safetensors
print(*sorted({name.split(".")[0] for name in sys.modules}))
"""


def test_importing_it_loads_no_library():
    loaded = set(in_child(_LOADED).split())
    assert not loaded & {"numpy", "torch", "ml_dtypes", "safetensors", "ctypes"}
