"""Many threads on one File and one Buffer, in ranges that do not overlap."""

import pytest

import dmabuf
from tests.support import assert_same, pattern, poison, together

THREADS = 8
PART = (256 << 10) + 1000
SIZE = THREADS * PART


@pytest.mark.parametrize("route", [None, "staged", "buffered"])
def test_eight_readers(tmp_path, buf, route):
    path = tmp_path / "file"
    path.write_bytes(pattern(SIZE, 1))
    with dmabuf.open(path) as file:

        def read(number):
            at = number * PART
            for size in (1000, 4096, PART):
                transfer = file.read_into(buf, size, file_offset=at, buffer_offset=at, route=route)
                assert transfer.nbytes == size

        together(read)
    assert_same(buf.pread(SIZE, 0), pattern(SIZE, 1), "the buffer")


@pytest.mark.parametrize("route", [None, "staged", "buffered"])
@pytest.mark.parametrize("old", [0, SIZE])
def test_eight_writers_of_one_file(tmp_path, buf, route, old):
    """Their ranges meet inside pages, and the file grows under each of them."""
    path = tmp_path / "file"
    path.write_bytes(pattern(old, 2))
    with dmabuf.open(path, "r+") as file:

        def write(number):
            at = number * PART
            transfer = file.write_from(buf, PART, file_offset=at, buffer_offset=at, route=route)
            assert transfer.nbytes == PART

        together(write)
    assert_same(path.read_bytes(), poison(SIZE), "the file")


def test_writers_that_fail_take_nothing_from_those_that_do_not(tmp_path, buf):
    """Odd ones are refused before they begin, by a file offset that no file has."""
    path = tmp_path / "file"
    with dmabuf.open(path, "w") as file:

        def write(number):
            at = number * PART
            if number % 2:
                with pytest.raises(OSError):
                    file.write_from(buf, PART, file_offset=2**63 - 1 - PART)
            else:
                file.write_from(buf, PART, file_offset=at, buffer_offset=at)

        for _ in range(5):
            together(write)
    data = path.read_bytes()
    assert len(data) == SIZE - PART
    for number in range(0, THREADS, 2):
        at = number * PART
        assert_same(data[at : at + PART], poison(SIZE)[at : at + PART], f"part {number}")
