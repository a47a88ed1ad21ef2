"""Send Files and Buffers to children: `python -m tests.unit.sending processes METHOD FILE`.

METHOD is a start method of multiprocessing. `loader` is PyTorch's DataLoader, `pool` a Pool.
"""

import errno
import multiprocessing
import sys
from pathlib import Path

import dmabuf


def child(file, buffer, empty, inbox, outbox):
    outbox.put((file.read_into(buffer).nbytes, buffer.name, file.mode, buffer.exporter))
    assert empty.read_into(buffer, 1).nbytes == 0 and empty.writable()
    buffer.pwrite(b"from the child", 0)
    other = inbox.get(timeout=100)
    outbox.put((other, other.pread(5, 0)))
    inbox.get(timeout=100)  # the descriptors are fetched from this process


def send_to_processes(method, path):
    context = multiprocessing.get_context(method)
    content = Path(path).read_bytes()
    inbox, outbox = context.Queue(), context.Queue()
    with (
        dmabuf.allocate(len(content), name="to a child") as buffer,
        dmabuf.allocate(4096) as other,
        dmabuf.open(path) as file,
        dmabuf.open(f"{path}.new", "x") as empty,
    ):
        other.pwrite(b"other", 0)
        process = context.Process(target=child, args=(file, buffer, empty, inbox, outbox))
        process.start()
        told = outbox.get(timeout=100)
        assert told == (len(content), "to a child", "r", buffer.exporter), told
        inbox.put(other)
        with outbox.get(timeout=100)[0] as again:
            assert again.pread(5, 0) == b"other"
            again.pwrite(b"OTHER", 0)
        assert other.pread(5, 0) == b"OTHER"
        inbox.put(None)
        process.join(100)
        assert process.exitcode == 0
        assert buffer.pread(14, 0) == b"from the child"
        assert buffer.pread(len(content), 14) == content[14:]


def read(file):
    with dmabuf.allocate(4096) as buffer:
        return file.read_into(buffer).nbytes


def plan(file):
    with dmabuf.allocate(4096) as buffer:
        return file.plan(buffer).route


def size(file):
    return file.size


def enter(file):
    with file:
        pass


def send_to_pool(method, path):
    """A worker that cannot open a File raises at its use: a Pool loses tasks it cannot unpickle."""
    with multiprocessing.get_context(method).Pool(1) as pool:
        with dmabuf.open(path) as file, dmabuf.open(f"{path}.gone", "x") as gone:
            Path(f"{path}.gone").unlink()
            assert pool.apply_async(read, (file,)).get(100) == 4096
            Path(f"{path}.new").write_bytes(b"another")
            Path(f"{path}.new").rename(path)
            for sent, number in (file, errno.ESTALE), (gone, errno.ENOENT):
                for use in (read, plan, size, dmabuf.File.fileno, enter):
                    try:
                        told = pool.apply_async(use, (sent,)).get(100)
                    except OSError as error:
                        told = error.errno, error.filename
                    assert told == (number, sent.name), (use, told)
                told = pool.apply_async(repr, (sent,)).get(100)
                assert repr(sent.name) in told and "closed" not in told, told
        pool.close()
        pool.join()


class Pages:
    """A data set of the pages of a file."""

    def __init__(self, path):
        self.file = dmabuf.open(path)

    def __len__(self):
        return self.file.size // 4096

    def __getitem__(self, page):
        with dmabuf.allocate(4096) as buffer:
            self.file.read_into(buffer, file_offset=page * 4096)
            return list(buffer[:])


def send_to_loader(method, path):
    from torch.utils.data import DataLoader

    pages = Pages(path)
    loader = DataLoader(pages, batch_size=None, num_workers=4, multiprocessing_context=method)
    assert b"".join(map(bytes, loader)) == Path(path).read_bytes()


if __name__ == "__main__":
    ways = {"processes": send_to_processes, "loader": send_to_loader, "pool": send_to_pool}
    ways[sys.argv[1]](*sys.argv[2:])
