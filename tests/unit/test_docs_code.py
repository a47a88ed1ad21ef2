"""The code of the documentation runs, and prints what the pages show."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pages import PAGES, ROOT, blocks_to_run, header_of_model


def isolated():
    """The words that give a command of root a runtime directory of its own."""
    words = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /run && exec "$@"', "sh"]
    return words if subprocess.run([*words, "true"], capture_output=True).returncode == 0 else []


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(blocks_to_run(page.read_text()))],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_the_code_runs_and_prints_what_the_page_shows(page, tmp_path):
    for path in (tmp_path / "model.safetensors", tmp_path / "demo/model.safetensors"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(header_of_model(90_868_376))  # bytes of the model that `make demo` fetches
        os.truncate(path, 90_868_376)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    run = subprocess.run(
        [*isolated(), sys.executable, ROOT / "tests/pages.py", page], cwd=tmp_path,
        env=os.environ | {"PATH": path, "XDG_RUNTIME_DIR": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
