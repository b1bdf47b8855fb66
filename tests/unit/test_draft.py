"""Speculation with a draft model: the same tokens, fewer steps, and no page lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from adapter_files import adapter_dir
from tiny import tiny_model_dir

from trainer.config.recipe import ModelSettings
from trainer.engine.draft import CHUNK, MOST, Drafter, check_vocabularies
from trainer.engine.model import EngineModel
from trainer.engine.protocol import Sampling
from trainer.engine.scheduler import Scheduler
from trainer.engine.sequences import LiveSequence
from trainer.errors import ModelError

PROMPT = tuple(range(5, 75))


def engine(directory: Path) -> EngineModel:
    return EngineModel(ModelSettings(path=str(directory), compute_dtype="float32"), max_rank=16)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("engine") / "model", scale=6.0)


@pytest.fixture(scope="module")
def model(directory: Path) -> EngineModel:
    return engine(directory)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> EngineModel:
    """Another model, which is mostly wrong."""
    return engine(tiny_model_dir(tmp_path_factory.mktemp("other") / "model", scale=2.0))


def sequence(prompt: tuple[int, ...] = PROMPT, **how: Any) -> LiveSequence:
    adapter = how.pop("adapter", None)
    return LiveSequence("a", prompt, Sampling(**{"max_tokens": 40, "seed": 7, "temperature": 1.0, **how}), adapter)


def run(model: EngineModel, rows: list[LiveSequence], drafter: Drafter | None, **settings: Any) -> Scheduler:
    pages = settings.pop("pages", 64)
    scheduler = Scheduler(model, model.pool(pages), drafter=drafter, **settings)
    for row in rows:
        scheduler.add(row)
    while not scheduler.is_idle:
        scheduler.step()
    assert scheduler.pool.num_used == 0
    assert drafter is None or drafter.pool.num_used == 0
    return scheduler


def test_a_draft_model_that_is_the_model_is_always_right(model: EngineModel) -> None:
    (row,), (expected,) = [sequence()], [sequence()]
    fast = run(model, [row], Drafter(model, 64, model.vocab_size)).counters
    slow = run(model, [expected], None, speculates=False).counters
    assert row.drawn == expected.drawn
    assert fast.accepted_tokens == fast.proposed_tokens > 0
    assert fast.steps < slow.steps / 3, "up to 8 tokens a step"


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 0.0},
        {"top_p": 0.9, "logprobs": 2},
        {"temperature": 0.7, "presence_penalty": 0.4, "frequency_penalty": 0.1},
        {"logit_bias": ((30, 4.0), (31, 4.0)), "stop_ids": (31,)},
    ],
)
def test_any_draft_model_changes_no_token(
    model: EngineModel, other: EngineModel, directory: Path, how: dict[str, Any]
) -> None:
    wide = model.adapter("wide", adapter_dir(directory.parent / "wide", directory, rank=4, seed=1))

    def tokens(drafter: Drafter | None, *, speculates: bool) -> tuple[list[list[int]], Scheduler]:
        rows = [sequence(PROMPT[k:], seed=k, adapter=owner, **how) for k, owner in enumerate((None, wide, None))]
        scheduler = run(model, rows, drafter, speculates=speculates)
        return [row.drawn for row in rows], scheduler

    expected, _ = tokens(None, speculates=False)
    for small in (model, other):
        drawn, scheduler = tokens(Drafter(small, 64, model.vocab_size), speculates=True)
        assert drawn == expected
        assert scheduler.counters.proposed_tokens > 0


def test_wrong_proposals_become_rare(model: EngineModel, other: EngineModel) -> None:
    counters = run(model, [sequence(max_tokens=200)], Drafter(other, 64, model.vocab_size)).counters
    assert counters.steps >= 150, "few were right"
    assert counters.proposed_tokens < 150


def test_a_long_prompt_is_read_in_chunks_and_a_full_store_proposes_nothing(model: EngineModel) -> None:
    prompt = tuple(5 + index % 200 for index in range(CHUNK + 100))
    row, expected = sequence(prompt), sequence(prompt)
    scheduler = run(model, [row], Drafter(model, 64, model.vocab_size))
    run(model, [expected], None, speculates=False)
    assert row.drawn == expected.drawn
    assert scheduler.counters.proposed_tokens > 0
    small = run(model, [sequence(PROMPT)], Drafter(model, 1, model.vocab_size))
    assert small.counters.proposed_tokens == 0


def test_sequences_that_wait_again_or_leave_free_the_draft_s_pages(model: EngineModel) -> None:
    drafter = Drafter(model, 64, model.vocab_size)
    how: list[dict[str, Any]] = [{"prompt": PROMPT[k : k + 36], "seed": k, "max_tokens": 90} for k in range(3)]
    rows, alone = [sequence(**each) for each in how], [sequence(**each) for each in how]
    scheduler = run(model, rows, drafter, pages=9)
    assert scheduler.counters.preempted > 0
    for row in alone:
        run(model, [row], None, speculates=False)
    assert [row.drawn for row in rows] == [row.drawn for row in alone]
    scheduler = Scheduler(model, model.pool(64), drafter=drafter)
    gone = sequence()
    scheduler.add(gone)
    while len(gone.drawn) < 3:
        scheduler.step()
    assert drafter.pool.num_used > 0
    assert scheduler.cancel(gone)
    assert (drafter.pool.num_used, scheduler.pool.num_used) == (0, 0)


def test_another_tokenizer_is_refused() -> None:
    check_vocabularies({"a": 0, "b": 1}, {"a": 0, "b": 1}, "small")
    with pytest.raises(ModelError, match=r"--draft-model small: its tokenizer is another one \(1 of 2 tokens differ\)"):
        check_vocabularies({"a": 0, "b": 2}, {"a": 0, "b": 1}, "small")


def test_the_longest_proposal_ends_with_the_sequence(model: EngineModel) -> None:
    row = sequence(max_tokens=MOST)
    counters = run(model, [row], Drafter(model, 64, model.vocab_size)).counters
    assert len(row.drawn) == MOST
    assert counters.drawn_tokens == MOST
