"""Conversations: rounds by turn, sequences where a template forgets, limits, and what is recorded."""

from __future__ import annotations

from typing import Any

import pytest
from played import WORLD, played
from prompt_writer import FORGETFUL, STOP, ids, writer

from trainer.sampling.server_client import SamplerError
from trainer.training.conversation_metrics import conversation_metrics
from trainer.types import Rollout


def test_rounds_have_all_live_rollouts_in_their_order(tmp_path):
    with played(tmp_path, "98") as (sampler, play):
        play({"turns": 1}, {"turns": 3}, {"turns": 2})
    assert sampler.asked == [
        [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0), (2, 0, 0), (2, 1, 0)],
        [(1, 0, 1), (1, 1, 1), (2, 0, 1), (2, 1, 1)],
        [(1, 0, 2), (1, 1, 2)],
    ]


def test_rewards_of_turns_and_functions_are_added(tmp_path):
    with played(tmp_path, "98") as (_, play):
        (group,) = play({"turns": 3})
    rollout = group.rollouts[0]
    # three turns of 0.25, and half of the 6 messages: a prompt, three turns, two observations between, one at the end
    assert rollout.rewards == {"environment": 0.75, "environment/seen": 3.0, "count": 7.0}
    assert rollout.reward == 0.75 + 0.5 * 7
    assert conversation_metrics(group.rollouts, WORLD) == {
        "rollout/sequences": 1.0,
        "rollout/stop/done": 1.0,
        "rollout/turns": 3.0,
    }


def test_forgotten_reasoning_makes_a_sequence_per_turn(tmp_path):
    with played(tmp_path, "<think>8</think>98", FORGETFUL) as (_, play):
        (group,) = play({"turns": 3})
    (first, second, third) = group.rollouts[0].sequences
    drawn = [*ids(writer(), "<think>8</think>98"), STOP]
    for sequence in (first, second, third):
        assert sequence.token_ids[-len(drawn) :] == tuple(drawn)
        assert sum(sequence.loss_mask) == len(drawn), "only the last turn is trained"
    decoded = writer().tokenizer.decode(second.token_ids)
    assert decoded.count("<think>") == 1, "the first turn's reasoning is gone"
    conversation = group.rollouts[0].conversation
    assert conversation is not None
    assert [turn.sequence for turn in conversation.turns] == [0, 1, 2]


def test_a_rollout_ends_at_each_limit(tmp_path):
    def ends(**rollout: Any) -> list[str]:
        with played(tmp_path, "98", **rollout) as (_, play):
            (group,) = play({"turns": 9})
        found = [stop(each) for each in group.rollouts]
        lengths = [each.num_tokens for each in group.rollouts]
        assert max(lengths) <= rollout.get("max_tokens", 256)
        assert all(each.sequences[-1].loss_mask[-1] for each in group.rollouts), "no prompt that nothing answers"
        return found

    assert ends(max_turns=4) == ["max_turns"] * 2
    assert ends(max_tokens=160, max_turns=9) == ["max_tokens"] * 2
    assert ends(max_time_s=1e-6) == ["time"] * 2


def stop(rollout: Rollout) -> str:
    assert rollout.conversation is not None
    return rollout.conversation.stop


def test_a_dead_environment_leaves_its_rollout_without_a_reward(tmp_path):
    with played(tmp_path, "98") as (_, play):
        dead, alive = play({"turns": 3, "dies": 1}, {"turns": 3})
    assert {stop(each) for each in dead.rollouts} == {"environment_died"}
    assert all(each.reward is None and "ended itself with status 1" in (each.failure or "") for each in dead.rollouts)
    assert all(each.reward is not None for each in alive.rollouts)


def test_a_prompt_without_room_is_a_failed_rollout(tmp_path):
    with played(tmp_path, "98", max_tokens=40) as (sampler, play):
        (group,) = play({"turns": 3})
    assert sampler.asked == []
    assert "the first prompt has" in (group.rollouts[0].failure or "")


def test_a_group_is_compared(tmp_path):
    with played(tmp_path, "98", environment=f"{tmp_path}/game.py:Compared") as (_, play):
        (group,) = play({"turns": 1})
    assert [each.rewards["environment"] for each in group.rollouts] == [0.25, 1.25]


def test_without_tools_a_call_is_text_for_the_environment(tmp_path):
    text = '<tool_call>{"name": "add", "arguments": {}}</tool_call>'
    with played(tmp_path, text, max_completion_tokens=80) as (_, play):
        (group,) = play({"turns": 1})
    conversation = group.rollouts[0].conversation
    assert conversation is not None
    assert conversation.messages[1] == {"role": "assistant", "content": text}
    assert conversation.turns[0].calls == ()
    assert conversation.stop == "done"


def test_on_servers_no_rollout_waits_for_the_environment_of_another(tmp_path):
    over = str(tmp_path / "over")
    rows = {"turns": 2, "waits": over}, {"turns": 4, "writes": over}  # the first goes on once the second has ended
    with played(tmp_path, "98", draws_apart=True) as (sampler, play):
        slow, fast = play(*rows)
    assert [[stop(each) for each in group.rollouts] for group in (slow, fast)] == [["done"] * 2] * 2
    assert all(len(asked) == 1 for asked in sampler.asked)
    last = max(index for index, asked in enumerate(sampler.asked) if asked[0][0] == 1)
    assert all(index > last - 2 for index, asked in enumerate(sampler.asked) if asked[0][0] == 0 and asked[0][2] == 1)


def test_both_schedules_give_the_same_rollouts(tmp_path):
    rows = {"turns": 1}, {"turns": 3}, {"turns": 2, "dies": 1}
    with played(tmp_path, ["98", "7"]) as (_, play):
        rounds = play(*rows)
    with played(tmp_path, ["98", "7"], draws_apart=True) as (_, play):
        apart = play(*rows)
    for one, other in zip(rounds, apart, strict=True):
        assert [each.sequences for each in one.rollouts] == [each.sequences for each in other.rollouts]
        assert [each.rewards for each in one.rollouts] == [each.rewards for each in other.rollouts]
        assert [stop(each) for each in one.rollouts] == [stop(each) for each in other.rollouts]


def test_an_engine_that_fails_ends_all_rollouts(tmp_path):
    with played(tmp_path, "98", draws_apart=True, max_turns=1000, max_tokens=256) as (sampler, play):
        sampler.fails_at = 1
        with pytest.raises(SamplerError, match="the engine is gone"):
            play({"turns": 3}, {"turns": 900})
    assert len(sampler.asked) < 40
