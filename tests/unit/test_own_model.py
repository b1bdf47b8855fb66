"""The engine's fallback: models without paged attention give their own numbers, with adapters and in company."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import engine_runs
import peft
import pytest
import torch
from adapter_files import adapter_dir
from engine_runs import PROMPT, greedy, sequence
from safetensors.torch import save_file
from tiny import HIDDEN, VOCAB_SIZE, tiny_model_dir
from transformers import AutoModelForCausalLM

from trainer.config.recipe import ModelSettings
from trainer.engine.__main__ import main
from trainer.engine.model import EngineModel
from trainer.engine.own_model import OwnModel, open_model
from trainer.engine.pages import PAGE
from trainer.engine.scheduler import Scheduler
from trainer.engine.sequences import LiveSequence
from trainer.errors import ModelError

FAMILIES = ["lfm2", "qwen3_next", "mamba2", "mixtral", "gpt_oss", "gemma2", "falcon", "stablelm"]


def opened(directory: Path, **settings: Any) -> OwnModel:
    model = open_model(ModelSettings(path=str(directory), **{"compute_dtype": "float32", **settings}), max_rank=16)
    assert isinstance(model, OwnModel)
    return model


def run(model: OwnModel, sequences: Sequence[LiveSequence], **settings: Any) -> Scheduler:
    """Run sequences to their end; afterwards nothing is kept of them."""
    scheduler = engine_runs.run(model, sequences, **settings)
    assert len(model._read) == 0
    return scheduler


@pytest.mark.parametrize("arch", FAMILIES)
def test_greedy_tokens_are_those_of_the_model(arch: str, tmp_path: Path) -> None:
    directory = tiny_model_dir(tmp_path, arch, scale=6.0)
    model = opened(directory)
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    prompts = [PROMPT, PROMPT[3:20], PROMPT[:1]]
    company = [sequence(prompt) for prompt in prompts]
    run(model, company, chunk_tokens=16)
    for each, prompt in zip(company, prompts, strict=True):
        assert each.drawn == greedy(reference, prompt, 12), model.note
    assert "one sequence after another" in model.note


@pytest.mark.parametrize("arch", ["lfm2", "qwen3_next"])
def test_a_hybrid_serves_adapters_and_its_base_in_one_step(arch: str, tmp_path: Path) -> None:
    directory = tiny_model_dir(tmp_path / "model", arch, scale=6.0)
    trained = adapter_dir(
        tmp_path / "trained", directory, rank=4, seed=1, target_modules=["q_proj", "v_proj", "o_proj"]
    )
    model = opened(directory)
    adapter = model.adapter("trained", trained)
    alone = sequence(temperature=1.0)
    run(model, [alone])
    base, adapted = sequence(temperature=1.0), sequence(adapter=adapter)
    run(model, [base, adapted])
    assert base.drawn == alone.drawn
    reference = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), str(trained)
    )
    assert adapted.drawn == greedy(reference, PROMPT, 12)
    assert adapted.drawn != greedy(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), PROMPT, 12)


def test_a_sequence_that_gives_way_is_read_again_and_draws_the_same(tmp_path: Path) -> None:
    model = opened(tiny_model_dir(tmp_path, "lfm2", scale=6.0))
    alone = [sequence(PROMPT[:number], max_tokens=40, temperature=1.0) for number in (31, 30)]
    for each in alone:
        run(model, [each])
    tight = [sequence(PROMPT[:number], max_tokens=40, temperature=1.0) for number in (31, 30)]
    scheduler = run(model, tight, pages=4)
    assert scheduler.counters.preempted > 0
    assert [each.drawn for each in tight] == [each.drawn for each in alone]


def test_nothing_is_shared_or_proposed_and_a_cancelled_sequence_leaves_nothing(tmp_path: Path) -> None:
    model = opened(tiny_model_dir(tmp_path, "lfm2", scale=6.0))
    repeated = (PROMPT[:8] * 12)[: 3 * PAGE]
    scheduler = run(model, [sequence(repeated, max_tokens=12), sequence(repeated, max_tokens=12)])
    assert (scheduler.counters.cached_tokens, scheduler.counters.proposed_tokens) == (0, 0)
    running = sequence()
    scheduler.add(running)
    scheduler.step()
    assert len(model._read) == 1
    scheduler.cancel(running)
    assert len(model._read) == 0


def test_a_cache_that_gives_other_logprobs_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.lfm2 import modeling_lfm2  # its convolution forgets what came before

    directory = tiny_model_dir(tmp_path, "lfm2", scale=6.0)
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    expected = greedy(reference, PROMPT, 12)
    own = modeling_lfm2.Lfm2ShortConv.forward
    monkeypatch.setattr(
        modeling_lfm2.Lfm2ShortConv,
        "forward",
        lambda self, hidden_states, *_, **__: own(self, hidden_states),
    )
    model = opened(directory)
    assert "a pass over all tokens for each one (with its cache logprobs differ by" in model.note
    drawn = sequence()
    run(model, [drawn])
    assert drawn.drawn == expected


def test_nf4_is_served_with_its_adapter(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    directory = tiny_model_dir(tmp_path / "model", scale=6.0)
    trained = adapter_dir(tmp_path / "trained", directory, rank=4, seed=1)
    model = opened(directory, quantization="nf4")
    assert "quantized layers: served by the model's own forward pass" in model.note
    base, adapted = sequence(), sequence(adapter=model.adapter("trained", trained))
    run(model, [base, adapted])
    assert base.drawn == greedy(model._causal_lm, PROMPT, 12)
    assert len(adapted.drawn) == 12
    assert adapted.drawn != base.drawn


def test_an_adapter_of_the_head_or_of_another_model_is_refused(tmp_path: Path) -> None:
    model = opened(tiny_model_dir(tmp_path / "model", "stablelm", scale=6.0))
    other = adapter_dir(tmp_path / "other", tiny_model_dir(tmp_path / "falcon", "falcon"), target_modules=["dense"])
    with pytest.raises(ModelError, match=r"belongs to another base model: there is no layer transformer\.h\.0"):
        model.adapter("other", other)
    name = "base_model.model.lm_head.lora_{}.weight"
    pair = {name.format("A"): torch.ones(4, HIDDEN), name.format("B"): torch.ones(VOCAB_SIZE, 4)}
    save_file(pair, other / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="adapts the LM head, which is not served"):
        model.adapter("other", other)


def test_plain_llama_has_pages_and_a_hybrid_takes_no_draft_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = tiny_model_dir(tmp_path / "plain")
    assert isinstance(open_model(ModelSettings(path=str(plain)), 16), EngineModel)
    hybrid = ModelSettings(path=str(tiny_model_dir(tmp_path / "hybrid", "lfm2")))
    words = ["--model", hybrid.model_dump_json(), "--draft-model", ModelSettings(path=str(plain)).model_dump_json()]
    assert main([*words, "--socket", str(tmp_path / "socket")]) != 0
    assert "would draft for takes none" in capsys.readouterr().err


def test_a_model_that_reads_later_tokens_or_no_tokens_alone_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.lfm2 import modeling_lfm2

    directory = tiny_model_dir(tmp_path, "lfm2", scale=6.0)
    own = modeling_lfm2.Lfm2ShortConv.forward
    with monkeypatch.context() as patch:
        patch.setattr(
            modeling_lfm2.Lfm2ShortConv,
            "forward",
            lambda self, hidden_states, *_, **__: own(self, hidden_states) + hidden_states.mean(1, keepdim=True),
        )
        with pytest.raises(ModelError, match="with later tokens: no causal language model"):
            opened(directory)

    def needs_pixels(*_: Any, **__: Any) -> Any:
        raise ValueError("give pixel_values")

    monkeypatch.setattr(modeling_lfm2.Lfm2Model, "forward", needs_pixels)
    with pytest.raises(ModelError, match=r"cannot run a sequence of tokens alone \(ValueError: give pixel_values\)"):
        opened(directory)
