"""Rollouts of several sequences: packs, normalizers and the journal count them as one."""

from __future__ import annotations

from dataclasses import replace

import torch
from plans import rft_plan

from trainer.algorithms import token_weights
from trainer.config.recipe import RFTRecipe
from trainer.run.directory import RunDir
from trainer.run.journal import ChunkHeader, count_sampled, note_begun, read_chunk, write_chunk
from trainer.training.policy_update import minibatches
from trainer.training.rollouts import StepRollouts
from trainer.types import Conversation, DrawnSequence, Group, Rollout, Row, ToolCall, TurnSpan

CALL = ToolCall("call_0", "add", {"a": 1}, "bad_arguments", "b: missing")
CONVERSATION = Conversation(
    messages=({"role": "user", "content": "2?"}, {"role": "assistant", "content": "3"}),
    num_prompt=1,
    turns=(TurnSpan(0, 0, 2, 4, "stop", 0.5, (CALL,), {"seen": [1]}, 0.25), TurnSpan(1, 1, 3, 6, "length")),
    stop="length",
    later=(DrawnSequence((1, 40, 41, 7, 8, 9), (False, False, False, True, True, True), (-0.5, -0.25, -2.0)),),
    tools=({"type": "function", "function": {"name": "add"}},),
)
SPLIT = Rollout(
    (1, 40, 19, 2), (False, False, True, True), (-1.0, -0.5), "length", 3, "3", reward=1.0, advantage=0.5,
    conversation=CONVERSATION,
)  # fmt: skip
PLAIN = Rollout((1, 40, 20, 2), (False, False, True, True), (-1.5, -0.5), "stop", 3, "5", reward=0.0, advantage=-0.5)
ROW = Row({"answer": 4}, index=5)
GROUP = Group(ROW, (SPLIT, PLAIN))


def parts(budget: int, normalizer: str = "sequence"):
    fields = {
        "name": "small",
        "method": "rft",
        "model": {"path": "model"},
        "data": {"train": "rows.jsonl"},
        "steps": 10,
    }
    rewards = [{"use": "last_number"}]
    algorithm = {"normalizer": normalizer, "overlong": "keep"}
    plan = rft_plan(RFTRecipe.model_validate({**fields, "rewards": rewards, "algorithm": algorithm}))
    drawn = StepRollouts((GROUP,), (0,), (GROUP,), 0)
    (part,) = minibatches(drawn, plan, torch.device("cpu"), budget)
    return part


def test_every_drawn_token_is_trained_with_the_advantage_of_its_rollout():
    part = parts(1000)
    pairs = sorted(
        (token, advantage)
        for pack in part.packs
        for token, advantage in zip(pack.targets.tolist(), pack.inputs.advantages.tolist(), strict=True)
    )
    assert pairs == [(2, -0.5), (2, 0.5), (7, 0.5), (8, 0.5), (9, 0.5), (19, 0.5), (20, -0.5)]


def test_a_rollout_counts_once_in_the_normalizer():
    part = parts(1000)
    assert part.denominator == 2.0
    for pack in part.packs:
        weights = token_weights("sequence", pack.sequence_ids)
        for rollout in pack.sequence_ids.unique():
            assert weights[pack.sequence_ids == rollout].sum().item() == 1.0


def test_sequences_of_a_rollout_are_in_one_pack_whatever_the_budget():
    for budget in (1, 8, 1000):
        sizes = sorted(
            int((pack.sequence_ids == rollout).sum())
            for pack in parts(budget).packs
            for rollout in pack.sequence_ids.unique()
        )
        assert sizes == [2, 5], budget


def test_a_conversation_returns_from_the_journal_as_it_was(tmp_path):
    run = RunDir(tmp_path)
    header = ChunkHeader(0, (5,), 2, 1, (3, None), {"game.py": "sha256:12"})
    note_begun(run, 0, 0)
    write_chunk(run, 0, header, [GROUP])
    assert read_chunk(run, 0, header, [ROW]) == [GROUP]
    assert count_sampled(run) == (7, 0)
    changed = replace(header, environment={"game.py": "sha256:34"})
    assert read_chunk(run, 0, changed, [ROW]) is None, "an edited environment plays again"
    assert "environment" not in replace(header, environment=None).record()
