"""Arguments of the rewards that a server computes: `llm_judge` and `http_reward`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, final
from urllib.parse import urlsplit

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from trainer.config.finding import Finding
from trainer.config.section import Section
from trainer.config.validate import validate

VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
SECRET_HEADERS: Final = ("authorization", "proxy-authorization", "x-api-key", "api-key", "cookie")


class ServerSettings(Section):
    """How a server is asked, and what happens when it does not answer."""

    url: str
    """http or https; without a password."""
    num_retries: NonNegativeInt = 5
    """Attempts after the first, with growing random pauses, for failed connections and the statuses 408, 429 and 5xx.
    `Retry-After` is obeyed up to a minute."""
    on_outage: Literal["wait", "fail", "abstain"] = "wait"
    """What a server that does not answer leads to: `wait` asks again until it does, `fail` counts the completions as
    failed, `abstain` leaves this reward out of their sum."""
    max_wait_s: PositiveFloat | None = 900.0
    """With `wait`: seconds after which the completions count as failed; null waits without limit."""
    api_key_env: str | None = None
    """Environment variable with the key, which is sent as `Authorization: Bearer`. The key itself is never written."""
    use_proxies: bool = False
    """Whether the proxies of the environment are used."""


@final
class HTTPRewardSettings(ServerSettings):
    """Arguments of `http_reward`."""

    post_timeout_s: PositiveFloat = 30.0
    """Seconds that one attempt may take in all."""
    headers: dict[str, str] = Field(default_factory=dict)
    """Added to each request. They are stored with the recipe in the run directory: for a key use `api_key_env`."""


@final
class LLMJudgeSettings(ServerSettings):
    """Arguments of `llm_judge`."""

    model: str
    """Name of the model on the server."""
    rubric: str | None = None
    """What a good completion is, as text. Give `rubric` or `rubric_file`."""
    rubric_file: str | None = None
    """File with the rubric, relative to the recipe."""
    compare: Literal["single", "pairs", "group"] = "single"
    """`single` scores each completion by itself; `pairs` compares it with others of its prompt, its score is the share
    of comparisons it wins; `group` shows all completions of a prompt at once, and each gets a score."""
    scale: tuple[float, float] = (0.0, 10.0)
    """Lowest and highest score that the judge may give; the reward is the score scaled to 0 to 1."""
    fields: list[str] = Field(default_factory=list)
    """Fields of the row that the judge sees, such as `[answer]`; nested ones as `reward_model.ground_truth`."""
    opponents: PositiveInt = 4
    """With `compare: pairs`: each completion is compared with so many of those that follow it in its group, taken as a
    ring. A group of 8 with 4 opponents makes 28 pairs, all there are."""
    both_orders: bool = True
    """With `compare: pairs`: ask each pair in both orders, since judges prefer a position."""
    hide_thinking: bool = True
    """Show the judge only what follows the completion's thinking."""
    show_prompt: bool = True
    """Show the judge the prompt."""
    response_format: Literal["auto", "json_schema", "none"] = "auto"
    """Whether the server is told the form of the answer. `auto` tells it until the server refuses. The answer is
    validated in any case."""
    num_repairs: NonNegativeInt = 1
    """How often a judge whose answer is invalid is shown the problem and asked again."""
    max_tokens: PositiveInt = 1024
    """Limit of the judge's answer."""
    temperature: NonNegativeFloat = 0.0
    """Sampling temperature of the judge."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Further fields of the request, for example `{reasoning_effort: low}`."""
    timeout_s: PositiveFloat = 60.0
    """Seconds that one attempt may take in all."""
    concurrency: PositiveInt = 8
    """Requests at the same time, per rank."""
    cache: bool | str = True
    """Keep answers by their content: `true` in the run directory, or a directory that runs share."""


JUDGES: Final[Mapping[str, type[ServerSettings]]] = MappingProxyType(
    {"llm_judge": LLMJudgeSettings, "http_reward": HTTPRewardSettings}
)
"""Rewards that are computed by a server, with the type of their arguments."""


def judge_settings(use: str, args: Mapping[str, Any]) -> tuple[ServerSettings | None, dict[tuple[str | int, ...], str]]:
    """The arguments as typed data, or None and each mistake by its path.

    >>> judge_settings("llm_judge", {"url": "http://localhost/v1", "model": "m", "rubric": "Be brief."})[1]
    {}

    Args:
        use: `llm_judge` or `http_reward`.
        args: of the recipe.
    """
    given = {
        name: tuple(value) if name == "scale" and isinstance(value, list) else value for name, value in args.items()
    }
    settings, mistakes = validate(JUDGES[use], given)
    return (None, mistakes) if mistakes else (settings, {})


def judge_findings(use: str, args: Mapping[str, Any], base_dir: Path) -> Iterator[Finding]:
    """Mistakes and warnings of a judge's arguments, with paths below `args`.

    Args:
        use: `llm_judge` or `http_reward`.
        args: of the recipe.
        base_dir: the recipe's directory.
    """
    settings, mistakes = judge_settings(use, args)
    if settings is None:
        for path, text in mistakes.items():
            yield Finding(path, text)
        return
    problem = _url_problem(settings.url)
    if problem is not None:
        yield Finding(("url",), problem)
    variable = settings.api_key_env
    if variable is not None and VARIABLE.fullmatch(variable) is None:
        yield Finding(("api_key_env",), "must be the name of an environment variable, not the key")
    elif variable is not None and not os.environ.get(variable):
        yield Finding(("api_key_env",), f"the variable {variable} is not set here; a run needs it", is_error=False)
    if isinstance(settings, HTTPRewardSettings):
        for name in settings.headers:
            if name.lower() in SECRET_HEADERS:
                text = "is stored in run directories; name an environment variable in `api_key_env` instead"
                yield Finding(("headers", name), text, is_error=False)
    if isinstance(settings, LLMJudgeSettings):
        yield from _llm_findings(settings, base_dir)


def _llm_findings(settings: LLMJudgeSettings, base_dir: Path) -> Iterator[Finding]:
    if (settings.rubric is None) == (settings.rubric_file is None):
        yield Finding(("rubric",), "give `rubric` (a text) or `rubric_file`, one of them")
    elif settings.rubric is not None and not settings.rubric.strip():
        yield Finding(("rubric",), "is empty")
    elif settings.rubric_file is not None:
        file = base_dir / settings.rubric_file
        if not file.is_file():
            yield Finding(("rubric_file",), f"no such file: {file}")
        elif not file.read_text(encoding="utf-8", errors="replace").strip():
            yield Finding(("rubric_file",), f"{file} is empty")
    low, high = settings.scale
    if not low < high:
        yield Finding(("scale",), f"the lowest score ({low:g}) must be below the highest ({high:g})")
    reserved = sorted({"model", "messages", "response_format", "stream", "n"} & settings.extra_body.keys())
    if reserved:
        yield Finding(("extra_body", reserved[0]), "is set by llm_judge itself; remove it")


def _url_problem(url: str) -> str | None:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return f"must begin with http:// or https:// and name a host (got {url!r})"
    if parts.username is not None or parts.password is not None:
        return "contains a password, which would be stored in run directories; use `api_key_env`"
    return None
