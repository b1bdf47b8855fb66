"""Templates that open the thinking in the prompt, together with environments and tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pytest
import trl
from played import played
from prompt_writer import STOP, ids, writer

TEMPLATES: Final = Path(trl.__file__).parent / "chat_templates"
ANSWER: Final = "8</think>\n\n98"
CALL: Final = 'sum</think>\n\n<tool_call>{"name": "add", "arguments": {"a": 8, "b": 90}}</tool_call>'
ROOM: Final = 1024


def thinking_with_calls() -> str:
    """Qwen3's template with the generation prompt of Qwen3's later thinking models: calls as JSON, `<think>` open."""
    text = (TEMPLATES / "qwen3.jinja").read_text(encoding="utf-8")
    head, mark, tail = text.rpartition("{{- '<|im_start|>assistant\\n' }}")
    assert mark
    return f"{head}{mark}{{{{- '<think>\\n' }}}}{{%- endif %}}" if tail else ""


@pytest.mark.parametrize("name", ["qwen3_5_think", "deepseek_r1_distill"])
def test_rewards_and_environments_see_the_thinking_that_the_prompt_opens(tmp_path, name):
    template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    with played(tmp_path, ANSWER, template, reward="opened", max_seq_tokens=ROOM) as (_, play):
        (group,) = play({"turns": 2})
    rollout = group.rollouts[0]
    assert rollout.rewards["opened"] == 1.0, "the last text, and both of the policy's messages"
    assert [turn.info["text"] for turn in rollout.conversation.turns] == [f"<think>\n{ANSWER}"] * 2
    assert rollout.text == ANSWER, "the journal has what was drawn"


@pytest.mark.parametrize("name", ["qwen3_5_think", "deepseek_r1_distill"])
def test_thinking_that_the_template_drops_at_the_next_user_turn_begins_a_new_sequence(tmp_path, name):
    template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    with played(tmp_path, ANSWER, template, max_seq_tokens=ROOM) as (_, play):
        (group,) = play({"turns": 2})
    first, second = group.rollouts[0].sequences
    drawn = (*ids(writer(), ANSWER), STOP)
    for sequence in (first, second):
        assert sequence.token_ids[-len(drawn) :] == drawn
        assert sum(sequence.loss_mask) == len(drawn)
    text = writer().tokenizer.decode(second.token_ids)
    assert text.count("<think>") == 1, "only the turn that is drawn is opened"
    assert "98" in text.partition("more")[0], "what was answered is kept"


def test_a_tool_result_extends_the_turn_whose_thinking_the_template_keeps(tmp_path):
    rollout: dict[str, Any] = {
        "environment": None,
        "tools": [f"{tmp_path}/game.py:add"],
        "max_completion_tokens": 64,
        "reward": "opened",
        "max_seq_tokens": ROOM,
    }
    with played(tmp_path, [CALL, ANSWER], thinking_with_calls(), **rollout) as (_, play):
        (group,) = play({"prompt": "what is 8 + 90?"})
    played_one = group.rollouts[0]
    assert played_one.rewards["opened"] == 1.0
    (sequence,) = played_one.sequences
    call, answer = ((*ids(writer(), text), STOP) for text in (CALL, ANSWER))
    drawn = [token for token, flag in zip(sequence.token_ids, sequence.loss_mask, strict=True) if flag]
    assert drawn == [*call, *answer]
    text = writer().tokenizer.decode(sequence.token_ids)
    assert text.endswith(
        f"<|im_start|>assistant\n<think>\n{CALL}<|im_end|>\n<|im_start|>user\n<tool_response>\n98\n</tool_response>"
        f"<|im_end|>\n<|im_start|>assistant\n<think>\n{ANSWER}<|im_end|>"
    )
    (first, second) = played_one.conversation.turns
    assert [call.status for call in first.calls] == ["ok"]
    assert second.calls == ()


def test_a_turn_that_never_ends_its_thinking_is_shown_as_it_is(tmp_path):
    template = (TEMPLATES / "qwen3_5_think.jinja").read_text(encoding="utf-8")
    with played(tmp_path, "8 and 90", template, reward="opened", max_seq_tokens=ROOM) as (_, play):
        (group,) = play({"turns": 1})
    rollout = group.rollouts[0]
    assert rollout.rewards["opened"] == 1.0
    said = [message["content"] for message in rollout.conversation.messages if message["role"] == "assistant"]
    assert said == ["<think>\n8 and 90"]
