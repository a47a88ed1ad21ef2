"""Where tensors go in a buffer, and the segments that bring them there."""

from hypothesis import given
from hypothesis import strategies as st

from dmabuf._tensor_layout import UNIT, Wanted, place
from tests.support import pattern


def carried(segments, data, size):
    """A buffer of `size` bytes after the segments, and which of them were written."""
    out, touched = bytearray(size), bytearray(size)
    for i in range(0, len(segments), 3):
        file_offset, at, nbytes = segments[i : i + 3]
        assert nbytes and file_offset + nbytes <= len(data) and at + nbytes <= size
        assert not any(touched[at : at + nbytes]), "two segments have a destination in common"
        touched[at : at + nbytes] = b"\1" * nbytes
        out[at : at + nbytes] = data[file_offset : file_offset + nbytes]
    return bytes(out)


@st.composite
def files(draw):
    """Tensors one after another behind a header, some of them wanted."""
    at = draw(st.integers(8, 3 * UNIT))
    every, wanted = [], []
    for _ in range(draw(st.integers(0, 8))):
        nbytes = draw(st.sampled_from([0, 1, 7, 8, 24, UNIT - 1, UNIT, 3 * UNIT + 5]))
        one = Wanted(at, nbytes, draw(st.sampled_from([1, 2, 4, 8, 64, 512, UNIT, 4 * UNIT])))
        every.append(one)
        if draw(st.booleans()):
            wanted.append(one)
        at += nbytes
    return draw(st.permutations(wanted)), at, draw(st.sampled_from([0, 1, UNIT, 5 * UNIT + 3]))


@given(files())
def test_each_tensor_is_whole_aligned_and_in_nobodys_way(file):
    wanted, size, begin = file
    data = pattern(size, 1)
    segments, end = place(wanted, size, begin)
    buffer = carried(segments, data, end)
    for one in wanted:
        assert one.place % one.align == 0
        if one.nbytes:
            assert begin <= one.place and one.place + one.nbytes <= end
            got = buffer[one.place : one.place + one.nbytes]
            assert got == data[one.offset : one.offset + one.nbytes]


@given(files())
def test_it_reads_no_more_than_the_pages_of_what_is_wanted(file):
    wanted, size, begin = file
    segments, _ = place(wanted, size, begin)
    pages = set()
    for one in wanted:
        if one.nbytes:
            pages |= set(range(one.offset // UNIT, (one.offset + one.nbytes - 1) // UNIT + 1))
    for i in range(0, len(segments), 3):
        start, nbytes = segments[i], segments[i + 2]
        assert set(range(start // UNIT, (start + nbytes - 1) // UNIT + 1)) <= pages


def test_a_whole_file_is_one_segment_from_its_first_page_on():
    wanted = [Wanted(4104 + 1000 * i, 1000, 4) for i in range(100)]
    segments, end = place(wanted, 104104, 0)
    assert list(segments) == [4096, 0, 104104 - 4096] and end == 104104 - 4096
    assert [one.place for one in wanted] == [8 + 1000 * i for i in range(100)]


def test_a_gap_of_less_than_a_page_of_its_own_does_not_part_them():
    wanted = [Wanted(100, UNIT, 4), Wanted(2 * UNIT + 4, 8, 4)]
    assert list(place(wanted, 4 * UNIT, 0)[0]) == [0, 0, 3 * UNIT]


def test_a_gap_of_a_page_does():
    wanted = [Wanted(100, 8, 4), Wanted(2 * UNIT + 4, 8, 4)]
    segments, end = place(wanted, 4 * UNIT, 0)
    assert list(segments) == [0, 0, UNIT, 2 * UNIT, UNIT, UNIT] and end == 2 * UNIT
    assert [one.place for one in wanted] == [100, UNIT + 4]


def test_unaligned_ones_are_shifted_together():
    wanted = [Wanted(8, 3, 1), Wanted(11, 8, 4), Wanted(19, 12, 4), Wanted(31, 4, 2)]
    segments, end = place(wanted, 35, 0)
    assert list(segments) == [0, 0, 35, 11, 36, 24] and end == 60
    assert [one.place for one in wanted] == [8, 36, 44, 56]


def test_one_with_a_larger_alignment_is_not_shifted_with_one_of_a_smaller():
    wanted = [Wanted(9, 64, 2), Wanted(73, 64, 64)]
    segments, end = place(wanted, 137, 2)
    assert list(segments) == [9, 2, 64, 73, 128, 64] and end == 192
    assert [one.place for one in wanted] == [2, 128]


def test_the_next_file_begins_on_a_page():
    segments, end = place([Wanted(8, 8, 8)], 16, 16)
    assert list(segments) == [0, UNIT, 16] and end == UNIT + 16


def test_no_bytes_take_no_segment():
    assert place([Wanted(8, 0, 8)], 8, 5) == (place([], 8, 5)[0], 5)
