"""Power cuts while files are replaced: the old file or the new one is there, whole.

DMABUF_CUTS is the number of cuts of each filesystem; by default there are few.
"""

import os

import pytest

from tests.guards import needs
from tests.kernel import power
from tests.support import pattern, run
from tests.writers import WRITERS

CUTS = int(os.environ.get("DMABUF_CUTS", "60"))
SIZES = (90_001, 262_144, 123_457, 70_000)
"""Of each version: with and without a part of a page at the end."""
VERSIONS = {
    name: [pattern(size, 10 * number + version) for version, size in enumerate(SIZES)]
    for number, name in enumerate(WRITERS)
}


@pytest.mark.timeout(10 * CUTS)
@needs("udmabuf", "loop", "ext4", "xfs")
@pytest.mark.parametrize("filesystem", ["ext4", "xfs"])
def test_a_power_cut_leaves_the_old_file_or_the_new_one(filesystem, tmp_path):
    folder = tmp_path / "mnt" / "files"
    with power.recording(filesystem, tmp_path, folder.parent) as (recorder, start, log):
        folder.mkdir()
        os.sync()
        for version in range(len(SIZES)):
            for name, writer in WRITERS.items():
                recorder.mark(f"begins:{name}:{version}")
                writer.write(folder / name, VERSIONS[name][version])
                recorder.mark(f"ends:{name}:{version}")
    marks = power.positions(log)
    seen: dict[str, set[int]] = {name: set() for name in WRITERS}
    mounter = power.Mounter(filesystem, folder.parent, run("losetup", "--find"))
    count = 0
    for cut in power.cuts(start, log, tmp_path / "scratch", 1, CUTS):
        count += 1
        with mounter.mounted(cut.image):
            for name, writer in WRITERS.items():
                there = writer.read(folder / name)
                where = f"{name} on {filesystem}, {cut.how}"
                states = [None, *VERSIONS[name]]
                state = next((at for at, one in enumerate(states) if one == there), None)
                assert state is not None, f"{where}: neither old nor new, {len(there)} bytes"
                passed = [one for one, at in marks.items() if at <= cut.position]
                begun = sum(one.startswith(f"begins:{name}:") for one in passed)
                ended = sum(one.startswith(f"ends:{name}:") for one in passed)
                assert (ended if writer.durable else 0) <= state <= begun, where
                seen[name].add(state)
    print(f"{filesystem}: {count} cuts, {count * len(WRITERS)} files or models, none torn")
    assert all(len(states) > 2 for states in seen.values()), f"the cuts change nothing: {seen}"
