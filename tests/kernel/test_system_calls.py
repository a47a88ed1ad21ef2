"""What a transfer costs in system calls, counted by strace: native no more than direct."""

import os
import subprocess
import sys

import pytest

from dmabuf.engine import default_engine
from tests.guards import needs

REQUESTS = 64

TRANSFER = """
import array, os, sys
import dmabuf
path, route, direction = sys.argv[1:]
segments = array.array("Q", [n for at in range({requests}) for n in (at * 4096, at * 4096, 4096)])
size = {requests} * 4096
engine = dmabuf.Engine(block_size=4096, backend="io_uring")
with engine, dmabuf.allocate(size, exporter="udmabuf") as buffer:
    with dmabuf.open(path, "r+", engine=engine) as file:
        transfer = file.read_segments if direction == "read" else file.write_segments
        for _ in range(2):  # the first maps, registers and is compared
            transfer(buffer, segments, route=route)
        os.access("/begin", os.F_OK)
        done = transfer(buffer, segments, route=route)
        os.access("/end", os.F_OK)
print(done.route.value, done.requests)
"""


def system_calls(folder, route, direction):
    """The names of the system calls that one transfer of REQUESTS requests makes."""
    trace = folder / f"{route}-{direction}"
    done = subprocess.run(
        ["strace", "--kill-on-exit", "-f", "-qq", "-o", trace, sys.executable, "-c",
         TRANSFER.format(requests=REQUESTS), os.environ["DMABUF_TEST_NVME0"], route, direction],
        check=True, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.stdout.split() == [route, str(REQUESTS)]
    lines = [line.split(maxsplit=1)[1] for line in trace.read_text().splitlines()]
    begin = next(at for at, line in enumerate(lines) if '"/begin"' in line)
    end = next(at for at, line in enumerate(lines) if '"/end"' in line)
    return [line.partition("(")[0] for line in lines[begin + 1 : end] if "resumed>" not in line]


@needs("nvme", "udmabuf", "io_uring")
@pytest.mark.timeout(500)
@pytest.mark.parametrize("direction", ["read", "write"])
def test_native_takes_no_more_than_direct(tmp_path, direction):
    direct = system_calls(tmp_path, "direct", direction)
    print(f"direct {direction}: {len(direct)} for {REQUESTS} requests: {direct}")
    assert len(direct) <= REQUESTS, direct
    if default_engine().no_native() is None:
        native = system_calls(tmp_path, "native", direction)
        print(f"native {direction}: {len(native)} for {REQUESTS} requests: {native}")
        assert len(native) <= len(direct), native
