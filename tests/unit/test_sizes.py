import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmabuf.sizes import as_int, format_size, parse_size, round_up


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        (0, 0),
        (4097, 4097),
        ("0", 0),
        ("17", 17),
        ("17B", 17),
        ("4KiB", 4096),
        ("4K", 4096),
        ("4kB", 4000),
        ("256MiB", 256 << 20),
        ("256 mib", 256 << 20),
        (" 1GiB ", 1 << 30),
        ("1.5GiB", 3 << 29),
        ("0.25KiB", 256),
        ("2T", 2 << 40),
        ("1PB", 10**15),
        ("7EiB", 7 << 60),
    ],
)
def test_a_size_is_read(text, nbytes):
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "text",
    ["", "MiB", "12QiB", "1 2MiB", "1e6", "0x10", "1_000", "-1", "-4KiB", "1.GiB", ".5K", "٣"],
)
def test_text_that_is_no_size_is_a_value_error_that_shows_it(text):
    with pytest.raises(ValueError, match="invalid size") as error:
        parse_size(text)
    assert repr(text) in str(error.value)


def test_sizes_that_cannot_be():
    with pytest.raises(ValueError, match="use a whole number of bytes"):
        parse_size("0.1KiB")
    with pytest.raises(ValueError, match="invalid huge_pages -1: use 0 or more bytes"):
        parse_size(-1, "huge_pages")
    with pytest.raises(ValueError, match=r"use at most 2\*\*63-1 bytes"):
        parse_size(2**63)
    with pytest.raises(ValueError, match=r"use at most 2\*\*63-1 bytes"):
        parse_size("8EiB")


@pytest.mark.parametrize("value", [True, False, 1.0, None, b"1", [1]])
def test_what_is_no_int_is_a_type_error(value):
    with pytest.raises(TypeError, match=f"size must be an int, not {type(value).__name__}"):
        parse_size(value)
    with pytest.raises(TypeError, match="depth must be an int"):
        as_int(value, "depth")


def test_anything_with_index_is_an_int():
    class Seven:
        def __index__(self):
            return 7

    assert as_int(Seven(), "seven") == 7


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (12, "12 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (4097, "4 KiB"),
        (3 << 29, "1.5 GiB"),
        ((1 << 20) - 1, "1 MiB"),
        (256 << 20, "256 MiB"),
        (-(5 << 20), "-5 MiB"),
    ],
)
def test_a_size_is_written(nbytes, text):
    assert format_size(nbytes) == text


@given(st.integers(0, 2**62))
def test_what_is_written_reads_back_within_a_twentieth(nbytes):
    text = format_size(nbytes)
    number, unit = text.split()
    whole = int(number.replace(".", "")) * parse_size(f"1{unit}") // (10 if "." in number else 1)
    assert abs(whole - nbytes) <= nbytes // 20


@given(st.integers(0, 2**62), st.sampled_from([1, 512, 4096, 1 << 21]))
def test_rounding_up(nbytes, unit):
    rounded = round_up(nbytes, unit)
    assert rounded % unit == 0
    assert nbytes <= rounded < nbytes + unit
