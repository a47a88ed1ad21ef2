"""The store's messages, as pure functions: whatever comes, it is a request or a Refusal."""

import errno
import json
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dmabuf.store import protocol
from dmabuf.store.protocol import Grant, Loaded, Refusal, Request, Status, Usage

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/"), min_size=1, max_size=60)
FIELDS = {
    "name": NAMES.filter(lambda name: name not in (".", "..") and name.isprintable()),
    "to": st.just("other"),
    "size": st.integers(1, 2**62),
    "length": st.integers(0, 2**62),
    "number": st.none() | st.integers(1, 2**62),
    "unnamed": st.integers(1, 2**62),
    "mode": st.integers(0, 0o777),
    "exporter": st.text(max_size=64),
    "huge_pages": st.booleans() | st.integers(1, 2**40),
    "trusted": st.booleans(),
    "file_offset": st.integers(0, 2**62),
    "replace": st.booleans(),
    "cached": st.booleans(),
    "after": st.text(max_size=255),
    "uid": st.integers(-1, 2**32 - 2),
    "gid": st.integers(-1, 2**32 - 2),
    "accessed_ns": st.integers(-1, 2**63 - 1),
    "modified_ns": st.integers(-1, 2**63 - 1),
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    op = draw(st.sampled_from(sorted(protocol.OPERATIONS)))
    fields = {field: draw(FIELDS[field]) for field in protocol.OPERATIONS[op]}
    if op == "open":
        fields["mode"] = draw(st.sampled_from(["r", "r+"]))
    if op in ("rename", "link"):
        fields["replace"] = draw(st.booleans() | st.integers(1, 2**62))
    return Request(op, fields)


def whatever(data: bytes) -> Request | Refusal:
    try:
        return protocol.parse_request(data)
    except Refusal as refusal:
        assert refusal.errno and refusal.text
        return refusal


@given(requests())
def test_a_request_comes_over_as_it_was(request_: Request) -> None:
    data = protocol.pack_request(request_.op, **request_.fields)
    assert len(data) <= protocol.REQUEST_BYTES
    assert protocol.parse_request(data) == request_


@given(st.binary(max_size=5000))
@example(b"[" * 4096)
@example(b'{"op":' + b"[" * 4000)
@example(b'{"op":"list","after":' + b"9" * 4000 + b"}")
@example(b'{"op":"stat","name":"\xff"}')
@example(b'{"op":"stat","name":"\\ud800"}')
@example(b'{"op":"create","name":"n","size":NaN}')
@example(b"\xef\xbb\xbf{}")
def test_bytes_are_a_request_or_refused(data: bytes) -> None:
    whatever(data)


@given(JSON)
def test_json_is_a_request_or_refused(value: object) -> None:
    whatever(json.dumps(value).encode())


@given(requests(), st.data())
def test_a_field_that_is_another(request_: Request, data: st.DataObject) -> None:
    """One field of a good request replaced: refused, or in the range that is documented."""
    if not request_.fields:
        return
    field = data.draw(st.sampled_from(sorted(request_.fields)))
    value = data.draw(JSON | st.integers(-(2**70), 2**70))
    raw = {"op": request_.op, **request_.fields, field: value}
    found = whatever(json.dumps(raw).encode())
    if isinstance(found, Request):
        got = found.fields[field]
        assert type(got) in (bool, int, str, type(None))
        assert field not in ("size", "unnamed") or 1 <= got <= 2**62
        assert field not in ("number", "length") or got is None or 0 <= got <= 2**62
        assert field != "mode" or got in ("r", "r+") or 0 <= got <= 0o777
        assert field != "name" or got is None or protocol.check_name(got)


@given(requests(), st.data())
def test_fields_are_all_there_and_no_others(request_: Request, data: st.DataObject) -> None:
    more = {"op": request_.op, **request_.fields, "uid_of_mine": 0}
    assert isinstance(whatever(json.dumps(more).encode()), Refusal)
    if request_.fields:
        less = {"op": request_.op, **request_.fields}
        del less[data.draw(st.sampled_from(sorted(request_.fields)))]
        assert isinstance(whatever(json.dumps(less).encode()), Refusal)


@given(st.binary(max_size=2000) | JSON.map(lambda value: json.dumps(value).encode()))
def test_a_reply_is_a_result_or_refused(data: bytes) -> None:
    try:
        result = protocol.parse_reply(data)
    except Refusal:
        return
    for record in (Status, Grant, Usage, Loaded):
        try:
            protocol.parse_record(record, result.get("x"))
        except Refusal as refusal:
            assert refusal.errno == errno.EPROTO


STATUS = Status("n", 8192, 5, 0o640, 1, 2, 3, 4, 5, 6, "udmabuf", "why", 1, True, 7, False, None)


def test_records_come_over_as_they_were() -> None:
    grant, usage = Grant("dma-buf", 1, True, False, 7), Usage(1, 2, 3, 4)
    loaded = Loaded("why", True, "how", 1, 2, 3, "every byte")
    data = protocol.pack_result(status=STATUS, grant=grant, usage=usage, loaded=loaded)
    result = protocol.parse_reply(data)
    assert protocol.parse_record(Status, result["status"]) == STATUS
    assert protocol.parse_record(Grant, result["grant"]) == grant
    assert protocol.parse_record(Usage, result["usage"]) == usage
    assert protocol.parse_record(Loaded, result["loaded"]) == loaded
    for wrong in ({**result["usage"], "names": True}, {**result["usage"], "more": 1}, [1], None):
        with pytest.raises(Refusal):
            protocol.parse_record(Usage, wrong)
    with pytest.raises(Refusal) as caught:
        protocol.parse_reply(protocol.pack_error(Refusal(errno.EACCES, "no", "n")))
    assert (caught.value.errno, caught.value.text, caught.value.name) == (errno.EACCES, "no", "n")


@given(st.integers(0, 300), st.sampled_from(["a", '"', "\\", "é", "漢"]))
def test_a_listing_fits_into_a_reply(count: int, letter: str) -> None:
    name = letter * (255 // len(letter.encode()))
    one = replace(STATUS, name=name, reason="why " * 60)
    data = protocol.pack_listing([one] * count)
    assert len(data) <= protocol.REPLY_BYTES
    names = protocol.parse_reply(data)["names"]
    assert len(names) >= min(count, 8)
    assert all(protocol.parse_record(Status, value) == one for value in names)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("", errno.EINVAL),
        (".", errno.EINVAL),
        ("..", errno.EINVAL),
        ("a/b", errno.EINVAL),
        ("a\0b", errno.EINVAL),
        ("a\nb", errno.EINVAL),
        ("\x1b[2J", errno.EINVAL),
        ("\u202e", errno.EINVAL),
        ("\udcff", errno.EINVAL),
        ("a" * 256, errno.ENAMETOOLONG),
        ("é" * 128, errno.ENAMETOOLONG),
        (b"bytes", errno.EINVAL),
        (7, errno.EINVAL),
    ],
)
def test_what_is_no_name(name: object, number: int) -> None:
    with pytest.raises(Refusal) as caught:
        protocol.check_name(name)
    assert caught.value.errno == number


@pytest.mark.parametrize("name", ["a", "a b", ".hidden", "-", "é" * 127, "a" * 255, "漢字", "..."])
def test_what_is_a_name(name: str) -> None:
    assert protocol.check_name(name) == name


@pytest.mark.parametrize(
    "fields",
    [
        {"op": "create", "name": "n", "size": True},
        {"op": "create", "name": "n", "size": 0},
        {"op": "create", "name": "n", "size": 2**62 + 1},
        {"op": "create", "name": "n", "mode": 0o1000},
        {"op": "create", "name": "n", "mode": -1},
        {"op": "create", "name": "n", "trusted": 1},
        {"op": "create", "name": "n", "exporter": "x" * 65},
        {"op": "create", "name": "n", "huge_pages": 0},
    ],
)
def test_values_that_cannot_be(fields: dict[str, object]) -> None:
    good = {"size": 1, "mode": 0, "exporter": "auto", "huge_pages": False, "trusted": False}
    found = whatever(json.dumps({**good, **fields}).encode())
    assert isinstance(found, Refusal)
    assert found.errno == errno.EINVAL
    assert isinstance(whatever(json.dumps({"op": "create", "name": "n", **good}).encode()), Request)
