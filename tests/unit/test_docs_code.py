"""The code of the documentation runs, and prints what the pages show."""

import sys
from pathlib import Path

import pytest

from tests.pages import PAGES, ROOT, blocks_to_run, run_apart


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(blocks_to_run(page.read_text()))],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_the_code_runs_and_prints_what_the_page_shows(page, tmp_path):
    run = run_apart(page, tmp_path, Path(sys.executable))
    assert run.returncode == 0, run.stderr
