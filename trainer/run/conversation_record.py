"""The journal's form of token sequences and conversations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from trainer.types import Conversation, DrawnSequence, ToolCall, TurnSpan


def sequence_record(sequence: DrawnSequence) -> dict[str, Any]:
    """A sequence on disk: logprobs have the length of `token_ids`, with 0.0 where nothing was drawn."""
    logprobs = iter(sequence.sampler_logprobs)
    return {
        "token_ids": sequence.token_ids,
        "trained": "".join("1" if is_drawn else "0" for is_drawn in sequence.loss_mask),
        "sampler_logprobs": [next(logprobs) if is_drawn else 0.0 for is_drawn in sequence.loss_mask],
    }


def read_sequence(record: Mapping[str, Any]) -> DrawnSequence:
    """The sequence of a record."""
    loss_mask, logprobs = tuple(flag == "1" for flag in record["trained"]), record["sampler_logprobs"]
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
