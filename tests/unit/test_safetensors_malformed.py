"""Files that are malformed, or nearly: each verdict beside that of the safetensors package."""

import io
import json
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

import dmabuf
from dmabuf import safetensors as models

BITS = {name: int(name[1:]) for name in ("U8", "I8", "I16", "U16", "F16", "I32", "U32", "F32")}
BITS |= dict.fromkeys(("C64", "F64", "I64", "U64"), 64)
BITS |= {"BOOL": 8, "BF16": 16, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
BITS |= dict.fromkeys(("F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)


def file_of(header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else header.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


@pytest.fixture
def ours(tmp_path):
    """Load a file: its tensors as {name: (dtype, shape, bytes)}, or the text of the error."""
    path = tmp_path / "x.safetensors"
    with dmabuf.allocate(1 << 16, exporter="memfd") as buffer:

        def load(file):
            path.write_bytes(file)
            try:
                model = models.load(path, framework="np", buffer=buffer, audit="off")
            except ValueError as error:
                assert type(error) is ValueError and str(error).startswith(f"load {path}: ")
                return str(error).partition(": ")[2]
            return {
                name: (entry.dtype, list(entry.shape), model.raw(name).tobytes())
                for name, entry in model.entries.items()
            }

        yield load


def theirs(file):
    try:
        found = safetensors.deserialize(file)
    except safetensors.SafetensorError as error:
        return str(error)
    return {name: (one["dtype"], one["shape"], bytes(one["data"])) for name, one in found}


def two(header):
    """A header with a tensor of two bytes at each @."""
    return header.replace("@", '"dtype":"U8","shape":[2],"data_offsets":[0,2]')


def about(shape="[2]", offsets="[0,2]", dtype='"U8"', also=""):
    """A header with a tensor, and after it what `also` has of others."""
    return f'{{"a":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}{also}}}'


VALID = {
    "padding": (two('{"a":{@}} \n\t '), b"ab"),
    "a space first": (two(' {"a":{@}}'), b"ab"),
    "no tensor": ("{}", b""),
    "an empty name": (two('{"":{@}}'), b"ab"),
    "a name in pairs of surrogates": (two('{"\\ud83d\\ude00":{@}}'), b"ab"),
    "metadata": (two('{"__metadata__":{"a":"\\u00e9"},"a":{@}}'), b"ab"),
    "metadata of a tensor's fields": (
        two('{"__metadata__":{"dtype":"U8","shape":"[2]","data_offsets":"[0,2]"},"a":{@}}'),
        b"ab",
    ),
    "no metadata": (two('{"__metadata__":null,"a":{@}}'), b"ab"),
    "another field": (two('{"a":{@,"more":[1.5,{}]}}'), b"ab"),
    "a tensor in another field": (two('{"a":{@,"more":{@}}}'), b"ab"),
    "a tensor twice": (two('{"a":{@},"a":{@}}'), b"ab"),
    "a scalar": (about("[]", "[0,1]"), b"a"),
    "no bytes": (about("[0]", "[0,0]"), b""),
    "no bytes at the end": (two(about("[3,0]", "[2,2]", also=',"b":{@}')), b"ab"),
    "no bytes at the start": (two(about("[0]", "[0,0]", also=',"b":{@}')), b"ab"),
    "no bytes of a large shape": (about("[0,18446744073709551615,2]", "[0,0]"), b""),
    "out of order": (two(about("[1]", "[2,3]", also=',"b":{@}')), b"abc"),
    "two in a byte": (about("[4]", "[0,2]", '"F4"'), b"ab"),
    "four in three bytes": (about("[4]", "[0,3]", '"F6_E2M3"'), b"abc"),
}


@pytest.mark.parametrize("case", VALID)
def test_a_valid_file(ours, case):
    file = file_of(*VALID[case])
    assert ours(file) == theirs(file)
    assert isinstance(ours(file), dict)


INVALID = "lacks a known dtype, a shape, and data_offsets that fit them"
MALFORMED = {
    "a list": ("[]", b"", "not a JSON object"),
    "nothing": ("", b"", "not valid JSON"),
    "a byte order mark": ("\ufeff{}", b"", "not valid JSON"),
    "UTF-16": ("{}".encode("utf-16-le"), b"", "not valid JSON"),
    "half an object": (two('{"a":{@}'), b"ab", "not valid JSON"),
    "two objects": (two('{"a":{@}}{}'), b"ab", "not valid JSON"),
    "zeros after it": (two('{"a":{@}}\0\0'), b"ab", "not valid JSON"),
    "not UTF-8": (b'{"\xff":{}}', b"", "not valid JSON"),
    "half a pair of surrogates": (two('{"a\\ud800":{@}}'), b"ab", "not valid JSON"),
    "half a pair in metadata": (two('{"__metadata__":{"\\ud800":""},"a":{@}}'), b"ab", "not valid"),
    "half a pair in metadata twice": (
        two('{"__metadata__":{"x":"\\ud800","x":""},"a":{@}}'),
        b"ab",
        "not valid",
    ),
    "half a pair in a field's name": (two('{"a":{@,"\\ud800":null}}'), b"ab", "not valid JSON"),
    "half a pair in a field": (two('{"a":{@,"more":["\\ud800"]}}'), b"ab", "not valid JSON"),
    "half a pair in a tensor twice": (two('{"a":{"\\ud800":1},"a":{@}}'), b"ab", "not valid JSON"),
    "a control character": (two('{"a\x01":{@}}'), b"ab", "not valid JSON"),
    "thousands of digits": (two('{"a":{@,"x":#}}').replace("#", "9" * 5000), b"ab", "not valid"),
    "a nest": ('{"a":' + "[" * 100_000, b"", "not valid JSON"),
    "metadata of numbers": ('{"__metadata__":{"a":1}}', b"", "not a mapping of text to text"),
    "metadata that is a list": ('{"__metadata__":[]}', b"", "not a mapping of text to text"),
    "metadata that is a tensor": (two('{"__metadata__":{@}}'), b"ab", "not a mapping of text"),
    "a tensor that is null": ('{"a":null}', b"", "that fit them: None"),
    "no dtype": ('{"a":{"shape":[2],"data_offsets":[0,2]}}', b"ab", INVALID),
    "no shape": ('{"a":{"dtype":"U8","data_offsets":[0,2]}}', b"ab", INVALID),
    "no offsets": ('{"a":{"dtype":"U8","shape":[2]}}', b"ab", INVALID),
    "dtype in lower case": (about(dtype='"u8"'), b"ab", "that fit them: {'dtype': 'u8'"),
    "dtype null": (about(dtype="null"), b"ab", INVALID),
    "shape of a float": (about("[2.0]"), b"ab", INVALID),
    "shape of a bool": (about("[true,2]"), b"ab", INVALID),
    "shape of text": (about('["2"]'), b"ab", INVALID),
    "shape below zero": (about("[-2]"), b"ab", INVALID),
    "both below zero": (about("[-2,-1]"), b"ab", INVALID),
    "shape that is not a list": (about("2"), b"ab", INVALID),
    "shape that is empty text": (about('""', "[0,1]"), b"a", INVALID),
    "shape null": (about("null"), b"ab", INVALID),
    "a leading zero": (about("[02]"), b"ab", "not valid JSON"),
    "offsets below zero": (about(offsets="[-2,0]"), b"ab", "an overlap at tensor 'a'"),
    "offsets of bools": (about("[1]", "[false,true]"), b"a", INVALID),
    "three offsets": (about(offsets="[0,2,2]"), b"ab", INVALID),
    "one offset": (about(offsets="[0]"), b"ab", INVALID),
    "offsets the wrong way": (about(offsets="[2,0]"), b"ab", INVALID),
    "a shape for other bytes": (about("[3]"), b"ab", INVALID),
    "a dtype for other bytes": (about(dtype='"F32"'), b"ab", INVALID),
    "2^64 elements": (about("[18446744073709551616,0]", "[0,0]"), b"", INVALID),
    "2^64 bits": (about("[2305843009213693952]", "[0,0]"), b"", INVALID),
    "2^128 elements": (about("[18446744073709551615,18446744073709551615]"), b"ab", INVALID),
    "2^64 before a 0": (about("[18446744073709551615,2,0]", "[0,0]"), b"", INVALID),
    "half a byte": (about("[3]", "[0,2]", '"F4"'), b"ab", INVALID),
    "a hole at the start": (about(offsets="[1,3]"), b"abc", "a hole before tensor 'a'"),
    "a hole between": (
        two(about("[1]", "[3,4]", also=',"b":{@}')),
        b"abcd",
        "a hole before tensor 'a'",
    ),
    "the same bytes twice": (two('{"a":{@},"b":{@}}'), b"ab", "an overlap at tensor 'b'"),
    "bytes in common": (two(about(offsets="[1,3]", also=',"b":{@}')), b"abc", "overlap"),
    "no bytes within another": (
        two(about("[0]", "[1,1]", also=',"b":{@}')),
        b"ab",
        "an overlap at tensor 'a'",
    ),
    "bytes after it": (two('{"a":{@}}'), b"abc", "its tensors end at 63, the file ends at 64"),
    "a byte short": (two('{"a":{@}}'), b"a", "it was cut short"),
    "bytes without a tensor": ("{}", b"a", "its tensors end at 10, the file ends at 11"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file(ours, case):
    header, data, why = MALFORMED[case]
    file = file_of(header, data)
    assert why in ours(file)
    assert isinstance(theirs(file), str)


@pytest.mark.parametrize("header", ['{"a":["U8",[2],[0,2]]}', about(dtype='{"U8":null}')])
def test_descriptions_that_only_the_package_takes(ours, header):
    """Its parser takes a list for an object and an object for an enum; no writer makes them."""
    file = file_of(header, b"ab")
    assert isinstance(theirs(file), dict) and isinstance(ours(file), str)


def as_zip():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", b"x" * 1000)
    return file.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1000\n"


@pytest.mark.parametrize(
    ("file", "what"),
    [
        (as_zip(), "a zip archive, as torch.save and numpy.savez write"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + bytes(99), "a pickle, as old versions of"),
        (b"GGUF\3\0\0\0" + bytes(99), "a GGUF file"),
        (b"\x93NUMPY\1\0v\0" + bytes(99), "a NumPy array"),
        (b"ARROW1\0\0" + bytes(99), "an Arrow file"),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "an HDF5 file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), "a PNG image"),
        (POINTER, "a Git LFS pointer, not the file itself; run git lfs pull"),
        (b"<!DOCTYPE html>\n<html><head>", "HTML or XML"),
        (b"<html>", "HTML or XML"),
        (b"", "0 bytes"),
        (b"\x02\0\0\0\0\0\0", "7 bytes"),
        (file_of("{}", length=3), "10 bytes, and its header would have 3"),
        (file_of("{}", length=100_000_001), "100000001 .at most 100000000."),
        (file_of("{}", length=2**64 - 1), "18446744073709551615 .at most 100000000."),
        (file_of("{}", length=1), "not valid JSON"),
    ],
)
def test_a_file_that_is_something_else_is_named(ours, file, what):
    found = ours(file)
    assert what.replace(".at most 100000000.", "(at most 100000000)") in found
    assert len(found) < 120
    assert isinstance(theirs(file), str)


def test_a_length_that_lies_reads_nothing(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(struct.pack("<Q", 90_000_001) + bytes(1000))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="90000001"):
            models.load(path, framework="np")
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_header_of_100_megabytes(tmp_path):
    """The largest that the format allows, and one that is longer."""
    path = tmp_path / "x"
    tensors = {"a": np.arange(5, dtype="u1")}
    plain = safetensors.numpy.save(tensors, {"m": ""})
    text = "x" * (100_000_000 - len(plain[8:-5].rstrip(b" ")))
    models.save(tensors, path, metadata={"m": text})
    assert path.stat().st_size == 8 + 100_000_000 + 5
    assert models.load(path, framework="np").metadata == {"m": text}
    with models.safe_open(path, "np") as file:
        assert file.get_tensor("a").tolist() == [0, 1, 2, 3, 4] and file.metadata() == {"m": text}
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == {"m": text}
    with pytest.raises(ValueError, match="a header of 100000008 bytes: the format allows"):
        models.save(tensors, path, metadata={"m": text + "y"})
    assert models.load(path, framework="np")["a"].tolist() == [0, 1, 2, 3, 4]


def agree(mine, file):
    """Assert that a file got the package's verdict, apart from what its JSON is made of."""
    other = theirs(file)
    if isinstance(mine, dict) and isinstance(other, str):
        # JSON that only Python takes, such as -0, is written as the package takes it, and again.
        length = int.from_bytes(file[:8], "little")
        again = json.dumps(json.loads(file[8 : 8 + length]))
        other = theirs(file_of(again, file[8 + length :]))
    if isinstance(mine, str) and isinstance(other, dict):
        assert "unknown dtype: {'dtype': {" in mine or INVALID in mine, mine
    else:
        assert isinstance(mine, str) or mine == other


NUMBERS = st.one_of(
    st.integers(0, 6),
    st.sampled_from([-1, 2**31, 2**61, 2**63, 2**64 - 1, 2**64, 2**70, 1.0, 2.5, True, None, "3"]),
)
DTYPE = st.sampled_from([*BITS, "f32", "", None, 1]) | st.sampled_from(["U8", "F32", "F4"])
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": DTYPE,
        "shape": st.lists(NUMBERS, max_size=3) | NUMBERS,
        "data_offsets": st.lists(NUMBERS, min_size=1, max_size=3) | NUMBERS,
        "more": NUMBERS,
    },
)


@settings(max_examples=120)
@given(
    header=st.dictionaries(st.sampled_from(["a", "b", "é", "__metadata__"]), ENTRY, max_size=3),
    size=st.integers(0, 12),
)
def test_any_header_gets_the_packages_verdict(ours, header, size):
    file = file_of(json.dumps(header), bytes(size))
    agree(ours(file), file)


@st.composite
def nearly_valid(draw):
    """A valid file with one mistake, or none."""
    entries, at = {}, 0
    for name in draw(st.lists(st.text(max_size=3), unique=True, max_size=4)):
        dtype = draw(st.sampled_from(list(BITS)))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        bits = BITS[dtype] * int(np.prod(shape))
        if bits % 8 or name == "__metadata__":
            continue
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + bits // 8]}
        at += bits // 8
    if entries and draw(st.booleans()):
        one = entries[draw(st.sampled_from(sorted(entries)))]
        what = draw(st.sampled_from(["offset", "shape", "dtype", "size", "twin"]))
        if what == "offset":
            one["data_offsets"][draw(st.integers(0, 1))] += draw(st.sampled_from([-1, 1, 8]))
        elif what == "shape":
            one["shape"] = [*one["shape"], draw(st.integers(0, 3))]
        elif what == "dtype":
            one["dtype"] = draw(st.sampled_from(list(BITS)))
        elif what == "size":
            at += draw(st.sampled_from([-1, 1]))
        else:
            entries["twin"] = dict(one)
    raw = json.dumps(entries, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    return file_of(raw, bytes(number % 251 for number in range(max(at, 0))))


@settings(max_examples=120)
@given(file=nearly_valid())
def test_a_nearly_valid_file_gets_the_packages_verdict(ours, file):
    agree(ours(file), file)


@settings(max_examples=120)
@given(data=st.data())
def test_a_file_with_a_byte_changed_gets_the_packages_verdict(ours, data):
    header = two('{"__metadata__":{"k":"v"},"é":{@},') + about(offsets="[2,4]")[1:]
    file = bytearray(file_of(header, b"abcd"))
    for _ in range(data.draw(st.integers(1, 2))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(
            st.sampled_from(list(b'{}[]",:0129-+.eE \\uU8F\0\x1f\x7f\x80\xff'))
        )
    file = bytes(file[: data.draw(st.sampled_from([len(file), len(file) - 1, 40]))])
    agree(ours(file), file)


def test_every_dtype_of_the_package_is_known(ours):
    text = theirs(file_of(about(dtype='"none"'), b"ab"))
    named = text.split("expected one of ")[1].split(" at line")[0].split(",")
    assert {word.strip("` ") for word in named} == set(BITS)
    for dtype, bits in BITS.items():
        file = file_of(about("[8]", f"[0,{bits}]", f'"{dtype}"'), bytes(bits))
        assert ours(file) == theirs(file)


def test_dtypes_that_numpy_lacks(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(file_of(about("[4]", "[0,3]", '"F6_E2M3"'), b"cde"))
    model = models.load(path, framework="np")
    with pytest.raises(TypeError, match=r"has no dtype for F6_E2M3: raw\(\) returns the bytes"):
        model["a"]
    assert model.raw("a").tobytes() == b"cde"
    path.write_bytes(file_of(about("[4]", "[0,2]", '"F4"'), b"ab"))
    model = models.load(path, framework="np")
    with pytest.raises(TypeError, match="has no dtype for F4"):
        model["a"]
