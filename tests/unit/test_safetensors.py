"""Models into a buffer and back, by NumPy, beside the safetensors package."""

import errno
import gc
import itertools
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
from dmabuf.transfer.engine import default_engine
from tests.resources import held
from tests.support import PAGE, in_child, pattern

pytestmark = pytest.mark.usefixtures("leaves_nothing")

DTYPES = ["<f8", "<f4", "<f2", ml_dtypes.bfloat16, "<i8", "<i4", "<i2", "i1", "u1", "<u2", "<u4"]
DTYPES += ["<u8", "?", "<c8", ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]
DTYPES += [ml_dtypes.float8_e8m0fnu, ml_dtypes.float8_e4m3fnuz, ml_dtypes.float8_e5m2fnuz]
UNIT = max(PAGE, 4096)


def some(dtype, shape, seed):
    dtype = np.dtype(dtype)
    raw = np.frombuffer(pattern(int(np.prod(shape)) * dtype.itemsize, seed), "u1")
    raw = raw % 2 if dtype == np.bool_ else raw
    return raw.view(dtype).reshape(shape)


def make_model(scale=1):
    """One tensor of each dtype; some do not begin at a multiple of their size."""
    found = {
        f"layer.{number}.{np.dtype(dtype).name}": some(dtype, (3, 5 * scale + number), number)
        for number, dtype in enumerate(DTYPES)
    }
    found["scalar"] = some("<f4", (), 98)
    found["nothing"] = some("<f8", (3, 0), 99)
    return found


MODEL = make_model(300)


def assert_equal(got, expected):
    assert got.dtype == expected.dtype and got.shape == expected.shape
    assert got.tobytes() == expected.tobytes()


def load(source, **how):
    return models.load(source, framework="np", **how)


@pytest.fixture
def path(tmp_path):
    """A file by the package's own writer."""
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(MODEL, path, metadata={"format": "np"})
    return path


@pytest.fixture(scope="module", autouse=True)
def two_rings():
    """The default engine makes its second ring when two threads write at once, and keeps it."""
    engine = default_engine()
    with engine._rings[0].lock:
        engine._pick_ring()


# -- load


@pytest.mark.parametrize("exporter", ["auto", "memfd"])
@pytest.mark.parametrize("alignment", [None, 1, np.int8(64), "4KiB", 1 << 16])
def test_every_tensor_has_its_bytes(path, exporter, alignment):
    model = load(path, exporter=exporter, alignment=alignment)
    assert set(model) == set(MODEL) and len(model) == len(MODEL)
    assert model.metadata == {"format": "np"}
    least = 4096 if alignment == "4KiB" else int(alignment or 0)
    for name, value in MODEL.items():
        assert_equal(model[name], value)
        assert model.entries[name].offset % (least or value.dtype.itemsize) == 0
        assert model[name].flags.aligned and model[name].flags.writeable
        assert model.raw(name).tobytes() == value.tobytes()
    assert "layer" not in model and "scalar" in model
    with pytest.raises(KeyError):
        model["layer"]


ALIGNMENTS = st.sampled_from([None, 1, 64, 512, UNIT, 4 * UNIT])
SIZES = st.sampled_from([0, 1, 7, 8, 24, UNIT - 1, UNIT, 3 * UNIT + 5])


@settings(max_examples=150)
@given(
    files=st.lists(
        st.lists(st.tuples(st.sampled_from(["u1", "<u2", "<u8"]), SIZES, st.booleans())),
        min_size=1,
        max_size=3,
    ),
    alignment=ALIGNMENTS,
    padding=st.integers(0, 9),
)
def test_any_tensors_of_any_files_are_whole_apart_and_aligned(
    tmp_path_factory, files, alignment, padding
):
    folder = tmp_path_factory.mktemp("layout")
    wanted, paths, most = {}, [], 0
    for number, tensors in enumerate(files):
        about, data = {}, b""
        for seed, (dtype, count, _) in enumerate(tensors):
            raw = pattern(np.dtype(dtype).itemsize * count, seed)
            key = {"u1": "U8", "<u2": "U16", "<u8": "U64"}[dtype]
            offsets = [len(data), len(data) + len(raw)]
            about[f"{number}.{seed}"] = {"dtype": key, "shape": [count], "data_offsets": offsets}
            data += raw
        header = json.dumps(about).encode() + b" " * padding
        paths.append(folder / str(number))
        paths[-1].write_bytes(len(header).to_bytes(8, "little") + header + data)
        pages = set()
        for seed, (dtype, count, taken) in enumerate(tensors):
            if taken:
                name = f"{number}.{seed}"
                begin, end = (8 + len(header) + at for at in about[name]["data_offsets"])
                wanted[name] = np.frombuffer(data, dtype, count, begin - 8 - len(header))
                pages |= set(range(begin // UNIT, -(-end // UNIT))) if begin < end else set()
        most += len(pages) * UNIT
    model = load(paths, tensors=wanted, alignment=alignment)
    assert set(model) == set(wanted)
    ends = sorted((one.offset, one.offset + one.nbytes) for one in model.entries.values())
    ends = [pair for pair in ends if pair[0] < pair[1]]
    assert all(this[1] <= after[0] for this, after in itertools.pairwise(ends))
    for name, value in wanted.items():
        assert_equal(model[name], value)
        assert model.entries[name].offset % max(alignment or 1, value.itemsize) == 0
    apart = sum(value.nbytes for value in wanted.values())  # of those that are shifted
    assert sum(one.nbytes for one in model.transfers) <= most + apart
    del model
    for one in paths:
        one.unlink()


def test_an_aligned_file_is_one_range_from_its_first_page_on(tmp_path):
    tensors = {f"{number}": some("<f4", (250,), number) for number in range(100)}
    safetensors.numpy.save_file(tensors, tmp_path / "x")
    model = load(tmp_path / "x")
    header = os.path.getsize(tmp_path / "x") - 100_000
    assert sorted(one.offset for one in model.entries.values()) == [
        header % UNIT + 1000 * number for number in range(100)
    ]
    [transfer] = model.transfers
    assert transfer.nbytes == os.path.getsize(tmp_path / "x") - header // UNIT * UNIT


def test_only_the_pages_of_wanted_tensors_are_read(path):
    names = ["scalar", "layer.3.bfloat16", "nothing"]
    model = load(path, tensors=iter(names))
    assert sorted(model) == sorted(names)
    for name in names:
        assert_equal(model[name], MODEL[name])
    [transfer] = model.transfers
    assert transfer.nbytes <= MODEL["layer.3.bfloat16"].nbytes + 4 * UNIT
    assert model.buffer.size < os.path.getsize(path)


def test_the_route_is_that_of_a_whole_file(path):
    with dmabuf.allocate(os.path.getsize(path)) as buf, dmabuf.open(path) as file:
        whole = file.read_into(buf)
    [transfer] = load(path).transfers
    assert transfer.route == whole.route
    if whole.route == "direct":
        assert transfer.copied < 2 * UNIT


def test_no_tensor_is_wanted(path):
    model = load(path, tensors=[])
    assert len(model) == 0 and model.transfers == () and dict(model) == {}
    assert load(path, tensors=["nothing"])["nothing"].shape == (3, 0)


def test_a_given_buffer(path):
    with dmabuf.allocate("1MiB", exporter="memfd") as buf:
        model = load(path, buffer=buf)
        assert model.buffer is buf
        view = model["scalar"]
        assert_equal(view, MODEL["scalar"])
        with pytest.raises(BufferError, match="exported pointers"):
            buf.close()
        del view
    with pytest.raises(dmabuf.ClosedError):
        model["scalar"]


def test_a_refusal_leaves_a_given_buffer_as_it_was(path, tmp_path):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(path.read_bytes()[:-1])
    for size, source, match in [
        (4096, path, r"need \d+ bytes, the buffer has 4096"),
        (1 << 20, [path, broken], r"broken\.safetensors: its tensors end .* cut short"),
    ]:
        with dmabuf.allocate(size, exporter="memfd") as buf:
            buf.pwrite(pattern(size, 5), 0)
            with pytest.raises(ValueError, match=match):
                load(source, buffer=buf)
            assert buf.pread(size, 0) == pattern(size, 5)


def test_the_buffer_lives_as_long_as_anything_over_it(path):
    before = held()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load(path)
        one, other = model["scalar"], model["layer.1.float32"]
        del model
        gc.collect()
        assert held() != before
        assert_equal(one, MODEL["scalar"])
        del one
        assert held() != before
        assert_equal(other, MODEL["layer.1.float32"])
        del other
        assert held() == before


def test_closing_the_buffer_by_hand(path):
    before = held()
    model = load(path)
    one = model["scalar"]
    with pytest.raises(BufferError, match="exported pointers"):
        model.buffer.close()
    del one
    model.buffer.close()
    assert held() == before
    assert "closed" in repr(model)


def test_load_file_returns_a_dict(path):
    model = models.load_file(path, framework="np")
    assert type(model) is dict and set(model) == set(MODEL)
    for name, value in MODEL.items():
        assert_equal(model[name], value)
    with pytest.raises(ValueError, match="for NumPy's arrays: use framework='pt'"):
        models.load_file(path, "cuda:0", framework="np")


@pytest.mark.parametrize(
    ("how", "error", "match"),
    [
        ({"tensors": ["scalar", "none", "no"]}, KeyError, "'none' .and 1 more."),
        ({"tensors": "scalar"}, TypeError, "several names"),
        ({"framework": "tf"}, ValueError, "'pt' .PyTorch. or 'np' .NumPy."),
        ({"alignment": 3}, ValueError, "use a power of two"),
        ({"alignment": 0}, ValueError, "use a power of two"),
        ({"alignment": 2.0}, TypeError, "alignment must be an int"),
        ({"exporter": "none"}, ValueError, "invalid exporter"),
        ({"require": "magic"}, ValueError, "require"),
        ({"alignment": 1 << 70}, ValueError, "use at most"),
        ({"alignment": 1 << 62}, ValueError, r"beyond 2\^64 bytes"),
        ({"buffer": bytearray(1 << 20)}, TypeError, r"must be a dmabuf\.Buffer, not bytearray"),
    ],
)
def test_what_load_refuses(path, how, error, match):
    with pytest.raises(error, match=match):
        models.load(path, **({"framework": "np"} | how))


def test_a_file_that_changes_after_its_header_was_read(path, monkeypatch):
    """Its second opening is that of the transfer."""
    real = os.open

    def change(name, *arguments, **how):
        if str(name) == str(path):
            os.truncate(path, 4096)
        return real(name, *arguments, **how)

    monkeypatch.setattr(os, "open", change)
    with pytest.raises((ValueError, dmabuf.ShortReadError), match=r"model\.safetensors: it "):
        load(path)


# -- files and shards


@pytest.fixture
def sharded(tmp_path):
    names = sorted(MODEL)
    folder = tmp_path / "model"
    folder.mkdir()
    owner = {}
    for number in range(3):
        shard = f"model-{number + 1:05}-of-00003.safetensors"
        part = {name: MODEL[name] for name in names[number::3]}
        safetensors.numpy.save_file(part, folder / shard, metadata={"format": "np"})
        owner |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": 1}, "weight_map": owner}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("how", ["folder", "index", "files", "bytes", "twice"])
def test_a_sharded_model(sharded, how):
    files = sorted(sharded.glob("*.safetensors"))
    source = {
        "folder": sharded,
        "index": sharded / "model.safetensors.index.json",
        "files": tuple(files),
        "bytes": [os.fsencode(one) for one in files],
        "twice": [*files, sharded / "." / ".." / "model" / files[0].name, str(files[1])],
    }[how]
    model = load(source)
    assert set(model) == set(MODEL)
    for name, value in MODEL.items():
        assert_equal(model[name], value)
    assert len(model.transfers) == 3


def test_a_shard_without_a_wanted_tensor_is_not_opened(sharded):
    names = sorted(MODEL)
    for shard in sharded.glob("*00002-of*"):
        shard.unlink()
    model = load(sharded, tensors=[names[0], names[2]])
    assert set(model) == {names[0], names[2]}
    with pytest.raises(FileNotFoundError, match="00002"):
        load(sharded, tensors=[names[1]])
    with pytest.raises(KeyError, match="none"):
        load(sharded, tensors=["none"])


_SHARDS = """
import json, resource, sys
import numpy as np
import safetensors.numpy
from dmabuf import safetensors as models
folder, count, map = sys.argv[1], int(sys.argv[2]), {}
content = lambda number: np.full(1000 + number % 7, number, "<u4")
for number in range(count):
    map[f"{number}"] = f"{number}.safetensors"
    with open(f"{folder}/{number}.safetensors", "wb") as file:
        file.write(safetensors.numpy.save({f"{number}": content(number)}))
with open(f"{folder}/model.safetensors.index.json", "w") as file:
    json.dump({"weight_map": map}, file)
resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))
model = models.load(folder, framework="np")
assert len(model) == count
assert all(np.array_equal(model[f"{number}"], content(number)) for number in range(count))
print(*{str(one.route) for one in model.transfers})
"""


@pytest.mark.parametrize("count", [100, 10_000])
def test_more_shards_than_descriptors_take_one_route(tmp_path, count):
    assert len(in_child(_SHARDS, tmp_path, count).split()) == 1


def test_a_folder_with_one_file(path):
    assert set(load(path.parent)) == set(MODEL)


@pytest.mark.parametrize(
    ("weight_map", "match"),
    [
        ({"a": "../model.safetensors"}, "not a file below it"),
        ({"a": "/etc/passwd"}, "not a file below it"),
        ({"a": "sub/../model.safetensors"}, "not a file below it"),
        ({"a": ".."}, "not a file below it"),
        ({"a": ""}, "not a file below it"),
        ({"a": "x\0y"}, "not a file below it"),
        ({"a": 1}, "not a file below it"),
        ({}, "no weight_map"),
        (None, "no weight_map"),
        (["a"], "no weight_map"),
        ({"absent": "model-00001-of-00003.safetensors"}, "lacks tensor 'absent'"),
    ],
)
def test_an_index_that_lies(sharded, weight_map, match):
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=match):
        load(sharded)


@pytest.mark.parametrize("text", ["", "[]", "{", "{}", "\ufeff{}"])
def test_an_index_that_is_malformed(sharded, text):
    index = sharded / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json: "):
        load(index)


def test_a_name_in_two_files(path, tmp_path):
    twin = tmp_path / "twin.safetensors"
    twin.write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"is in .*model\.safetensors and in .*twin\.safetensors"):
        load([path, twin])


def test_what_is_not_a_path_is_refused_at_once(path):
    with open(path, "rb") as file, dmabuf.allocate("1MiB") as buf:
        for source in (None, 3.0, True, file, {path}, [path, None], [buf], [path.read_bytes()]):
            with pytest.raises(TypeError, match="load: must be ") as error:
                load(source)
            assert len(str(error.value)) < 120
    with pytest.raises(ValueError, match="no files are given"):
        load([])
    assert_equal(load(os.fsencode(path))["scalar"], MODEL["scalar"])


def test_what_is_not_a_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    os.mkdir(tmp_path / "folder.safetensors")
    for target, error in [
        (tmp_path / "absent", FileNotFoundError),
        (tmp_path, FileNotFoundError),
        ("/dev/zero", OSError),
        (tmp_path / "fifo", OSError),
        ([tmp_path / "folder.safetensors"], IsADirectoryError),
    ]:
        with pytest.raises(error):
            load(target)


# -- save


def test_a_file_is_that_of_the_package_to_the_byte(path, tmp_path):
    models.save(MODEL, tmp_path / "ours", metadata={"format": "np"})
    assert (tmp_path / "ours").read_bytes() == path.read_bytes()


def test_from_a_buffer_and_back_again(path, tmp_path):
    model = load(path)
    done = models.save(model, tmp_path / "ours", metadata=model.metadata)
    assert (tmp_path / "ours").read_bytes() == path.read_bytes()
    assert sum(one.nbytes for one in done) == os.path.getsize(path)
    with dmabuf.allocate(os.path.getsize(path)) as buf, dmabuf.open(tmp_path / "x", "w") as file:
        whole = file.write_from(buf)
    assert done[-1].route == whole.route
    if whole.route == "direct":  # most of it goes from where it was
        assert sum(one.copied for one in done) < 0.2 * os.path.getsize(path)


DTYPE = st.sampled_from([np.dtype(dtype) for dtype in DTYPES])
TENSOR = st.tuples(DTYPE, st.lists(st.integers(0, 40), max_size=3), st.integers(0, 2))


@settings(max_examples=60)
@given(
    tensors=st.dictionaries(
        st.text(max_size=5).filter(lambda name: name != "__metadata__"), TENSOR, max_size=6
    ),
    gap=st.integers(0, 9),
)
def test_any_tensors_come_out_as_the_package_writes_and_reads_them(tmp_path_factory, tensors, gap):
    path = tmp_path_factory.mktemp("any") / "x"
    with dmabuf.allocate("1MiB", exporter="memfd") as a, dmabuf.allocate("1MiB") as b:
        given_, at = {}, 0
        for seed, (name, (dtype, shape, where)) in enumerate(tensors.items()):
            given_[name] = value = some(dtype, shape, seed)
            if where:
                given_[name] = (a, b)[where - 1].asarray(dtype, shape, at)
                given_[name][...] = value
                at += value.nbytes + gap
        models.save(given_, path)
        assert path.read_bytes() == safetensors.numpy.save(given_)
        given_.clear()
    model = load(path)
    for seed, (name, (dtype, shape, _)) in enumerate(tensors.items()):
        assert_equal(model[name], some(dtype, shape, seed))
    del model
    path.unlink()


def test_other_byte_orders_and_strides_are_written_as_they_read(tmp_path):
    big = np.arange(12, dtype=">f4").reshape(3, 4)
    given_ = {"big": big, "turned": big.T, "parts": big[::2, 1:], "one": big[1, 1]}
    given_ |= {"little": big.astype("<f4").T, "again": big + 1}
    models.save(given_, tmp_path / "x")
    found = safetensors.numpy.load_file(tmp_path / "x")
    for name, value in given_.items():
        assert found[name].dtype == "<f4"
        assert np.array_equal(found[name], value) and found[name].shape == value.shape


def test_more_than_all_staging_blocks_hold(tmp_path):
    tensors = {"a": np.frombuffer(pattern(70 << 20, 1), "u1"), "b": some("<f4", (999,), 2)}
    [done] = models.save(tensors, tmp_path / "x")
    assert done.nbytes == done.copied == os.path.getsize(tmp_path / "x")
    with open(tmp_path / "x", "rb") as file:
        assert file.read() == safetensors.numpy.save(tensors)


@pytest.mark.parametrize(
    ("tensors", "how", "error", "match"),
    [
        ({"a": [1, 2]}, {}, TypeError, r"tensor 'a' is a builtins\.list"),
        ({"a": np.zeros(2, "O")}, {}, TypeError, "which safetensors files lack"),
        ({"a": np.zeros(2, "c16")}, {}, TypeError, "dtype complex128, which"),
        ({"a": np.zeros(2, "M8[s]")}, {}, TypeError, "which safetensors files lack"),
        ({"a": np.zeros(2, [("x", "<f4")])}, {}, TypeError, "which safetensors files lack"),
        ({"a": np.zeros(2, ml_dtypes.int4)}, {}, TypeError, "dtype int4, which"),
        ({1: np.zeros(2)}, {}, TypeError, "names and metadata must be text"),
        ({"__metadata__": np.zeros(2)}, {}, ValueError, "cannot have the name"),
        ({"\ud800": np.zeros(2)}, {}, ValueError, "surrogates not allowed"),
        ({}, {"metadata": {"a": 1}}, TypeError, "names and metadata must be text"),
        ({}, {"metadata": {1: "a"}}, TypeError, "names and metadata must be text"),
        ({}, {"metadata": {"a": "\ud800"}}, ValueError, "surrogates not allowed"),
        ({}, {"metadata": {"a": "x" * 100_000_000}}, ValueError, "the format allows 100000000"),
        ({"a": np.zeros(2)}, {"require": "magic"}, ValueError, "invalid require 'magic'"),
    ],
)
def test_what_save_refuses(path, tensors, how, error, match):
    before = path.read_bytes()
    with pytest.raises(error, match=match):
        models.save(tensors, path, **how)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


_FULL = """
import resource, sys
import numpy as np
import dmabuf
from dmabuf import safetensors
model = safetensors.load(sys.argv[1], framework="np")
given = model if sys.argv[2] == "held" else {name: value.copy() for name, value in model.items()}
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    safetensors.save(given, sys.argv[1])
except OSError as error:
    print(error.filename)
"""


@pytest.mark.parametrize("where", ["held", "copied"])
def test_a_failure_leaves_the_old_file_and_nothing_else(path, where):
    before = path.read_bytes()
    assert in_child(_FULL, path, where) == f"{path}\n"
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_an_existing_file_is_replaced_and_keeps_its_mode(path, tmp_path, caplog):
    path.chmod(0o640)
    os.link(path, tmp_path / "other")
    (tmp_path / "link").symlink_to(path)
    with open(path, "rb") as old, caplog.at_level(logging.INFO, "dmabuf"):
        models.save_file({"a": np.arange(3)}, tmp_path / "link", {"format": "np"})
        assert len(old.read()) > 1000  # an open descriptor keeps the old content
    assert stat.S_IMODE(path.stat().st_mode) == 0o640 and (tmp_path / "link").is_symlink()
    assert list(safetensors.numpy.load_file(path)) == ["a"]
    assert "2 names (hard links)" in caplog.text


def test_it_is_on_the_medium_before_it_takes_the_name(path, monkeypatch):
    """By the inode that the name has at the time of each fsync, and at the end."""
    done, fsync = [], os.fsync

    def flush(fd):
        done.append((os.fstat(fd).st_ino, os.stat(path).st_ino))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", flush)
    old = path.stat().st_ino
    models.save({"a": np.arange(3)}, path)
    new = path.stat().st_ino
    assert done == [(new, old), (path.parent.stat().st_ino, new)]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, who could replace a device node")
def test_a_device_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for target in ("/dev/null", tmp_path, tmp_path / "fifo"):
        with pytest.raises(OSError, match="not a regular file") as error:
            models.save({"a": np.arange(3)}, target)
        assert error.value.errno == errno.EINVAL
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_no_such_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match="its directory"):
        models.save({"a": np.arange(3)}, tmp_path / "no" / "x")


def calls_of(function):
    """How many calls of functions, in Python and in C, a function makes."""
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def test_small_tensors_cost_few_calls(tmp_path):
    """On a quiet machine that is at most 1.5 times the CPU time of the safetensors package."""
    tensors = {f"{number}": np.full(8, number, "<f4") for number in range(4000)}
    assert calls_of(lambda: models.save(tensors, tmp_path / "x")) < 35 * len(tensors)
    assert calls_of(lambda: models.load_file(tmp_path / "x", framework="np")) < 25 * len(tensors)


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
    model = load(path)
    assert_equal(model["scalar"], MODEL["scalar"])
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
