"""A process that gives up its access to files."""

import pytest

from tests.support import in_child

CONFINED = """
import os, subprocess, sys, threading
from dmabuf.kernel import landlock
kept, other = sys.argv[1:]
held = open(other)
if not landlock.confine({kept: landlock.READ | landlock.LIST, "/no/such/folder": landlock.READ}):
    print("no Landlock")
    sys.exit()
assert held.read() == "other"  # what is open stays usable

def tries():
    assert open(f"{kept}/file").read() == "kept" and os.listdir(kept) == ["file"]
    for call in (
        lambda: open(other), lambda: open(f"{kept}/file", "w"), lambda: open(f"{kept}/new", "x"),
        lambda: os.listdir("/"), lambda: subprocess.run([sys.executable, "-c", ""]),
        lambda: os.mkdir(f"{kept}/folder"), lambda: os.remove(f"{kept}/file"),
    ):
        try:
            call()
        except PermissionError:
            done.append(call)

done = []
tries()
thread = threading.Thread(target=tries)
thread.start()
thread.join()
print(len(done))
"""


def test_a_confined_process_reads_what_is_kept_and_nothing_else(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("kept")
    (tmp_path / "other").write_text("other")
    told = in_child(CONFINED, tmp_path / "kept", tmp_path / "other").strip()
    if told == "no Landlock":
        pytest.skip("needs Landlock: a kernel with lsm=landlock,... on its command line")
    assert told == "14"
    assert (tmp_path / "kept" / "file").read_text() == "kept"
