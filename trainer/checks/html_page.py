"""The page of `trainer check --data`: one HTML file, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from html import escape
from typing import Final

from trainer.checks.data_survey import ShownRow, Survey

STYLE: Final = """
:root { color-scheme: light dark; --ground: #f6f7f9; --card: #fff; --ink: #171b24; --trained: #b7e4c7; --edge: #dfe3e9;
  --soft: #edf0f4; --bar: #3f9d72; --bad: #c0262d }
@media (prefers-color-scheme: dark) { :root { --ground: #101319; --card: #181c24; --ink: #e8ebf1; --trained: #1b5e3a;
  --edge: #2f3642; --soft: #242a34; --bar: #4fd1a1; --bad: #ff8a8a } }
* { box-sizing: border-box }
html { background: var(--ground); color: var(--ink); -webkit-text-size-adjust: 100% }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 0 auto; padding: 2rem 1.25rem 4rem }
h1, h2, h3 { overflow-wrap: anywhere } h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .25rem }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem }
h3 { font-size: .9rem; font-weight: 600; margin: 1.25rem 0 .35rem } h3 small { font-weight: 400; opacity: .75 }
p { margin: .25rem 0 1rem } .quiet { opacity: .75 }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr));
  align-items: start }
.card { border: 1px solid var(--edge); border-radius: .75rem; padding: .85rem 1rem; min-width: 0;
  background: var(--card) }
.card h3 { margin-top: 0 }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--edge); border-radius: .75rem; margin: 0;
  background: var(--card); padding: .75rem 1rem; font: 13px/1.75 ui-monospace, monospace;
  max-height: 36rem; overflow-y: auto }
pre span { border-right: 1px solid var(--edge) } pre span:hover { outline: 2px solid var(--bar); outline-offset: -1px }
pre span.t, .key { background: var(--trained) } .key { padding: .1rem .35rem; border-radius: .25rem }
table { border-collapse: collapse; width: 100% } tr + tr td { border-top: 1px solid var(--soft) }
td { padding: .2rem .75rem .2rem 0; vertical-align: top; overflow-wrap: anywhere } td:last-child { padding-right: 0 }
td.n { text-align: right; white-space: nowrap; width: 1%; font-variant-numeric: tabular-nums }
td.name { white-space: nowrap; width: 1%; opacity: .75 }
td div { background: var(--bar); height: .7em; margin-top: .45em; border-radius: .15rem; min-width: 2px }
.refused { border-left: 3px solid var(--bad); padding-left: .75rem; margin: .75rem 0; overflow-wrap: anywhere }
.refused b { color: var(--bad) }
summary { cursor: pointer }
"""
WIDTHS: Final = "".join(f".w{step} {{ width: {step}% }} " for step in range(1, 101))
REFUSED_SHOWN: Final = 100


def page(title: str, surveys: Mapping[str, Survey]) -> str:
    """Counts over all rows, the refused rows, then rows as tokens.

    Args:
        title: the recipe's name.
        surveys: by label, such as "training rows".
    """
    is_rft = any(survey.unit == "prompt" for survey in surveys.values())
    colour = '<span class="key">Coloured tokens</span>'
    legend = (
        "The whole text is the prompt: the model goes on after its last token, and nothing of it is trained."
        if is_rft
        else f"{colour} are trained, the others are what the model is given."
    )
    body = [f"<h1>{escape(title)}</h1>", f'<p class="quiet">{_headline(surveys)}</p>']
    body += [_counts(label, survey) for label, survey in surveys.items()]
    body += [_refused(label, survey) for label, survey in surveys.items() if survey.refused]
    for label, survey in surveys.items():
        if survey.shown:
            body.append(f"<h2>{escape(label.capitalize())} as tokens</h2>")
            body.append(f"<p>One cell is one token; its number and id are shown when you point at it. {legend}</p>")
            body += [_row(row) for row in survey.shown]
    style = STYLE + WIDTHS
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = (
        '<meta http-equiv="Content-Security-Policy" '
        f"content=\"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'\">\n"
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}: rows as tokens</title>\n"
        f"{policy}<style>{style}</style>\n" + "\n".join(body) + "\n</html>\n"
    )


def _headline(surveys: Mapping[str, Survey]) -> str:
    parts = [f"{survey.num_rows:,} {label}" for label, survey in surveys.items()]
    num_refused = sum(len(survey.refused) for survey in surveys.values())
    parts.append(f"{num_refused:,} refused" if num_refused else "none refused")
    return escape(" · ".join(parts))


def _row(row: ShownRow) -> str:
    tokens = "".join(
        f'<span{" class=t" if piece.is_trained else ""} title="token {number}, id {piece.token_id}">'
        f"{_text(piece.text)}</span>"
        for number, piece in enumerate(row.pieces)
    )
    about = f"{row.num_tokens:,} tokens, {row.num_trained:,} trained{row.note}"
    return f"<h3>{escape(row.where)} <small>{escape(about)}</small></h3>\n<pre>{tokens}</pre>"


def _text(text: str) -> str:
    return escape(text).replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n")


def _counts(label: str, survey: Survey) -> str:
    counts = _table(survey.table())
    fields = _table(survey.fields)
    histogram = survey.histogram()
    most = max((count for _, count in histogram), default=1)
    bars = "".join(
        f'<tr><td class="n">{name}<td class="n">{count:,}<td>{_bar(count, most)}' for name, count in histogram
    )
    cards = [f'<div class="card"><h3>Counts</h3><table>{counts}</table></div>']
    cards += [f'<div class="card"><h3>Fields</h3><table>{fields}</table></div>'] if survey.fields else []
    cards += [f'<div class="card"><h3>Sequences by tokens</h3><table>{bars}</table></div>'] if histogram else []
    title = f"{label.capitalize()}: {survey.file}"
    return f'<h2>{escape(title)}</h2>\n<div class="cards">{"".join(cards)}</div>'


def _bar(count: int, most: int) -> str:
    """A bar as long as its share, in percent, as a class: the page's policy allows no style attributes."""
    return f'<div class="w{max(1, 100 * count // most)}"></div>' if count else ""


def _table(rows: tuple[tuple[str, str], ...] | list[tuple[str, str]]) -> str:
    return "".join(f'<tr><td class="name">{escape(name)}<td>{escape(value)}' for name, value in rows)


def _refused(label: str, survey: Survey) -> str:
    texts = {row.reason: row.text for row in survey.refused_rows}
    parts = []
    for reason in survey.refused[:REFUSED_SHOWN]:
        source, _, why = reason.partition(": ")
        text = (
            f"<details><summary>the row</summary><pre>{escape(texts[reason])}</pre></details>"
            if reason in texts
            else ""
        )
        parts.append(f'<div class="refused"><b>{escape(source)}</b>: {escape(why)}{text}</div>')
    rest = len(survey.refused) - REFUSED_SHOWN
    more = f"<p>and {rest:,} more</p>" if rest > 0 else ""
    return f"<h2>Refused {escape(label)}</h2>\n{''.join(parts)}{more}"
