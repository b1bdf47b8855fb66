"""The embedded engine on tiny models: the model's own numbers, alone and in company, with and without adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_files import adapter_dir
from engine_runs import PROMPT, greedy, run, sequence
from safetensors.torch import load_file, save_file
from tiny import tiny_model_dir
from transformers import AutoModelForCausalLM

from trainer.config.recipe import ModelSettings
from trainer.engine.adapters import AdapterVersion
from trainer.engine.attention import Segment
from trainer.engine.model import EngineModel, StepRow
from trainer.engine.pages import PAGE, PagePool, prefix_keys
from trainer.engine.scheduler import Scheduler
from trainer.engine.speculate import PromptLookup
from trainer.errors import ModelError


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("engine") / "model", scale=6.0)


@pytest.fixture(scope="module")
def model(directory: Path) -> EngineModel:
    return EngineModel(ModelSettings(path=str(directory), compute_dtype="float32"), max_rank=16)


@pytest.fixture(scope="module")
def adapters(model: EngineModel, directory: Path) -> list[AdapterVersion]:
    """Of different ranks and targets."""
    wide = adapter_dir(directory.parent / "wide", directory, rank=4, seed=1)
    narrow = adapter_dir(directory.parent / "narrow", directory, rank=2, seed=2, target_modules=["q_proj", "v_proj"])
    return [model.adapter("wide", wide), model.adapter("narrow", narrow)]


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "qwen3"])  # mistral has a window of 8 tokens
def test_greedy_tokens_are_those_of_the_model(arch: str, tmp_path: Path) -> None:
    directory = tiny_model_dir(tmp_path, arch, scale=6.0)
    engine = EngineModel(ModelSettings(path=str(directory), compute_dtype="float32"), max_rank=16)
    rows = [sequence(), sequence(PROMPT[3:30]), sequence(PROMPT[:1])]
    run(engine, rows, chunk_tokens=16)  # prompts are read in chunks while others are continued
    theirs = AutoModelForCausalLM.from_pretrained(directory)
    for row in rows:
        assert row.drawn == greedy(theirs, row.prompt, 12)


def test_rows_of_adapters_follow_peft_beside_rows_of_the_base(
    model: EngineModel, directory: Path, adapters: list[AdapterVersion]
) -> None:
    rows = [sequence(PROMPT[begin:], adapter) for begin in (0, 9) for adapter in (None, *adapters)]
    run(model, rows)
    base = AutoModelForCausalLM.from_pretrained(directory)
    answers: dict[str | None, list[list[int]]] = {None: [greedy(base, PROMPT[begin:], 12) for begin in (0, 9)]}
    for adapter in adapters:
        adapted = peft.PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(directory), str(directory.parent / adapter.name)
        )
        answers[adapter.name] = [greedy(adapted, PROMPT[begin:], 12) for begin in (0, 9)]
    for index, row in enumerate(rows):
        assert row.drawn == answers[row.adapter.name if row.adapter else None][index // 3]
    assert answers[None] != answers["wide"] != answers["narrow"]


def test_rows_of_the_base_have_the_bits_of_a_batch_without_adapters(
    model: EngineModel, adapters: list[AdapterVersion]
) -> None:
    def logits(*owners: AdapterVersion | None) -> torch.Tensor:
        pool = model.pool(len(owners) * 3)
        rows = []
        for index, owner in enumerate(owners):
            part = sequence(PROMPT[index:])
            part.pages = [3 * index, 3 * index + 1, 3 * index + 2]
            rows.append(StepRow(part.prompt, Segment(part.pages, 0, len(part.prompt)), owner, [len(part.prompt) - 1]))
        return model.step(pool, rows)

    plain, mixed = logits(None, None, None, None), logits(None, None, *adapters)
    assert torch.equal(mixed[:2], plain[:2])
    assert not torch.equal(mixed[2], plain[2])
    assert not torch.equal(mixed[3], plain[3])


def test_a_seed_gives_the_same_tokens_alone_and_in_company(model: EngineModel, adapters: list[AdapterVersion]) -> None:
    how: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9, "max_tokens": 20}
    alone = sequence(seed=11, **how)
    run(model, [alone])
    among = sequence(seed=11, **how)
    others = [sequence(PROMPT[k:], adapters[k % 2], seed=k, temperature=0.7) for k in range(1, 6)]
    run(model, [*others, among], chunk_tokens=48)
    assert among.drawn == alone.drawn
    other = sequence(seed=12, **how)
    run(model, [other])
    assert other.drawn != alone.drawn


def test_sequences_that_lose_their_pages_begin_again_and_draw_the_same(model: EngineModel) -> None:
    rows = [sequence(PROMPT[k : k + 40], seed=k, temperature=1.0, max_tokens=60) for k in range(4)]
    scheduler = run(model, rows, pages=9)
    assert scheduler.counters.preempted > 0
    for k, row in enumerate(rows):
        alone = sequence(PROMPT[k : k + 40], seed=k, temperature=1.0, max_tokens=60)
        run(model, [alone])
        assert row.drawn == alone.drawn


def test_a_stream_continued_from_its_tokens_draws_the_rest(model: EngineModel) -> None:
    whole = sequence(temperature=1.0, max_tokens=20)
    run(model, [whole])
    rest = sequence([*PROMPT, *whole.drawn[:8]], temperature=1.0, max_tokens=12, first_position=8)
    run(model, [rest])
    assert rest.drawn == whole.drawn[8:]


def test_a_prefix_is_read_once_and_never_across_adapters_or_versions(
    model: EngineModel, directory: Path, adapters: list[AdapterVersion]
) -> None:
    newer = model.adapter("wide", adapter_dir(directory.parent / "newer", directory, rank=4, seed=9))
    scheduler = Scheduler(model, model.pool(64))
    cached = []
    for owner in (None, None, adapters[0], adapters[0], newer, newer):
        row = sequence(adapter=owner)
        scheduler.add(row)
        while not scheduler.is_idle:
            scheduler.step()
        cached.append(row.num_cached)
    assert cached == [0, 2 * PAGE, 0, 2 * PAGE, 0, 2 * PAGE]


def test_n_samples_of_one_prompt_read_it_once(model: EngineModel) -> None:
    rows = [sequence(temperature=1.0, sample=index) for index in range(4)]
    scheduler = run(model, rows)
    assert scheduler.counters.cached_tokens == 3 * 2 * PAGE
    assert len({tuple(row.drawn) for row in rows}) > 1


def test_pages_of_a_prefix_are_reused_when_the_budget_is_spent() -> None:
    pool = PagePool(1, 1, 4, 2, torch.float32)
    first, second = prefix_keys(b"base", range(2 * PAGE))
    pages: list[Any] = [pool.take(), pool.take()]
    assert pool.take() is None
    pool.keep(pages[0], first)
    pool.keep(pages[1], second)
    pool.release(pages)
    assert (pool.num_available, pool.num_cached) == (2, 2)
    assert pool.take() == pages[1]  # the end of a prefix goes before its beginning
    assert not pool.has(second)
    assert pool.share(first) == pages[0]


def test_parameters_act(model: EngineModel) -> None:
    plain = sequence()
    run(model, [plain])
    forbidden = sequence(logit_bias=((plain.drawn[0], -100.0),))
    forced = sequence(logit_bias=((9, 100.0),), temperature=1.0)
    frequent = sequence(logit_bias=((9, 30.0),), frequency_penalty=2.0, max_tokens=40)
    stopped = sequence(stop_ids=(plain.drawn[2],))
    single = sequence(top_k=1, temperature=2.0)
    run(model, [forbidden, forced, frequent, stopped, single])
    assert forbidden.drawn[0] != plain.drawn[0]
    assert set(forced.drawn) == {9}
    assert 9 in frequent.drawn
    assert len(set(frequent.drawn)) > 1  # 30 - 2 * count falls below the others
    assert stopped.drawn == plain.drawn[: plain.drawn.index(plain.drawn[2]) + 1]
    assert single.drawn == plain.drawn


def test_logprobs_are_the_model_s_own(model: EngineModel, directory: Path) -> None:
    row = sequence(temperature=0.5, top_k=3, logprobs=2, prompt_logprobs=0)
    scheduler = Scheduler(model, model.pool(16), chunk_tokens=32)
    scheduler.add(row)
    reports: list[Any] = []
    while not scheduler.is_idle:
        reports += [report for _, _, report in scheduler.step().tokens]
    ids = [*row.prompt, *row.drawn]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(directory)(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = theirs[:-1].gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
    ours = [each["logprob"] for each in [*row.prompt_logprobs, *reports]]
    torch.testing.assert_close(torch.tensor(ours), expected, atol=1e-4, rtol=1e-4)
    values, tokens = theirs[len(row.prompt) - 1].topk(2)
    assert [token for token, _ in reports[0]["top"]] == tokens.tolist()
    torch.testing.assert_close(torch.tensor([value for _, value in reports[0]["top"]]), values, atol=1e-4, rtol=1e-4)


REPEATING = (*range(20, 50), *range(20, 26))
"""The end of this prompt has occurred before."""
FEW = tuple((token, 60.0) for token in (30, 31, 32))
"""Bias that leaves these three tokens, so that pairs repeat."""


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"temperature": 1.0, "top_p": 0.9, "logit_bias": FEW},
        {"temperature": 0.7, "presence_penalty": 0.4, "frequency_penalty": 0.1, "logit_bias": FEW},
        {"temperature": 1.0, "logit_bias": FEW, "logprobs": 2},
    ],
)
def test_proposed_tokens_change_no_token(
    model: EngineModel, adapters: list[AdapterVersion], how: dict[str, Any]
) -> None:
    def tokens(*, speculates: bool) -> tuple[list[list[int]], Scheduler]:
        owners = (None, adapters[0], None)
        rows = [sequence(REPEATING, owner, max_tokens=60, seed=k, **how) for k, owner in enumerate(owners)]
        scheduler = run(model, rows, speculates=speculates)
        return [row.drawn for row in rows], scheduler

    (drawn, with_), (expected, without) = tokens(speculates=True), tokens(speculates=False)
    assert drawn == expected
    assert with_.counters.proposed_tokens > 0
    assert (without.counters.proposed_tokens, with_.counters.drawn_tokens) == (0, without.counters.drawn_tokens)
    assert with_.counters.steps <= without.counters.steps


def test_a_text_that_repeats_itself_takes_fewer_steps(model: EngineModel) -> None:
    bias = tuple((token, 100.0) for token in (30,))
    row = sequence(REPEATING, max_tokens=100, logit_bias=bias, temperature=1.0)
    scheduler = run(model, [row])
    assert row.drawn == [30] * 100
    assert scheduler.counters.steps < 30
    assert scheduler.counters.accepted_tokens >= 100 - scheduler.counters.steps


def test_proposals_end_with_the_sequence_and_fit_the_pages(model: EngineModel) -> None:
    bias = ((30, 100.0),)
    rows = [sequence(REPEATING[k:], max_tokens=90, logit_bias=bias, temperature=1.0) for k in range(4)]
    stopped = sequence(REPEATING, max_tokens=90, logit_bias=bias, stop_ids=(30,), temperature=1.0)
    scheduler = run(model, [*rows[:3], stopped], pages=9)
    assert [row.drawn for row in rows[:3]] == [[30] * 90] * 3
    assert stopped.drawn == [30]
    assert scheduler.counters.preempted > 0


def test_proposals_that_are_wrong_become_rare() -> None:
    lookup, drawn, asked = PromptLookup(), [1, 2], 0
    for number in range(200):
        proposed = lookup.propose((1, 2, 3), drawn, 8)
        if proposed:
            asked += 1
            lookup.pace.learn(len(proposed), 0)
        drawn += [1, 2] if number % 2 else [9]
    assert 3 < asked < 15


def test_a_cancelled_sequence_frees_its_pages(model: EngineModel) -> None:
    scheduler = Scheduler(model, model.pool(16))
    running, waiting = sequence(), sequence(PROMPT[1:])
    scheduler.add(running)
    scheduler.step()
    scheduler.add(waiting)
    assert scheduler.cancel(running)
    assert scheduler.cancel(waiting)
    assert not scheduler.cancel(running)
    assert (scheduler.is_idle, scheduler.pool.num_used) == (True, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora = True is not served"),
        ({"r": 32}, "rank 32; this server takes 1 to 16"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_adapters_of_other_kinds_are_refused(
    model: EngineModel, directory: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = adapter_dir(tmp_path, directory)
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ModelError, match=message):
        model.adapter("bad", path)


def test_broken_adapters_and_those_of_another_base_are_refused(
    model: EngineModel, directory: Path, tmp_path: Path
) -> None:
    path = adapter_dir(tmp_path / "nan", directory)
    tensors = load_file(path / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="is not finite"):
        model.adapter("bad", path)
    changes: list[tuple[str, dict[str, Any]]] = [("wide", {"hidden_size": 64}), ("deep", {"num_hidden_layers": 3})]
    for name, change in changes:
        other = tiny_model_dir(tmp_path / name, **change)
        with pytest.raises(ModelError, match="belongs to another base model"):
            model.adapter("bad", adapter_dir(tmp_path / f"{name}-adapter", other))
    with pytest.raises(ModelError, match="no adapter can be read"):
        model.adapter("bad", tmp_path / "nothing")
