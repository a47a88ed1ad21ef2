import copy
import errno
import pickle
from pathlib import Path

import pytest

from dmabuf.errors import (
    BusyError,
    ClosedError,
    IntegrityError,
    RouteUnavailable,
    ShortReadError,
    os_error,
)

EXAMPLES = [
    RouteUnavailable("no O_DIRECT on tmpfs", "/tmp/x", route="direct", plan={"route": "buffered"}),
    RouteUnavailable("no O_DIRECT on a pipe"),
    IntegrityError("read back differently", "/tmp/x", offset=512),
    BusyError("a transfer is running"),
    ClosedError("this buffer is closed"),
    ShortReadError("the file ended", index=3, nbytes=10),
    ShortReadError("the file ended"),
]


@pytest.mark.parametrize("error", EXAMPLES, ids=str)
@pytest.mark.parametrize("again", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy])
def test_a_copy_says_and_holds_the_same(error, again):
    twin = again(error)
    assert type(twin) is type(error)
    assert str(twin) == str(error)
    assert twin.args == error.args
    assert vars(twin) == vars(error)
    assert getattr(twin, "filename", None) == getattr(error, "filename", None)


def test_each_is_caught_as_the_nearest_builtin():
    assert issubclass(RouteUnavailable, OSError) and issubclass(IntegrityError, OSError)
    assert issubclass(BusyError, BufferError)
    assert issubclass(ClosedError, ValueError)
    assert issubclass(ShortReadError, EOFError)


def test_what_they_say_and_hold():
    error = EXAMPLES[0]
    assert str(error) == f"[Errno {errno.EOPNOTSUPP}] no O_DIRECT on tmpfs: '/tmp/x'"
    assert (error.errno, error.reason, error.route) == (errno.EOPNOTSUPP, error.strerror, "direct")
    assert str(EXAMPLES[1]) == f"[Errno {errno.EOPNOTSUPP}] no O_DIRECT on a pipe"
    assert (EXAMPLES[2].errno, EXAMPLES[2].offset) == (errno.EIO, 512)
    assert str(EXAMPLES[5]) == "the file ended"
    assert (EXAMPLES[5].index, EXAMPLES[5].nbytes) == (3, 10)


def test_a_plain_os_error_is_of_the_class_of_its_errno():
    error = os_error(errno.EACCES, "opening: not ours", Path("/x"))
    assert type(error) is PermissionError
    assert str(error) == "[Errno 13] opening: not ours: '/x'"
    assert str(os_error(errno.EIO, "reading: it broke")) == "[Errno 5] reading: it broke"
