"""Headers of safetensors files: each verdict beside the safetensors library's own."""

import json
import struct
import sys
import tracemalloc

import ml_dtypes  # noqa: F401 - NumPy knows its dtypes by name then
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from dmabuf import _tensor_header
from dmabuf._tensor_header import KINDS, Malformed


def two(header):
    """A header with a tensor of two bytes where it says @."""
    return header.replace("@", '"dtype":"U8","shape":[2],"data_offsets":[0,2]')


def file_of(header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else header.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def ours(file):
    """The tensors of a file as {name: (dtype, shape, bytes)}, or the Malformed."""
    try:
        found = _tensor_header.read(len(file), lambda size, offset: file[offset : offset + size])
    except Malformed as error:
        return error
    return {
        name: (entry.dtype, list(entry.shape), file[entry.offset :][: entry.nbytes])
        for name, entry in found.entries.items()
    }


def theirs(file):
    try:
        found = safetensors.deserialize(file)
    except safetensors.SafetensorError as error:
        return error
    return {name: (one["dtype"], one["shape"], bytes(one["data"])) for name, one in found}


SOUND = {
    "one tensor": (two('{"a":{@}}'), b"ab"),
    "padding": (two('{"a":{@}} \n\t '), b"ab"),
    "none": ("{}", b""),
    "an empty name": (two('{"":{@}}'), b"ab"),
    "a name in pairs of surrogates": (two('{"\\ud83d\\ude00":{@}}'), b"ab"),
    "metadata": (two('{"__metadata__":{"a":"\\u00e9"},"a":{@}}'), b"ab"),
    "no metadata": (two('{"__metadata__":null,"a":{@}}'), b"ab"),
    "another field": (two('{"a":{@,"more":[1.5,{}]}}'), b"ab"),
    "a scalar": ('{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}', b"a"),
    "no bytes": ('{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', b""),
    "no bytes at the end": (
        two('{"b":{"dtype":"U8","shape":[3,0],"data_offsets":[2,2]},"a":{@}}'),
        b"ab",
    ),
    "no bytes at the start": (
        two('{"a":{@},"b":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'),
        b"ab",
    ),
    "no bytes of a large shape": (
        '{"a":{"dtype":"U8","shape":[0,18446744073709551615,2],"data_offsets":[0,0]}}',
        b"",
    ),
    "two in a byte": ('{"a":{"dtype":"F4","shape":[4],"data_offsets":[0,2]}}', b"ab"),
    "four in three bytes": ('{"a":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}', b"abc"),
}


@pytest.mark.parametrize("case", SOUND)
def test_a_sound_one(case):
    file = file_of(*SOUND[case])
    assert ours(file) == theirs(file) != {} or case == "none"


def about(shape="[2]", offsets="[0,2]", dtype='"U8"'):
    return f'{{"a":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}}}'


MALFORMED = {
    "a list": ("[]", b"", "does not begin with '{'"),
    "nothing": ("", b"", "does not begin with '{'"),
    "a byte order mark": ("\ufeff{}", b"", "does not begin"),
    "no JSON": (two('{"a":{@}'), b"ab", "no sound JSON"),
    "two objects": (two('{"a":{@}}{}'), b"ab", "no sound JSON"),
    "zeros after it": (two('{"a":{@}}\0\0'), b"ab", "no sound JSON"),
    "no UTF-8": (b'{"\xff":{}}', b"", "no sound JSON"),
    "half a surrogate pair": (two('{"\\ud800":{@}}'), b"ab", "no sound JSON"),
    "half a pair in a field": (two('{"a":{@,"x":"\\udc00"}}'), b"ab", "no sound JSON"),
    "a control character": (two('{"a\x01":{@}}'), b"ab", "no sound JSON"),
    "NaN": (two('{"a":{@,"x":NaN}}'), b"ab", "NaN is no number"),
    "a number too large": (two('{"a":{@,"x":1e999}}'), b"ab", "1e999 is no number"),
    "thousands of digits": (two('{"a":{@,"x":#}}').replace("#", "9" * 5000), b"ab", "5000 digits"),
    "a nest": ('{"a":' + "[" * 100_000, b"", "no sound JSON"),
    "metadata twice": ('{"__metadata__":{},"__metadata__":{}}', b"", "comes twice"),
    "metadata of numbers": ('{"__metadata__":{"a":1}}', b"", "no mapping of text to text"),
    "metadata that is a list": ('{"__metadata__":[]}', b"", "no mapping of text to text"),
    "a field twice": (two('{"a":{@,"dtype":"U8"}}'), b"ab", "'dtype' comes twice"),
    "a tensor that is null": ('{"a":null}', b"", "no JSON object"),
    "no dtype": ('{"a":{"shape":[2],"data_offsets":[0,2]}}', b"ab", "has no dtype"),
    "no shape": ('{"a":{"dtype":"U8","data_offsets":[0,2]}}', b"ab", "has no shape"),
    "no offsets": ('{"a":{"dtype":"U8","shape":[2]}}', b"ab", "has no data_offsets"),
    "dtype in lower case": (about(dtype='"u8"'), b"ab", "has dtype 'u8': one of BOOL, F4"),
    "dtype null": (about(dtype="null"), b"ab", "has dtype None"),
    "shape of a float": (about("[2.0]"), b"ab", "no shape of whole numbers"),
    "shape of an exponent": (about("[2e0]"), b"ab", "no shape of whole numbers"),
    "shape of a bool": (about("[true,2]"), b"ab", "no shape of whole numbers"),
    "shape of text": (about('["2"]'), b"ab", "no shape of whole numbers"),
    "shape below zero": (about("[-2]"), b"ab", "no shape of whole numbers"),
    "shape of minus nothing": (about("[-0]", "[0,0]"), b"", "no shape of whole numbers"),
    "shape that is no list": (about("2"), b"ab", "no shape of whole numbers"),
    "shape null": (about("null"), b"ab", "no shape of whole numbers"),
    "a leading zero": (about("[02]"), b"ab", "no sound JSON"),
    "offsets below zero": (about(offsets="[-2,0]"), b"ab", "no begin and end"),
    "three offsets": (about(offsets="[0,2,2]"), b"ab", "no begin and end"),
    "one offset": (about(offsets="[0]"), b"ab", "no begin and end"),
    "offsets the wrong way": (about(offsets="[2,0]"), b"ab", "no begin and end"),
    "a shape for other bytes": (about("[3]"), b"ab", "takes 3 bytes, and data_offsets give it 2"),
    "a dtype for other bytes": (about(dtype='"F32"'), b"ab", "takes 8 bytes"),
    "2^64 elements": (about("[18446744073709551616]", "[0,0]"), b"", "whole numbers below 2^64"),
    "2^64 bits": (about("[2305843009213693952]", "[0,0]"), b"", "larger than 2^64 bits"),
    "2^128 elements": (about("[18446744073709551615,18446744073709551615]"), b"ab", "than 2^64"),
    "2^64 before a 0": (about("[18446744073709551615,2,0]", "[0,0]"), b"", "larger than 2^64"),
    "half a byte": (about("[3]", "[0,2]", '"F4"'), b"ab", "no whole number of bytes"),
    "a hole at the start": (about(offsets="[1,3]"), b"abc", "a hole before tensor 'a'"),
    "a hole between": (
        two('{"a":{@},"b":{"dtype":"U8","shape":[1],"data_offsets":[3,4]}}'),
        b"abcd",
        "a hole before tensor 'b'",
    ),
    "the same bytes twice": (two('{"a":{@},"b":{@}}'), b"ab", "an overlap at tensor 'b'"),
    "bytes in common": (
        two('{"a":{@},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}'),
        b"abc",
        "an overlap at tensor 'b'",
    ),
    "no bytes within another": (
        two('{"a":{@},"b":{"dtype":"U8","shape":[0],"data_offsets":[1,1]}}'),
        b"ab",
        "an overlap at tensor 'b'",
    ),
    "bytes after it": (two('{"a":{@}}'), b"abc", "something follows that no tensor covers"),
    "a byte short": (two('{"a":{@}}'), b"a", "it was cut short"),
    "no tensor and bytes": ("{}", b"a", "something follows"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_one(case):
    header, data, why = MALFORMED[case]
    file = file_of(header, data)
    error = ours(file)
    assert isinstance(error, Malformed) and why in str(error), error
    assert isinstance(theirs(file), safetensors.SafetensorError)


STRICTER = {
    "a space first": (two(' {"a":{@}}'), "does not begin with '{'"),
    "a tensor twice": (two('{"a":{@},"a":{@}}'), "'a' comes twice"),
    "metadata's name twice": (
        two('{"__metadata__":{"x":"1","x":"2"},"a":{@}}'),
        "'x' comes twice",
    ),
    "a tensor as a list": ('{"a":["U8",[2],[0,2]]}', "no JSON object"),
    "a dtype as an object": (about(dtype='{"U8":null}'), "has dtype {'U8': None}"),
}


@pytest.mark.parametrize("case", STRICTER)
def test_what_only_we_refuse(case):
    header, why = STRICTER[case]
    file = file_of(header, b"ab")
    error = ours(file)
    assert isinstance(error, Malformed) and why in str(error)
    assert isinstance(theirs(file), dict)


@pytest.mark.parametrize(
    ("file", "why"),
    [
        (b"", "0 bytes are no safetensors file"),
        (b"\x02\0\0\0\0\0\0", "7 bytes are no safetensors file"),
        (file_of("{}", length=3), "a header of 3 bytes in a file of 10"),
        (file_of("{}", length=100_000_001), "no safetensors file has one over 100000000"),
        (file_of("{}", length=2**64 - 1), "no safetensors file has one over"),
        (file_of("{}", length=1), "no sound JSON"),
    ],
)
def test_lengths(file, why):
    error = ours(file)
    assert isinstance(error, Malformed) and why in str(error)
    assert isinstance(theirs(file), safetensors.SafetensorError)


def test_a_length_that_lies_reads_nothing():
    asked = []

    def pread(size, offset):
        asked.append(size)
        return struct.pack("<Q", 90_000_000)

    with pytest.raises(Malformed, match="in a file of 1000"):
        _tensor_header.read(1000, pread)
    assert asked == [8]


def test_very_many_tensors_cost_what_they_should():
    names = ",".join(f'"{number}":{about("[0]", "[0,0]")[5:-1]}' for number in range(50_000))
    raw = b"{" + names.encode() + b"}"
    tracemalloc.start()
    try:
        assert len(_tensor_header.parse(raw, 8 + len(raw)).entries) == 50_000
        assert tracemalloc.get_traced_memory()[1] < 30 * len(raw)
    finally:
        tracemalloc.stop()


def agree(file):
    mine, other = ours(file), theirs(file)
    if isinstance(mine, dict):
        assert mine == other  # what we take, the library takes, and finds the same in it
    elif isinstance(other, dict):
        text = str(mine)
        assert "comes twice" in text or "does not begin" in text or "no JSON object" in text, text


NUMBERS = st.one_of(
    st.integers(0, 6),
    st.sampled_from([-1, 2**31, 2**61, 2**63, 2**64 - 1, 2**64, 2**70, 1.0, 2.5, True, None, "3"]),
)
DTYPE = st.sampled_from([*KINDS, "f32", "", None, 1]) | st.sampled_from(["U8", "F32", "F4"])
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": DTYPE,
        "shape": st.lists(NUMBERS, max_size=3) | NUMBERS,
        "data_offsets": st.lists(NUMBERS, min_size=1, max_size=3) | NUMBERS,
        "more": NUMBERS,
    },
)


@settings(max_examples=400)
@given(
    header=st.dictionaries(st.sampled_from(["a", "b", "é", "__metadata__"]), ENTRY, max_size=3),
    size=st.integers(0, 12),
)
def test_any_header_gets_the_librarys_verdict(header, size):
    agree(file_of(json.dumps(header), bytes(size)))


@st.composite
def nearly_sound(draw):
    """A sound file, and one thing wrong with it, or nothing."""
    entries, at = {}, 0
    for name in draw(st.lists(st.text(max_size=3), unique=True, max_size=4)):
        dtype = draw(st.sampled_from(list(KINDS)))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        bits = KINDS[dtype].bits * int(np.prod(shape))
        if bits % 8 or name == "__metadata__":
            continue
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + bits // 8]}
        at += bits // 8
    if entries and draw(st.booleans()):
        one = entries[draw(st.sampled_from(sorted(entries)))]
        offsets = one["data_offsets"]
        what = draw(st.integers(0, 4))
        if what == 0:
            offsets[draw(st.integers(0, 1))] += draw(st.sampled_from([-1, 1, 8]))
        elif what == 1:
            one["shape"] = [*one["shape"], draw(st.integers(0, 3))]
        elif what == 2:
            one["dtype"] = draw(st.sampled_from(list(KINDS)))
        elif what == 3:
            at += draw(st.sampled_from([-1, 1]))
        else:
            entries["twin"] = dict(one)
    raw = json.dumps(entries, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    return file_of(raw, bytes(range(max(at, 0) % 256)) if at < 256 else bytes(at))


@settings(max_examples=400)
@given(nearly_sound())
def test_a_nearly_sound_file_gets_the_librarys_verdict(file):
    agree(file)


@settings(max_examples=400)
@given(data=st.data())
def test_a_file_with_a_byte_changed_gets_the_librarys_verdict(data):
    file = bytearray(
        file_of(
            two('{"__metadata__":{"k":"v"},"é":{@},') + about(offsets="[2,4]")[1:],
            b"abcd",
        )
    )
    assert isinstance(ours(bytes(file)), dict)
    for _ in range(data.draw(st.integers(1, 2))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(
            st.sampled_from(list(b'{}[]",:0129-+.eE \\uU8F\0\x1f\x7f\x80\xff'))
        )
    agree(bytes(file[: data.draw(st.sampled_from([len(file), len(file) - 1, 40]))]))


NAMES = st.text(max_size=6).filter(lambda name: name != "__metadata__")
TENSORS = st.dictionaries(
    NAMES,
    st.tuples(st.sampled_from(list(KINDS)), st.lists(st.integers(0, 4), max_size=3)),
    max_size=6,
)


@settings(max_examples=200)
@given(
    tensors=TENSORS,
    metadata=st.none() | st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=4),
)
def test_what_is_made_is_what_the_library_makes(tensors, metadata):
    given_, specs, keep = {}, {}, []
    for name, (key, shape) in tensors.items():
        count = int(np.prod(shape)) * KINDS[key].bits
        if count % 8 or KINDS[key].name is None:
            continue
        if key == "F4" and (not shape or shape[-1] % 2):
            continue
        given_[name] = key, tuple(shape)
        data = np.zeros(count // 8 + 1, "u1")
        keep.append(data)
        theirs_shape = [*shape[:-1], shape[-1] // 2] if key == "F4" else shape
        specs[name] = safetensors.TensorSpec(
            dtype=KINDS[key].name,
            shape=theirs_shape,
            data_ptr=data.ctypes.data,
            data_len=count // 8,
        )
    if not specs and metadata == {}:
        return  # see below
    expected = bytes(safetensors.serialize(specs, metadata=metadata))
    written = json.loads(expected[8 : 8 + int.from_bytes(expected[:8], "little")])
    shuffled = written.get("__metadata__")
    assert shuffled == metadata
    header, places = _tensor_header.make(given_, shuffled)
    assert expected.startswith(header)
    assert len(expected) == len(header) + sum(place.nbytes for place in places.values())
    found = ours(expected)
    assert {name: (place.dtype, list(place.shape)) for name, place in places.items()} == {
        name: one[:2] for name, one in found.items()
    }


def test_no_tensors_and_empty_metadata_can_be_read():
    """The library's own writer makes of it what its own reader refuses."""
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(bytes(safetensors.serialize({}, metadata={})))
    header, _ = _tensor_header.make({}, {})
    assert safetensors.deserialize(header) == [] and ours(header) == {}


@pytest.mark.parametrize(
    ("tensors", "metadata", "error", "match"),
    [
        ({"__metadata__": ("U8", ())}, None, ValueError, "no tensor can have the name"),
        ({1: ("U8", ())}, None, TypeError, "a tensor's name is text"),
        ({"\ud800": ("U8", ())}, None, ValueError, "surrogates not allowed"),
        ({}, {"a": 1}, TypeError, "metadata is text to text"),
        ({}, {1: "a"}, TypeError, "metadata is text to text"),
        ({}, {"a": "\ud800"}, ValueError, "surrogates not allowed"),
        ({"a": ("F4", (3,))}, None, ValueError, "no whole number of bytes"),
        ({}, {"a": "x" * 100_000_000}, ValueError, "the format has 100000000 at most"),
    ],
)
def test_what_cannot_be_made(tensors, metadata, error, match):
    with pytest.raises(error, match=match):
        _tensor_header.make(tensors, metadata)


def test_the_table_is_the_librarys():
    """Each dtype, by way of a file that the library reads, in the order of its own message."""
    with pytest.raises(safetensors.SafetensorError) as error:
        safetensors.deserialize(file_of(about(dtype='"none"'), b"ab"))
    text = str(error.value)
    known = [
        word.strip("` ")
        for word in text.split("expected one of ")[1].split(" at line")[0].split(",")
    ]
    assert known == list(KINDS)
    assert sys.byteorder == "little"
