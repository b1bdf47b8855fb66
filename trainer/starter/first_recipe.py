"""The answers to the five questions of `trainer init`, and the commented recipe made of them. No torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, final

from trainer.config.load import config_dirs
from trainer.config.reward_place import BUILT_IN
from trainer.config.semantics import is_hub_name
from trainer.planning.model_facts import ModelFacts, find_model_config, find_model_facts
from trainer.starter.data_file import DataFile
from trainer.starter.shipped import MODEL, SCHEMA, SCHEMA_LINE
from trainer.types import Row

Method = Literal["sft", "rft"]
TRAIN_ON: Final = ("all", "last")
"""What sft optimizes: every assistant turn, or the last one of each row."""
SMALL_HIDDEN: Final = 1024
"""Below this width a model gets the learning rate of the quickstart, which was measured with 576."""
LONG: Final = 100
"""Steps that are assumed where the rows cannot be counted."""
SAVE_INTERVAL: Final = 20
EPOCHS: Final = 3
EVALUATIONS: Final = 5
COMPLETION_TOKENS: Final = 256


@final
@dataclass(frozen=True)
class Answers:
    """What the user wants to train."""

    name: str
    method: Method
    model: str
    data: DataFile
    optimize: str
    """sft: `all` or `last`; rft: the name of a reward."""
    shape: str


def default_model() -> str:
    """A model directory under models/; where there is none, that of the quickstart."""
    found = sorted(file.parent for file in Path("models").glob("*/config.json"))
    return str(found[0]) if found else MODEL


def default_reward(row: Row) -> str:
    """The built-in reward that the fields of the row suggest.

    >>> default_reward(Row({"prompt": "2 + 2?", "answer": "4"})), default_reward(Row({"prompt": "x", "tests": []}))
    ('last_number', 'code_tests')
    """
    if "tests" in row:
        return "code_tests"
    if "schema" in row:
        return "json_schema"
    return "last_number" if re.fullmatch(r"\s*-?[\d.,]+\s*", str(row.get("answer", ""))) else "exact_match"


def name_of(path: str) -> str:
    """A run's name from the file of its rows.

    >>> name_of("data/Support chats (2024).jsonl")
    'Support-chats-2024'
    """
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(path).name.partition(".")[0]).strip("-._") or "my_run"


def recipe_text(answers: Answers) -> str:
    """The recipe as YAML, each choice with its reason and its alternative."""
    facts = find_model_facts(answers.model, config_dirs("models"))
    lines = [
        f"{SCHEMA_LINE}{SCHEMA}",
        "# Written by `trainer init`. Every field: docs/recipe.md; mistakes: trainer check.",
    ]
    lines += [f"name: {_yaml(answers.name)}  # the run is runs/NAME/", *_method(answers), *_model(answers)]
    lines += ["lora:", "  rank: 16", "  alpha: 32"]
    lines += ["# lora: null  # instead of the section above: trains every parameter, with several times the memory"]
    lines += [*_data(answers), *_length(answers), *_optimizer(answers, facts)]
    lines += _rft(answers) if answers.method == "rft" else []
    lines += [f"dcp_save_interval: {_save_interval(answers)}  # steps between checkpoints: what a killed run can lose"]
    lines += [
        f"shape: {_yaml(answers.shape)}  # auto: the GPUs of this machine, else its CPU; `trainer shapes` lists others"
    ]
    return "\n".join(lines) + "\n"


def _method(answers: Answers) -> list[str]:
    meaning = {"sft": "learn the answers in the rows", "rft": "try answers, and learn from rewards"}
    return [f"method: {answers.method}  # {meaning[answers.method]}"]


def _model(answers: Answers) -> list[str]:
    lines = ["model:", f"  path: {_yaml(answers.model)}"]
    if is_hub_name(answers.model):
        lines += ["  revision: main  # the plan keeps the commit that it is then; write a commit here to pin it"]
    return lines


def _data(answers: Answers) -> list[str]:
    data = answers.data
    count = "" if data.num_rows is None else f"{data.num_rows:,} rows, "
    lines = ["data:", f"  train: {_yaml(data.path)}  # {count}read as {data.form}"]
    if data.held_out_frac is not None:
        lines += [f"  eval_frac: {data.held_out_frac}  # held out and never trained; or `eval: FILE`"]
    for name, value in data.settings.items():
        lines += [f"  {name}: {_flow(value)}"]
    if answers.method == "sft" and data.settings.get("format") != "text":
        lines += [f"  train_on: {answers.optimize}  # all: every assistant turn; last: the last one of each row"]
    tokens = f"the longest row has about {data.longest_tokens:,} tokens"
    return [
        *lines,
        f"  max_seq_tokens: {_max_seq_tokens(answers)}  # {tokens}; longer ones stop the run (overlong: drop)",
    ]


def _max_seq_tokens(answers: Answers) -> int:
    """Room for the longest row, and for a completion, within the model's positions."""
    wanted = answers.data.max_seq_tokens + (COMPLETION_TOKENS if answers.method == "rft" else 0)
    config = find_model_config(answers.model, config_dirs("models")) or {}
    positions = config.get("max_position_embeddings")
    return min(wanted, positions) if isinstance(positions, int) else wanted


def _rows_per_step(answers: Answers) -> int:
    most = 16 if answers.method == "sft" else 8
    rows = answers.data.num_rows
    return most if rows is None else max(1, min(most, rows // 4))


def _steps(answers: Answers) -> int | None:
    rows, share = answers.data.num_rows, answers.data.held_out_frac or 0.0
    return None if rows is None else math.ceil(_epochs(answers) * rows * (1 - share) / _rows_per_step(answers))


def _save_interval(answers: Answers) -> int:
    """Of a short run a quarter, so that there is something to resume from and to talk to before its end."""
    steps = _steps(answers)
    return SAVE_INTERVAL if steps is None else max(1, min(SAVE_INTERVAL, steps // 4))


def _length(answers: Answers) -> list[str]:
    """Batch, length and evaluations, for which the number of steps is known where the rows are counted."""
    batch, epochs = _rows_per_step(answers), _epochs(answers)
    what = "rows" if answers.method == "sft" else "prompts"
    lines = [f"rows_per_step: {batch}  # {what} of one optimizer step, over all GPUs together"]
    lines += [f"epochs: {epochs}  # passes over the rows; or `steps: N`"]
    if answers.data.held_out_frac is None:
        return lines
    interval = max(1, (_steps(answers) or LONG) // EVALUATIONS)
    return [*lines, f"eval_interval: {interval}  # steps between evaluations on held-out rows"]


def _epochs(answers: Answers) -> int:
    return EPOCHS if answers.method == "sft" else 1


def _optimizer(answers: Answers, facts: ModelFacts | None) -> list[str]:
    rate = "1.0e-3" if facts is not None and facts.hidden < SMALL_HIDDEN else "2.0e-4"
    if answers.method == "rft":
        rate = "3.0e-4" if facts is not None and facts.hidden < SMALL_HIDDEN else "2.0e-5"
    return ["optimizer:", f"  learning_rate: {rate}  # for LoRA; training every parameter needs about a tenth"]


def _rft(answers: Answers) -> list[str]:
    lines = ["rollout:", "  group_size: 8  # answers per prompt; rewards are compared within such a group"]
    lines += [f"  max_completion_tokens: {COMPLETION_TOKENS}  # longer answers are cut", "rewards:"]
    known = "built in" if answers.optimize in BUILT_IN else "your function"
    return [*lines, f"  - use: {_yaml(answers.optimize)}  # {known}; try it: trainer check RECIPE --rewards"]


def _yaml(text: str) -> str:
    """A text as a YAML value: plain where that is safe, else quoted."""
    is_plain = re.fullmatch(r"[A-Za-z_./][A-Za-z0-9_./:-]*", text) and text.lower() not in {
        "null",
        "true",
        "false",
        "on",
        "off",
        "yes",
        "no",
    }
    return text if is_plain and not text.endswith(":") else json.dumps(text, ensure_ascii=False)


def _flow(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_yaml(key)}: {_yaml(each)}" for key, each in value.items()) + "}"
    return _yaml(str(value))
