"""The page: one HTML file with everything in it, that asks for nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from html import escape
from importlib.resources import files
from typing import Any, Final

from trainer.planning.plan import Plan
from trainer.report.charts import sections
from trainer.report.run_report import RunReport
from trainer.report.settings import differing_settings

STYLES: Final = ("uPlot.min.css", "report.css")
SCRIPTS: Final = ("uPlot.iife.min.js", "dom.js", "charts.js", "timeline.js", "rollouts.js", "report.js")


def report_data(reports: Sequence[RunReport], plans: Sequence[Plan]) -> dict[str, Any]:
    """What the page shows, as JSON values.

    Args:
        reports: of the runs.
        plans: of the same runs.
    """
    names = {name for each in reports for points in (each.curves.train, each.curves.held_out) for name in points.values}
    return {
        "runs": [asdict(each) for each in reports],
        "sections": [asdict(section) for section in sections(names)],
        "differences": [asdict(row) for row in differing_settings(plans)] if len(plans) > 1 else [],
    }


def page(data: dict[str, Any], *, is_live: bool = False) -> str:
    """The HTML of a report.

    Scripts and styles are named by their hashes in the Content-Security-Policy, so that no other script can run, even
    if a text of a run were not escaped.

    Args:
        data: from `report_data`.
        is_live: whether the page asks its server for news.
    """
    names = ", ".join(run["name"] for run in data["runs"])
    styles, scripts = "\n".join(map(asset, STYLES)), "\n".join(map(asset, SCRIPTS))
    policy = "; ".join(
        [
            "default-src 'none'",
            f"style-src {_hash(styles)}",
            f"script-src {_hash(scripts)}",
            *(["connect-src 'self'"] if is_live else []),
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{escape(names)} · tunesmith report</title>
<style>{styles}</style>
</head>
<body data-live="{"yes" if is_live else "no"}">
<main id="page"><noscript>This report draws its curves with JavaScript, which is turned off.</noscript></main>
<script type="application/json" id="data">{script_json(data)}</script>
<script>{scripts}</script>
</body>
</html>
"""


def asset(name: str) -> str:
    """The text of a file that the package carries."""
    return files("trainer.report").joinpath("assets", name).read_text(encoding="utf-8")


def script_json(data: Any) -> str:
    r"""JSON that can stand inside a script element: without `<`, `>` and `&`, and with NaN as null.

    >>> script_json({"text": "</script>", "value": float("nan")})
    '{"text":"\\u003c/script\\u003e","value":null}'
    """
    text = json.dumps(_finite(data), separators=(",", ":"), default=str, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_finite(each) for each in value]
    return value


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"
