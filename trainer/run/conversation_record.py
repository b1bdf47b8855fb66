"""The journal's form of token sequences and conversations."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from trainer.types import Conversation, DrawnSequence, Group, ToolCall, TurnSpan


def sequence_record(sequence: DrawnSequence, num_shared: int = 0) -> dict[str, Any]:
    """A sequence on disk: logprobs have the length of `token_ids`, with 0.0 where nothing was drawn.

    Samplers give logprobs in float32. Nine digits tell two of them apart, half as many as the double of each has.

    Args:
        sequence: to be written.
        num_shared: token ids at the beginning that are written elsewhere; none of them is drawn.
    """
    logprobs = sequence.sampler_logprobs
    is_single = tuple(array("f", logprobs)) == logprobs
    shown = iter([float(f"{value:.9g}") for value in logprobs] if is_single else logprobs)
    mask = sequence.loss_mask[num_shared:]
    return {
        **({"num_shared": num_shared} if num_shared else {}),
        "token_ids": sequence.token_ids[num_shared:],
        "trained": "".join("1" if is_drawn else "0" for is_drawn in mask),
        **({"float32": True} if is_single and logprobs else {}),
        "sampler_logprobs": [next(shown) if is_drawn else 0.0 for is_drawn in mask],
    }


def shared_prompts(groups: Iterable[Group]) -> dict[int, tuple[int, ...]]:
    """For each row the token ids with which all of its rollouts begin, before the first drawn one.

    >>> from trainer.types import Group, Rollout, Row
    >>> one = Rollout((1, 40, 19), (False, False, True), (-0.5,), "stop", 0, "4")
    >>> other = Rollout((1, 40, 20), (False, False, True), (-0.5,), "stop", 0, "5")
    >>> shared_prompts([Group(Row({}, index=7), (one, other))])
    {7: (1, 40)}
    """
    shared: dict[int, tuple[int, ...]] = {}
    for group in groups:
        for rollout in group.rollouts:
            undrawn = rollout.token_ids[: (*rollout.loss_mask, True).index(True)]
            so_far = shared.get(group.row.index, undrawn)
            number = next(
                (index for index, (ours, theirs) in enumerate(zip(so_far, undrawn, strict=False)) if ours != theirs),
                min(len(so_far), len(undrawn)),
            )
            shared[group.row.index] = so_far[:number]
    return shared


def with_shared_ids(record: dict[str, Any], shared: Sequence[int]) -> dict[str, Any]:
    """The record of a rollout as format 2 has it, with the ids of its prompt.

    Args:
        record: of a rollout.
        shared: ids with which all rollouts of the row begin.
    """
    number = record.pop("num_shared", 0)
    if number:
        record["token_ids"] = [*shared[:number], *record["token_ids"]]
        record["trained"] = "0" * number + record["trained"]
        record["sampler_logprobs"] = [0.0] * number + record["sampler_logprobs"]
    return record


def read_sequence(record: Mapping[str, Any]) -> DrawnSequence:
    """The sequence of a record."""
    loss_mask, logprobs = tuple(flag == "1" for flag in record["trained"]), record["sampler_logprobs"]
    if record.get("float32"):
        logprobs = array("f", logprobs)
    drawn = tuple(value for value, is_drawn in zip(logprobs, loss_mask, strict=True) if is_drawn)
    return DrawnSequence(tuple(record["token_ids"]), loss_mask, drawn)


def conversation_record(conversation: Conversation) -> dict[str, Any]:
    """A conversation on disk, observations included."""
    return {
        "messages": list(conversation.messages),
        "num_prompt": conversation.num_prompt,
        "turns": [asdict(turn) for turn in conversation.turns],
        "stop": conversation.stop,
        "later": [sequence_record(sequence) for sequence in conversation.later],
        "tools": list(conversation.tools),
    }


def read_conversation_record(record: Mapping[str, Any]) -> Conversation:
    """The conversation of a record."""
    turns = [
        TurnSpan(**{**turn, "calls": tuple(ToolCall(**call) for call in turn["calls"])}) for turn in record["turns"]
    ]
    return Conversation(
        messages=tuple(record["messages"]),
        num_prompt=record["num_prompt"],
        turns=tuple(turns),
        stop=record["stop"],
        later=tuple(map(read_sequence, record["later"])),
        tools=tuple(record["tools"]),
    )


def drawn_tokens(record: Mapping[str, Any]) -> int:
    """Drawn tokens of a rollout's record."""
    later = record.get("conversation", {}).get("later", [])
    return sum(int(each["trained"].count("1")) for each in (record, *later))
