"""The charts and tables of `dmabuf bench` as one page that needs nothing else."""

from __future__ import annotations

import io
from html import escape
from pathlib import Path

from dmabuf.bench import chart
from dmabuf.bench.result import Result
from dmabuf.cli._bench_table import preamble, tables
from dmabuf.cli._table import Content

_STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 72rem; margin: 2rem auto;
  padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2.5rem }
pre { background: #f5f5f5; padding: .8rem 1rem; overflow-x: auto; font-size: 13px }
svg { width: 100%; height: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .8rem 0 1.6rem }
caption { text-align: left; font-weight: 600; padding-bottom: .3rem }
th, td { padding: .2rem .9rem .2rem 0; text-align: right; border-bottom: 1px solid #e5e5e5 }
th:first-child, td:first-child { text-align: left }
"""


def draw(result: Result, path: str, suffix: str) -> None:
    """Put the charts into a file, in one of chart.FORMATS."""
    if suffix == ".html":
        text = page(result).encode("utf-8", "surrogateescape")
        Path(path).write_bytes(text)
    else:
        chart.draw(result, path, suffix[1:])


def page(result: Result) -> str:
    """The page."""
    image = io.BytesIO()
    chart.draw(result, image, "svg")
    svg = image.getvalue().decode()
    svg = svg[svg.index("<svg") :]
    title = escape(f"dmabuf bench: {result.target}")
    lines = "".join(f"<p><strong>{escape(line)}</strong></p>\n" for line in result.headlines)
    about = escape("\n".join(preamble(result)))
    groups = []
    for group in result.measured.groups:
        groups += [_table(table) for table in tables(result, group)]
        groups += [f"<p>no {escape(f'{way}: {why}')}</p>\n" for way, why in group.refused.items()]
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f"<style>\n{_STYLE}</style>\n<h1>{title}</h1>\n{lines}{svg}\n"
        f"<h2>What was measured on</h2>\n<pre>{about}</pre>\n<h2>Figures</h2>\n{''.join(groups)}"
    )


def _table(table: Content) -> str:
    title, head, rows = table
    lines = [f"<table>\n<caption>{escape(title)}</caption>\n"]
    lines.append("<tr>" + "".join(f"<th>{escape(word)}" for word in head) + "\n")
    lines += ["<tr>" + "".join(f"<td>{escape(cell)}" for cell in row) + "\n" for row in rows]
    return "".join(lines) + "</table>\n"
