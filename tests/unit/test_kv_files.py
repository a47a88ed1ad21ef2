"""KvFiles, as LMCache's adapter for native connectors calls it."""

import os
import select

import pytest

import dmabuf
from dmabuf.integrations.lmcache_files import KvFiles
from tests.support import assert_same, cached, pattern, poison

pytestmark = pytest.mark.usefixtures("leaves_nothing")

SIZES = [4096, 1, 300_001, 0, 1 << 20, 70_000]
KEYS = [f"meta-llama/Llama-3@0000000{number}@0@{number:064x}" for number in range(len(SIZES))]


def an_object(number):
    return pattern(SIZES[number], number)


def wait(files, number):
    """Return the completion of a batch, by the eventfd."""
    poll = select.poll()
    poll.register(files.event_fd(), select.POLLIN)
    while True:
        assert poll.poll(30_000)
        for completion in files.drain_completions():
            assert completion[0] == number
            assert not poll.poll(0)
            return completion[1:]


def store(files):
    objects = [memoryview(an_object(number)) for number in range(len(SIZES))]
    assert wait(files, files.submit_batch_set(KEYS, objects)) == (True, "", None)


def load(files, keys=KEYS, sizes=SIZES):
    memory = [bytearray(poison(size)) for size in sizes]
    outcome = wait(files, files.submit_batch_get(keys, [memoryview(one) for one in memory]))
    return outcome, memory


@pytest.fixture(params=["4KiB", "1MiB", "64MiB"])
def files(request, tmp_path):
    files = KvFiles(str(tmp_path / "kv"), block_size=request.param)
    yield files
    files.close()


def test_objects_come_back_byte_for_byte_also_in_another_process(files, tmp_path):
    store(files)
    files.close()
    files.close()
    again = KvFiles(str(tmp_path / "kv"))
    try:
        outcome, memory = load(again)
        assert outcome == (True, "", [True] * len(SIZES))
        for number, got in enumerate(memory):
            assert_same(bytes(got), an_object(number), KEYS[number])
    finally:
        again.close()
    with pytest.raises(dmabuf.ClosedError):
        files.submit_batch_exists(KEYS)


def test_what_is_missing_or_of_another_size_is_not_found(files):
    store(files)
    keys = [KEYS[0], "none", KEYS[2], KEYS[4]]
    sizes = [SIZES[0], 100, SIZES[2] - 1, SIZES[4] + 1]
    outcome, memory = load(files, keys, sizes)
    assert outcome == (True, "", [True, False, False, False])
    for number in (1, 2, 3):
        assert_same(bytes(memory[number]), poison(sizes[number]), "memory of what is not found")
    assert wait(files, files.submit_batch_exists(keys))[2] == [True, False, True, True]


def test_objects_are_replaced_and_deleted(files):
    store(files)
    assert wait(files, files.submit_batch_set(KEYS[:1], [memoryview(b"new")]))[0]
    outcome, memory = load(files, KEYS[:1], [3])
    assert (outcome[2], memory) == ([True], [b"new"])
    assert wait(files, files.submit_batch_delete([KEYS[0], "none"])) == (True, "", [True, False])
    assert wait(files, files.submit_batch_exists(KEYS[:2]))[2] == [False, True]


def test_the_files_are_not_in_the_page_cache(tmp_path):
    files = KvFiles(str(tmp_path), require="uncached")
    try:
        data = pattern(3 << 20, 9)
        assert wait(files, files.submit_batch_set(["key"], [memoryview(data)])) == (True, "", None)
        outcome, memory = load(files, ["key"], [len(data)])
        assert outcome == (True, "", [True]) and memory == [data]
    finally:
        files.close()
    [path] = [path for path in tmp_path.rglob("*") if path.is_file()]
    with path.open("rb") as plain:
        assert cached(plain.fileno()) == 0


def test_an_error_is_reported_and_the_next_batch_works(files, tmp_path):
    blocked = tmp_path / "kv" / "blocked"
    store(files)
    for folder in (tmp_path / "kv").iterdir():
        folder.rename(blocked)
        folder.write_text("a file where a folder should be")
        break
    else:
        raise AssertionError
    ok, error, outcome = wait(
        files, files.submit_batch_set(KEYS, [memoryview(an_object(n)) for n in range(len(SIZES))])
    )
    assert (ok, outcome) == (False, None) and "rror" in error
    folder.unlink()
    os.rename(blocked, folder)
    store(files)


def test_invalid_arguments(tmp_path):
    for how in ({"require": "fast"}, {"threads": 0}, {"block_size": "much"}):
        with pytest.raises(ValueError):
            KvFiles(str(tmp_path), **how)
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        KvFiles(str(tmp_path / "file"))
