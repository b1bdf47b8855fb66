"""The page of `trainer check --data`: one HTML file, nothing loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Final

from trainer.checks.data_survey import ShownRow, Survey

STYLE: Final = """
:root { color-scheme: light dark; --trained: #b7e4c7; --edge: #8884; --bar: #52b788 }
@media (prefers-color-scheme: dark) { :root { --trained: #1b5e3a } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--edge); padding: .8rem; line-height: 1.7 }
pre span { border-right: 1px solid var(--edge) }
pre span.t, .key { background: var(--trained) }
table { border-collapse: collapse; margin: .5rem 0 1.5rem }
td { padding: .1rem 1.2rem .1rem 0; vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums }
td div { background: var(--bar); height: .8em; margin-top: .35em }
.refused { color: #d00000 }
"""
REFUSED_SHOWN: Final = 100
BAR_PIXELS: Final = 320


def page(title: str, surveys: Mapping[str, Survey]) -> str:
    """The first rows as tokens, and counts over all rows."""
    body = [f"<h1>{escape(title)}</h1>"]
    body += ['<p>One cell is one token; <span class="key">coloured tokens</span> are trained.</p>']
    body += [_row(row) for survey in surveys.values() for row in survey.shown]
    body += [_counts(label, survey) for label, survey in surveys.items()]
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{escape(title)}: rows as tokens</title>\n'
        f"<style>{STYLE}</style>\n" + "\n".join(body) + "\n</html>\n"
    )


def _row(row: ShownRow) -> str:
    tokens = "".join(
        f'<span{" class=t" if piece.is_trained else ""} title="token {number}">{_text(piece.text)}</span>'
        for number, piece in enumerate(row.pieces)
    )
    head = f"{row.where}: {row.num_tokens:,} tokens, {row.num_trained:,} trained{row.note}"
    return f"<h3>{escape(head)}</h3>\n<pre>{tokens}</pre>"


def _text(text: str) -> str:
    return escape(text).replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n")


def _counts(label: str, survey: Survey) -> str:
    rows = [f"<tr><td>{escape(name)}<td>{escape(value)}" for name, value in survey.table()]
    histogram = survey.histogram()
    most = max((count for _, count in histogram), default=1)
    bars = [
        f'<tr><td class="n">{name}<td class="n">{count:,}<td><div style="width:{BAR_PIXELS * count // most}px"></div>'
        for name, count in histogram
    ]
    refused = [f'<li class="refused">{escape(reason)}' for reason in survey.refused[:REFUSED_SHOWN]]
    return (
        f"<h2>{escape(label)}: {escape(survey.file)}</h2>\n<table>{''.join(rows)}</table>\n"
        f"<p>Rows by tokens</p>\n<table>{''.join(bars)}</table>\n<ul>{''.join(refused)}</ul>"
    )
