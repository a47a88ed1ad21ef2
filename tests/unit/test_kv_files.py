"""KvFiles and KvNames, as LMCache's adapter for native connectors calls them."""

import os
import select
from functools import partial

import pytest

import dmabuf
from dmabuf.integrations.lmcache_files import KvFiles, KvNames
from tests.nodes import node
from tests.support import assert_same, cached, pattern, poison, wait_until

pytestmark = pytest.mark.usefixtures("leaves_nothing")

SIZES = [4096, 1, 300_001, 7, 1 << 20, 70_000]
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


@pytest.fixture(params=["files", "names"])
def opened(request, tmp_path):
    """A function that opens the cache, in files or in the store of a node."""
    if request.param == "files":
        yield partial(KvFiles, str(tmp_path / "kv"))
        return
    (tmp_path / "served").mkdir()
    with node(tmp_path / "served", f"unix:{tmp_path}/node.sock") as listener:
        yield partial(KvNames, listener.address)


@pytest.fixture(params=["4KiB", "1MiB", "64MiB"])
def files(request, opened):
    files = opened(block_size=request.param)
    yield files
    files.close()


def test_objects_come_back_byte_for_byte_also_in_another_process(files, opened):
    store(files)
    files.close()
    files.close()
    again = opened()
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


def test_batches_at_once_have_a_buffer_each(opened):
    files = opened(threads=3, block_size="1MiB")
    try:
        objects = {f"key {number}": pattern(200_000, number) for number in range(40)}
        keys, tasks = list(objects), {}
        for at in range(0, 40, 4):
            some = keys[at : at + 4]
            tasks[files.submit_batch_set(some, [memoryview(objects[key]) for key in some])] = some
        ended = every(files, tasks)
        assert all(one[1:] == (True, "", None) for one in ended)
        memory = {key: bytearray(poison(200_000)) for key in keys}
        tasks = {}
        for at in range(0, 40, 4):
            some = keys[at : at + 4]
            tasks[files.submit_batch_get(some, [memoryview(memory[key]) for key in some])] = some
        assert all(one[1:] == (True, "", [True] * 4) for one in every(files, tasks))
        for key, data in objects.items():
            assert_same(bytes(memory[key]), data, key)
    finally:
        files.close()


def every(files, tasks):
    """Return the completions of all of these batches."""
    ended = []

    def collect():
        ended.extend(files.drain_completions())
        return len(ended) == len(tasks)

    wait_until(collect, "the end of all batches")
    assert {one[0] for one in ended} == set(tasks)
    return ended


def test_a_node_that_ends_fails_a_batch_and_the_next_one_connects_again(tmp_path):
    (tmp_path / "served").mkdir()
    address = f"unix:{tmp_path}/node.sock"
    with node(tmp_path / "served", address):
        names = KvNames(address, threads=1)
        store(names)
    try:
        (ok, error, found), memory = load(names)
        assert (ok, found) == (False, None) and "node.sock" in error
        for size, one in zip(SIZES, memory, strict=True):
            assert_same(bytes(one), poison(size), "memory of a batch that failed")
        with node(tmp_path / "served", address):
            assert load(names)[0] == (True, "", [False] * len(SIZES))  # a new store
            store(names)
            outcome, memory = load(names)
            assert outcome[2] == [True] * len(SIZES)
            assert_same(bytes(memory[4]), an_object(4), "an object")
    finally:
        names.close()


def test_a_full_store_fails_the_batch(tmp_path):
    (tmp_path / "served").mkdir()
    address = f"unix:{tmp_path}/node.sock"
    with node(tmp_path / "served", address, max_memory=8 << 20):
        names = KvNames(address, threads=1)
        try:
            large = memoryview(bytes(16 << 20))
            ok, error, _ = wait(names, names.submit_batch_set(["large"], [large]))
            assert not ok and "max-memory" in error
            store(names)
            assert wait(names, names.submit_batch_exists(["large", KEYS[0]]))[2] == [False, True]
        finally:
            names.close()


def test_no_node_is_an_error_at_the_start(tmp_path):
    with pytest.raises(FileNotFoundError):
        KvNames(f"unix:{tmp_path}/none.sock")


def test_an_object_of_no_bytes(tmp_path):
    files = KvFiles(str(tmp_path))
    try:
        assert wait(files, files.submit_batch_set(["none"], [memoryview(b"")]))[0]
        assert load(files, ["none"], [0])[0] == (True, "", [True])
    finally:
        files.close()


def test_an_error_is_reported_and_the_next_batch_works(tmp_path):
    files = KvFiles(str(tmp_path / "kv"))
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
    files.close()


def test_invalid_arguments(tmp_path):
    for how in ({"require": "fast"}, {"threads": 0}, {"block_size": "much"}):
        with pytest.raises(ValueError):
            KvFiles(str(tmp_path), **how)
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        KvFiles(str(tmp_path / "file"))
