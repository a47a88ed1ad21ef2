"""What a transfer costs in system calls, counted by strace: native no more than direct."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dmabuf.transfer.engine import default_engine
from tests.guards import needs

REQUESTS = 64
ROOT = Path(__file__).parents[2]

TRANSFERS = """
import array, os, sys
from tests import emulation
import dmabuf
path, backend, *routes = sys.argv[1:]
segments = array.array("Q", [n for at in range({requests}) for n in (at * 4096, at * 4096, 4096)])
size = {requests} * 4096
make = emulation.engine if backend == "threads" else dmabuf.Engine
engine = make(block_size=4096, backend=backend)
with engine, dmabuf.allocate(size, exporter="udmabuf") as buffer:
    with dmabuf.open(path, "r+", engine=engine) as file:
        for route in routes:
            for transfer in (file.read_segments, file.write_segments):
                for _ in range(2):  # the first maps, registers and is compared
                    transfer(buffer, segments, route=route)
                os.access("/begin", os.F_OK)
                done = transfer(buffer, segments, route=route)
                os.access("/end", os.F_OK)
                print(done.route.value, done.requests)
"""


def system_calls(folder, backend, routes):
    """The calls of a transfer of REQUESTS requests in the thread that submits them.

    By route, those of a read and those of a write.
    """
    trace = folder / "trace"
    done = subprocess.run(
        ["strace", "--kill-on-exit", "-f", "-qq", "-o", trace, sys.executable, "-c",
         TRANSFERS.format(requests=REQUESTS), os.environ["DMABUF_TEST_NVME0"], backend, *routes],
        check=True, capture_output=True, text=True, timeout=400, cwd=ROOT,
    )  # fmt: skip
    taken = [route for route in routes for _ in ("read", "write")]
    assert done.stdout.splitlines() == [f"{route} {REQUESTS}" for route in taken]
    lines = [line.split(maxsplit=1) for line in trace.read_text().splitlines()]
    own = next(thread for thread, call in lines if '"/begin"' in call)
    counted, calls = [], None
    for call in (call for thread, call in lines if thread == own):
        if '"/begin"' in call:
            counted.append(calls := [])
        elif '"/end"' in call:
            calls = None
        elif calls is not None and "resumed>" not in call:
            calls.append(call.partition("(")[0])
    found = {route: counted[2 * at : 2 * at + 2] for at, route in enumerate(routes)}
    print(found)
    return found


@needs("nvme", "udmabuf", "io_uring")
@pytest.mark.timeout(500)
def test_native_takes_no_more_than_direct(tmp_path):
    engine = default_engine()
    native = engine.backend == "io_uring" and engine.no_native() is None
    counts = system_calls(tmp_path, "io_uring", ["direct", "native"] if native else ["direct"])
    for direct in counts["direct"]:
        assert 0 < len(direct) <= REQUESTS
    for native, direct in zip(counts.get("native", ()), counts["direct"], strict=False):
        assert len(native) <= len(direct)


@needs("nvme", "udmabuf")
@pytest.mark.timeout(500)
def test_emulated_native_takes_no_more_than_direct(tmp_path):
    """On any kernel: all but what moves the bytes is the same code, with threads for both routes.

    How often it waits for those threads (futex) is a matter of luck, and left out.
    """
    counts = system_calls(tmp_path, "threads", ["direct", "native"])
    for native, direct in zip(counts["native"], counts["direct"], strict=True):
        native, direct = ([n for n in names if n != "futex"] for names in (native, direct))
        assert 0 < len(native) <= len(direct) <= REQUESTS
