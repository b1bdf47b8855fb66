"""From a family's outcomes and numbers to a verdict for each method, and the table of all families."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

LIMITS: Final[Mapping[str, float]] = {
    "alone": 1e-3,
    "packed": 1e-3,
    "leak": 0.0,
    "adapter": 1e-3,
    "adapter_gradient": 1e-3,
    "full_gradient": 1e-3,
    "saved": 1e-3,
    "sampler": 1e-3,
}
"""Largest difference that is rounding, in float32; a leak is a gradient and must be exactly zero."""
NEEDED: Final[Mapping[str, tuple[str, ...]]] = {
    "sft": ("alone", "packed", "leak", "adapter", "adapter_gradient"),
    "full": ("alone", "packed", "leak", "full_gradient", "saved"),
    "rft": ("alone", "packed", "leak", "adapter", "adapter_gradient", "sampler"),
}
OF_PACKS: Final = ("packed", "leak")
"""What is not measured where sequences are trained one by one."""
MEASURED_BY: Final[Mapping[str, str]] = {
    "alone": "logprobs", "packed": "logprobs", "leak": "logprobs", "adapter": "adapter",
    "adapter_gradient": "adapter", "full_gradient": "full", "saved": "full", "sampler": "sampler",
}  # fmt: skip
METHODS: Final = ("sft", "rft", "full")
VERDICTS: Final = ("RIGHT", "REFUSED", "WRONG", "CRASH", "UNBUILT")
_COLUMNS: Final = ("alone", "packed", "leak", "adapter_gradient", "full_gradient", "saved", "sampler")
_INTRODUCTION: Final = """# Models

What happens with each family of models that transformers {transformers} knows: tiny random models (2 to 6 layers,
windows of 8 tokens), two steps of each method in float32 on the CPU, compared with plain transformers and PEFT {peft}.
Made by `scripts/model_matrix`; all numbers and reasons are in [models.json](models.json).

- **RIGHT**: trains, and all differences are rounding. **REFUSED**: stops before step 1, says why. **WRONG**: trains,
  and a difference is larger than rounding. **CRASH**: stops with an error that is not a message for people.
  **UNBUILT**: no tiny model that reads text alone could be made, so nothing is known.
- Differences are the largest over all tokens. *alone*: logprobs of a sequence by itself against plain transformers;
  *packed*: of the same sequences in one pack against alone; *leak*: gradient of one sequence's logprobs by its
  neighbour's embeddings, which must be 0; *gradients*: of the adapter against plain PEFT, of all parameters against
  plain transformers, relative to the largest entry; *saved*: logprobs of a full-parameter model that was saved
  untrained and loaded again, against its base; *sampler*: logprobs recorded while sampling against the trainer's.
- Models of images and text train on rows of text: only their language part has adapters or trained parameters.
- *sequences*: packed, or one by one where packing would change them; models.json has the reason (`separate`).
- *adapted*: layers that `lora.target_modules: all-linear` adapts; in *italics* those whose adapter gets no gradient.

Sequences one by one: each pass has one sequence and the model's own attention, so results are those of plain
transformers. Short sequences then do not share a pass, and a step takes longer. The local sampler decodes with the
model's own cache, the completions of one prompt at a time. `trainer check` says so where config.json tells; the run
measures it before step 1, says it in its log, and writes it to attempts.jsonl.

Models that select tokens by a score without gradient (DeepSeek V3.2, GLM with DSA) can have a *sampler* difference at
single tokens: where two scores tie, one pass over a sequence and one token at a time may select differently.
"""


def verdict(record: Mapping[str, Any], method: str) -> tuple[str, str]:
    """RIGHT, REFUSED, WRONG, CRASH or UNBUILT, and why.

    Args:
        record: outcomes by method, numbers and errors of a family.
        method: sft, rft or full.
    """
    if record.get("unbuilt"):
        return "UNBUILT", record["unbuilt"]
    outcome, message = record["outcomes"].get(method, ("CRASH", record.get("died", "the process died")))
    if outcome != "finished":
        return outcome, message
    numbers, errors = record["numbers"], record["errors"]
    needed = [name for name in NEEDED[method] if "separate" not in numbers or name not in OF_PACKS]
    for name in needed:
        if name in numbers and not numbers[name] <= LIMITS[name]:
            return "WRONG", f"{name} {numbers[name]:.2g}"
    if method != "full" and numbers.get("dead"):
        return "WRONG", f"adapters that never learn: {', '.join(numbers['dead'])}"
    for name in needed:
        if name not in numbers:
            reason = errors.get(MEASURED_BY[name]) or errors.get("plain") or record.get("died", "not measured")
            return "CRASH", f"{name} not measured: {reason}"
    return "RIGHT", ""


def table(records: Sequence[Mapping[str, Any]], versions: Mapping[str, str]) -> str:
    """The page of all families.

    Args:
        records: one of each family or variant, in any order.
        versions: of transformers and peft.
    """
    lines = [_INTRODUCTION.format(**versions)]
    counts = {method: Counter(verdict(record, method)[0] for record in records) for method in METHODS}
    lines += ["| method | " + " | ".join(VERDICTS) + " |", "|---|" + "---:|" * len(VERDICTS)]
    lines += [f"| {m} | " + " | ".join(str(counts[m][name]) for name in VERDICTS) + " |" for m in METHODS]
    heads = [column.replace("_", " ") for column in _COLUMNS]
    lines += ["", "| family | sft | rft | full | sequences | adapted | " + " | ".join(heads) + " |"]
    lines += ["|---" * 6 + "|" + "---:|" * len(heads)]
    reasons: dict[str, list[str]] = {}
    for record in sorted(records, key=lambda each: str(each["family"])):
        found = {method: verdict(record, method) for method in METHODS}
        for method, (name, why) in found.items():
            if name != "RIGHT":
                reasons.setdefault(f"{name}: {_without_details(why)}", []).append(f"{record['family']} ({method})")
        numbers = record.get("numbers", {})
        sequences = "one by one" if "separate" in numbers else "packed"
        trains = "RIGHT" in {name for name, _ in found.values()}
        cells = [record["family"], *(found[method][0] for method in METHODS), sequences if trains else ""]
        dead = numbers.get("dead", ())
        cells += [", ".join(f"*{name}*" if name in dead else name for name in numbers.get("adapts", ()))]
        cells += [f"{numbers[column]:.1g}" if column in numbers else "" for column in _COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "## Why not", "", "| reason | families |", "|---|---|"]
    for reason, families in sorted(reasons.items(), key=lambda item: (VERDICTS.index(item[0].split(":")[0]), item[0])):
        lines.append(f"| {_cell(reason)} | {', '.join(_merged(families))} |")
    return "\n".join(lines) + "\n"


def _merged(families: Sequence[str]) -> list[str]:
    """`a (sft)`, `a (rft)` as `a (sft, rft)`."""
    by_name: dict[str, list[str]] = {}
    for each in families:
        name, _, method = each.partition(" ")
        by_name.setdefault(name, []).append(method.strip("()"))
    return [
        name if len(methods) == len(METHODS) else f"{name} ({', '.join(methods)})" for name, methods in by_name.items()
    ]


def _without_details(why: str) -> str:
    """The reason without what differs from family to family, so that equal causes share a line.

    >>> _without_details("logprobs move by 0.207 on average; <class 'transformers.models.aria.AriaConfig'>")
    'logprobs move by … on average; <class>'
    """
    why = re.sub(r"by [0-9.e+-]+ on average", "by … on average", why)
    why = re.sub(
        r"(sampler_kl is|alone|packed|leak|gradient|saved|sampler|adapter) [0-9.]+(e[+-]?[0-9]+)?\b", r"\1 …", why
    )
    return re.sub(r"<class '[^']*'>", "<class>", why)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
