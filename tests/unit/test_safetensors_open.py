"""Single tensors and slices of tensors of a model, by NumPy, beside the safetensors package."""

import os
import threading

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

import dmabuf
from dmabuf import safetensors as models
from tests.resources import held
from tests.support import pattern, poison

pytestmark = pytest.mark.usefixtures("leaves_nothing")


def some(dtype, shape, seed):
    dtype = np.dtype(dtype)
    raw = np.frombuffer(pattern(int(np.prod(shape)) * dtype.itemsize, seed), "u1")
    return raw.view(dtype).reshape(shape)


MODEL = {
    "rows": some("<u2", (37, 4096), 1),
    "deep": some("<u4", (3, 5, 7, 11), 2),
    "wide": some("u1", (6, 30_000), 3),
    "long": some("<u8", (20_000,), 4),
    "odd": some("u1", (5,), 5),
    "half": some(ml_dtypes.bfloat16, (3, 40), 6),
    "scalar": some("<u4", (), 7),
    "nothing": some("<u4", (3, 0, 2), 8),
}


def same(got, expected):
    assert got.dtype == expected.dtype and got.shape == expected.shape
    assert got.flags.c_contiguous and got.tobytes() == expected.tobytes()
    return True


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("open") / "model.safetensors"
    safetensors.numpy.save_file(MODEL, path, metadata={"format": "np"})
    return path


@pytest.fixture
def model(path):
    with models.safe_open(path, "np", exporter="memfd") as model:
        yield model


def test_what_it_has_is_what_the_package_reports(path, model):
    with safetensors.safe_open(path, "np") as theirs:
        assert model.keys() == sorted(theirs.keys())
        assert model.offset_keys() == theirs.offset_keys()
        assert model.metadata() == theirs.metadata()
        for name in theirs.keys():  # noqa: SIM118 - it is not a mapping
            ours = model.get_slice(name)
            assert ours.get_shape() == theirs.get_slice(name).get_shape()
            assert ours.get_dtype() == theirs.get_slice(name).get_dtype()


def test_every_tensor_has_its_bytes(path):
    with models.safe_open(path, "np") as model:
        found = {name: model.get_tensor(name) for name in reversed(model.keys())}
        again = model.get_tensors()
    for name, value in MODEL.items():
        assert same(found[name], value) and same(again[name], value)
        assert found[name].flags.aligned and found[name].flags.writeable
        found[name][...] = 0  # no other tensor shares its memory
        assert same(again[name], value)


def test_tensors_share_buffers_which_close_with_the_last_of_them(path):
    before = held()
    with models.safe_open(path, "np") as model:
        few = [model.get_tensor(name) for name in ("odd", "scalar", "half")]
        one_more = held()
        few += [model.get_tensor("odd") for _ in range(50)]
        assert held() == one_more  # no further descriptor, nor mapping
    assert same(few[0], MODEL["odd"])
    del few
    assert held() == before


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("rows", np.s_[3]),
        ("rows", np.s_[-1]),
        ("rows", np.s_[2:5]),
        ("rows", np.s_[:, 1024:2048]),  # as a tensor-parallel worker takes its part
        ("rows", np.s_[5::7, 4000:]),
        ("rows", np.s_[::-3, ::-2]),
        ("rows", np.s_[30:3:-5, 17]),
        ("rows", np.s_[100:200]),
        ("rows", np.s_[7:7, 3]),
        ("deep", np.s_[...]),
        ("deep", np.s_[..., 3]),
        ("deep", np.s_[1, ..., ::4]),
        ("deep", np.s_[:, 2, 1:6:2, -3:]),
        ("deep", np.s_[2, 4, 6, 10]),
        ("deep", ()),
        ("wide", np.s_[:, 10_000:20_000]),
        ("wide", np.s_[1::2, ::5000]),
        ("wide", np.s_[:, -1]),
        ("long", np.s_[::999]),
        ("long", np.s_[19_999:0:-1]),
        ("long", np.s_[np.int32(5)]),
        ("half", np.s_[1:, ::2]),
        ("scalar", ()),
        ("scalar", ...),
        ("nothing", np.s_[1:]),
        ("nothing", np.s_[2, :, 1]),
    ],
)
def test_a_slice_is_what_numpy_slices(model, name, index):
    assert same(model.get_slice(name)[index], np.array(MODEL[name][index], copy=True))


def indexes(shape):
    def one(length):
        bound = st.none() | st.integers(-length - 2, length + 2)
        step = st.sampled_from([None, 1, 1, 2, 3, 1000, -1, -2])
        sliced = st.builds(slice, bound, bound, step)
        return sliced if not length else sliced | st.integers(-length, length - 1)

    return st.tuples(*map(one, shape))


@settings(max_examples=100)
@given(data=st.data(), name=st.sampled_from(["rows", "deep", "wide", "long", "nothing"]))
def test_any_slice_is_what_numpy_slices(model, data, name):
    index = data.draw(indexes(MODEL[name].shape))
    index = index[: data.draw(st.integers(0, len(index)))]
    assert same(model.get_slice(name)[index], np.array(MODEL[name][index], copy=True))


def test_what_is_not_aligned_in_the_file_is_aligned_in_memory(tmp_path):
    header = b'{"a":{"dtype":"F32","shape":[3000],"data_offsets":[0,12000]}} '
    raw = pattern(12000, 1)
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + raw)
    whole = np.frombuffer(raw, "<f4")
    with models.safe_open(tmp_path / "x", "np") as model:
        for got, expected in [
            (model.get_tensor("a"), whole),
            (model.get_slice("a")[5:], whole[5:]),
            (model.get_slice("a")[::-3], whole[::-3].copy()),
        ]:
            assert same(got, expected) and got.flags.aligned


def test_only_the_pages_of_a_slice_are_read(path, monkeypatch):
    """A middle part of the columns: one array of segments, and no more bytes than it has."""
    moved = []
    real = dmabuf.File.read_segments

    def note(self, buffer, segments, **how):
        moved.append(done := real(self, buffer, segments, **how))
        return done

    monkeypatch.setattr(dmabuf.File, "read_segments", note)
    with models.safe_open(path, "np") as model:
        model.get_slice("wide")[:, 10_000:20_000]
    assert [one.nbytes for one in moved] == [60_000]


def test_a_large_selection_with_gaps_is_read_in_parts(tmp_path, monkeypatch):
    """Of which each needs little memory beside the result."""
    whole = {"a": some("<u4", (2, 3, 40_000), 9)}
    safetensors.numpy.save_file(whole, tmp_path / "x")
    monkeypatch.setattr("dmabuf.safetensors.slicing._MOST", 10_000)
    with models.safe_open(tmp_path / "x", "np") as model:
        for index in (np.s_[:, 1:, ::3], np.s_[..., ::-7], np.s_[1, 2, 5::11]):
            assert same(model.get_slice("a")[index], np.array(whole["a"][index]))


@pytest.mark.parametrize(
    ("index", "error", "match"),
    [
        (37, IndexError, "slice of tensor 'rows': index 37 is outside of a dimension of 37"),
        (-38, IndexError, "index -38 is outside"),
        (np.s_[:, 4096], IndexError, "index 4096 is outside"),
        (np.s_[0, 0, 0], IndexError, "3 indexes of a tensor with 2 dimensions"),
        (np.s_[..., ...], IndexError, "one Ellipsis"),
        (None, TypeError, "ints, slices and an Ellipsis, not NoneType"),
        (True, TypeError, "not bool"),
        ([1, 2], TypeError, "not list"),
        (1.0, TypeError, "not float"),
        (np.s_[::0], ValueError, "zero"),
        (np.s_[1.5:], TypeError, "slice indices"),
    ],
)
def test_a_slice_that_cannot_be(model, index, error, match):
    with pytest.raises(error, match=match):
        model.get_slice("rows")[index]


def test_what_it_refuses(path, tmp_path):
    with models.safe_open(path, "np") as model:
        with pytest.raises(KeyError, match="there is no tensor 'none'"):
            model.get_tensor("none")
        with pytest.raises(KeyError, match="there is no tensor 'none'"):
            model.get_slice("none")
        part = model.get_slice("rows")
    for use in (lambda: part[0], lambda: model.get_tensor("rows"), lambda: model.__enter__()):
        with pytest.raises(dmabuf.ClosedError, match="the model is closed"):
            use()
    model.close()
    assert "closed" in repr(model)
    for how, error, match in [
        ({"framework": "tf"}, ValueError, "'pt' .PyTorch. or 'np' .NumPy."),
        ({"require": "magic"}, ValueError, "require"),
        ({"device": "cuda:0"}, ValueError, "for NumPy's arrays: use framework='pt'"),
        ({"variant": "fp16", "filename": tmp_path}, FileNotFoundError, "no safetensors file"),
    ]:
        with pytest.raises(error, match=match):
            models.safe_open(**({"filename": path, "framework": "np"} | how))


def test_a_dtype_that_numpy_lacks(tmp_path):
    header = b'{"a":{"dtype":"F4","shape":[4],"data_offsets":[0,2]}}'
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + b"ab")
    with models.safe_open(tmp_path / "x", "np") as model:
        for use in (model.get_tensor, model.get_slice):
            with pytest.raises(TypeError, match=r"has no dtype for F4"):
                use("a")


def test_a_file_that_changes_while_it_is_open(path, tmp_path):
    copy = tmp_path / "copy"
    copy.write_bytes(path.read_bytes())
    with models.safe_open(copy, "np") as model:
        assert same(model.get_tensor("odd"), MODEL["odd"])
        os.truncate(copy, 4096)
        with pytest.raises(ValueError, match="changed after its header was read"):
            model.get_tensor("rows")


def test_threads_read_at_once(path):
    found = {}
    with models.safe_open(path, "np") as model:
        threads = [
            threading.Thread(target=lambda name=name: found.update({name: model.get_tensor(name)}))
            for name in MODEL
        ]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
    for name, value in MODEL.items():
        assert same(found[name], value)


def test_at_most_sixteen_files_are_open(tmp_path):
    paths = [tmp_path / f"{number}" for number in range(20)]
    for number, one in enumerate(paths):
        safetensors.numpy.save_file({f"{number}": some("<u4", (2000,), number)}, one)
    before = len(os.listdir("/proc/self/fd"))
    with models.safe_open(paths, "np") as model:
        for number in (*range(20), *reversed(range(20))):
            assert same(model.get_tensor(f"{number}"), some("<u4", (2000,), number))
        fds = [os.readlink(f"/proc/self/fd/{fd}") for fd in _own_fds()]
        files = [one for one in fds if one.startswith(str(tmp_path))]
        assert len(set(files)) == 16
    del model
    assert len(os.listdir("/proc/self/fd")) == before


def _own_fds():
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")]


# -- where a model can be


@pytest.fixture(params=["descriptor", "bytes", "bytearray", "memoryview", "buffer", "memfd"])
def source(request, path):
    """The file of `path` by something that is not its path."""
    raw = path.read_bytes()
    if request.param == "descriptor":
        with open(path, "rb") as file:
            file.seek(100)
            yield file.fileno()
            assert file.tell() == 100
    elif request.param == "buffer":
        with dmabuf.allocate(len(raw) + 5000, exporter="memfd") as buffer:
            buffer.pwrite(poison(buffer.size), 0)
            buffer.pwrite(raw, 0)
            yield buffer
    elif request.param == "memfd":
        fd = os.memfd_create("model")
        os.write(fd, raw)
        yield fd
        os.close(fd)
    else:
        yield {"bytes": bytes, "bytearray": bytearray, "memoryview": memoryview}[request.param](raw)


def test_any_source(source):
    model = models.load(source, framework="np")
    for name, value in MODEL.items():
        assert same(model[name], value)
    assert model.metadata == {"format": "np"}
    if isinstance(source, dmabuf.Buffer):
        assert model.buffer is source and model.transfers == ()
    few = models.load(source, framework="np", tensors=["long", "odd"], alignment=4096)
    assert set(few) == {"long", "odd"} and few.buffer is not source
    assert same(few["long"], MODEL["long"]) and same(few["odd"], MODEL["odd"])
    assert few.entries["odd"].offset % 4096 == 0
    with models.safe_open(source, "np") as opened:
        assert same(opened.get_tensor("rows"), MODEL["rows"])
        assert same(opened.get_slice("rows")[:, 5:900], MODEL["rows"][:, 5:900].copy())
    del model, few


def test_tensors_over_a_buffer_that_holds_the_file_are_its_memory(path):
    with dmabuf.allocate(os.path.getsize(path), exporter="memfd") as buffer:
        with dmabuf.open(path) as file:
            file.read_into(buffer)
        model = models.load(buffer, framework="np")
        model["long"][7] = 12345
        at = model.entries["long"].offset + 7 * 8
        assert int.from_bytes(buffer.pread(8, at), "little") == 12345
        with models.safe_open(buffer, "np") as opened:
            assert opened.get_tensor("long")[7] == 12345
        del model


def test_a_buffer_with_a_file_whose_tensors_are_not_aligned(tmp_path):
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}} '
    with dmabuf.allocate(4096, exporter="memfd") as buffer:
        buffer.pwrite(len(header).to_bytes(8, "little") + header + pattern(8, 1), 0)
        with pytest.raises(ValueError, match=r"load the buffer: tensor 'a' at 63 .*alignment=1"):
            models.load(buffer, framework="np")
        model = models.load(buffer, framework="np", alignment=1)
        assert model["a"].tobytes() == pattern(8, 1)
        with models.safe_open(buffer, "np") as opened:
            assert opened.get_tensor("a").tobytes() == pattern(8, 1)


def test_memory_that_cannot_be_a_source(path):
    raw = path.read_bytes()
    with dmabuf.allocate(len(raw), exporter="memfd") as buffer:
        buffer.pwrite(raw, 0)
        with pytest.raises(ValueError, match="cannot be the destination"):
            models.load(buffer, framework="np", buffer=buffer)
        with pytest.raises(dmabuf.RouteUnavailable, match="copied by the CPU"):
            models.load(raw, framework="np", require="zero-copy")
    with pytest.raises(dmabuf.ClosedError):
        models.load(buffer, framework="np")
    with pytest.raises(ValueError, match=r"load the bytes: its tensors end at .* cut short"):
        models.load(raw[:-1], framework="np")
    with pytest.raises(ValueError, match="load the bytes: it has 2 bytes"):
        models.load(b"\0\0", framework="np")


def test_descriptors_that_cannot_be_a_source(path):
    fd = os.open(path, os.O_WRONLY)
    try:
        with pytest.raises(OSError, match=f"descriptor {fd}"):
            models.load(fd, framework="np")
    finally:
        os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        models.load(fd, framework="np")
    reader, writer = os.pipe()
    with pytest.raises(OSError, match="not a regular file"):
        models.load(reader, framework="np")
    os.close(reader)
    os.close(writer)


# -- folders, by the names that other programs give


def write(folder, *names):
    """Write a file of its own tensor for each name; return those tensors."""
    found = {}
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        found[name] = some("<u4", (50,), seed)
        safetensors.numpy.save_file({name: found[name]}, folder / name)
    return found


SHARDS = ["{}-00001-of-00003", "{}-00002-of-00003", "{}-00003-of-00003"]


@pytest.mark.parametrize(
    ("there", "variant", "expected"),
    [
        (["model", "adapter_model"], None, ["model"]),
        (["adapter_model"], None, ["adapter_model"]),
        (["diffusion_pytorch_model"], None, ["diffusion_pytorch_model"]),
        (["pytorch_lora_weights"], None, ["pytorch_lora_weights"]),
        (["anything-v1.5"], None, ["anything-v1.5"]),
        (["model", "model.fp16"], None, ["model"]),
        (["model", "model.fp16"], "fp16", ["model.fp16"]),
        (["diffusion_pytorch_model.fp16"], "fp16", ["diffusion_pytorch_model.fp16"]),
        ([one.format("model") for one in SHARDS], None, "all"),
        ([one.format("model.fp16") for one in SHARDS] + ["model"], "fp16", SHARDS),
        ([f"{one.format('model')}.fp16" for one in SHARDS], "fp16", "all"),
        (["model-00000-of-00002", "model-00001-of-00002"], None, "all"),
        (["model", *[one.format("model") for one in SHARDS]], None, ["model"]),
    ],
)
def test_a_folder_of_other_programs(tmp_path, there, variant, expected):
    files = write(tmp_path, *[f"{name}.safetensors" for name in there])
    (tmp_path / "config.json").write_text("{}")
    if expected == "all":
        expected = there
    elif expected is SHARDS:
        expected = [one.format("model.fp16") for one in SHARDS]
    for loaded in (
        models.load(tmp_path, framework="np", variant=variant),
        models.safe_open(tmp_path, "np", variant=variant).get_tensors(),
    ):
        assert sorted(loaded) == sorted(f"{name}.safetensors" for name in expected)
        for name in loaded:
            assert same(loaded[name], files[name])


@pytest.mark.parametrize(
    ("there", "variant", "error", "match"),
    [
        (["model"], "fp16", FileNotFoundError, "no weights of variant='fp16'.*there: None"),
        (["model.fp16"], None, FileNotFoundError, "no weights of variant=None.*there: 'fp16'"),
        (["a", "b", "c", "d"], None, ValueError, "the weights a, b, c and 1 more; give the path"),
        (SHARDS[:2], None, FileNotFoundError, "shard of 3 is missing.*model-00003-of-00003"),
        (SHARDS[1:], None, FileNotFoundError, "shard of 3 is missing.*model-00001-of-00003"),
        ([*SHARDS, "{}-00001-of-00002"], None, ValueError, "shards of several models"),
        (["unet/{}", "vae/{}"], None, FileNotFoundError, "sub-folders unet, vae have some"),
        ([], None, FileNotFoundError, "no safetensors file is in it"),
    ],
)
def test_a_folder_without_one_model(tmp_path, there, variant, error, match):
    write(tmp_path, *[f"{name.format('model')}.safetensors" for name in there])
    with pytest.raises(error, match=match):
        models.load(tmp_path, framework="np", variant=variant)


def test_an_index_of_a_variant_and_shards_in_sub_folders(tmp_path):
    files = write(tmp_path, "a/x.safetensors", "b/x.safetensors", "model.safetensors")
    owner = {name: name for name in ("a/x.safetensors", "b/x.safetensors")}
    index = '{"weight_map": {"a/x.safetensors": "a/x.safetensors", "b/x.safetensors": "%s"}}'
    place = tmp_path / "model.safetensors.index.fp16.json"
    place.write_text(index % "b/x.safetensors")
    model = models.load(tmp_path, framework="np", variant="fp16")
    assert set(model) == set(owner)
    for name in owner:
        assert same(model[name], files[name])
    for outside in ("b/../x.safetensors", "/b/x.safetensors", "b//x.safetensors", "./x"):
        place.write_text(index % outside)
        with pytest.raises(ValueError, match="not a file below it"):
            models.load(tmp_path, framework="np", variant="fp16")


def test_a_shared_model_comes_from_a_path(source, tmp_path):
    with pytest.raises(ValueError, match="shared is for files that have paths; give the path"):
        models.load(source, framework="np", shared=tmp_path / "store.sock")
