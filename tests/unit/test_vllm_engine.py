"""vLLM behind the gateway: what it is asked, how answers are read; real ones are in test_vllm_managed."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import torch
from llguidance import LLMatcher
from safetensors.torch import save_file

from trainer.engine.protocol import Sampling
from trainer.errors import ModelError
from trainer.managed.place import ServerPlace
from trainer.serve.adapter_file import adapter_digest, refuse_not_finite
from trainer.serve.api_errors import ApiError
from trainer.serve.command import main
from trainer.serve.engine_client import End, Token
from trainer.serve.structure import json_grammar
from trainer.serve.vllm_engine import VllmEngine, as_lark, events_of, request_body

SCHEMA = {"type": "object", "properties": {"a": {"enum": ["red", "blue"]}}, "required": ["a"]}
STREAMED = {
    "token_ids": [442, 520],
    "logprobs": {
        "token_logprobs": [-5.2, -2.0],
        "top_logprobs": [{"token_id:442": -5.2, "token_id:78": -3.9, "token_id:9": -4.3}, {"token_id:520": -2.0}],
    },
    "finish_reason": None,
}
"""As vLLM 0.32 answers with two alternatives: a drawn token that is not among them is added."""


def test_tokens_have_the_reports_of_the_embedded_engine():
    sampling = Sampling(max_tokens=5, seed=0, logprobs=2)
    first, second = events_of(STREAMED, (1, 2), sampling)
    assert first == Token(442, {"logprob": -5.2, "top": [[78, -3.9], [9, -4.3]]})
    assert second == Token(520, {"logprob": -2.0, "top": [[520, -2.0]]})
    assert events_of(STREAMED, (1, 2), Sampling(max_tokens=5, seed=0))[0] == Token(442, None)


def test_the_end_has_the_logprobs_of_the_prompt_and_a_token_that_nobody_asked_for_is_left_out():
    choice = {
        "token_ids": [7], "logprobs": None, "finish_reason": "length",
        "prompt_logprobs": [None, {"2": {"logprob": -18.0}, "29": {"logprob": -1.0}}],
    }  # fmt: skip
    ended = events_of(choice, (1, 2), Sampling(max_tokens=0, seed=0, prompt_logprobs=1))
    assert ended == [End("length", prompt_logprobs=({"logprob": -18.0, "top": [[29, -1.0]]},))]


def test_every_parameter_is_said_so_that_no_default_of_vllm_counts():
    body = request_body([1, 2], Sampling(max_tokens=3, seed=8, sample=2, stop_ids=(2,), logit_bias=((5, 1.5),)), "m")
    wanted = {
        "seed": 10, "stop_token_ids": [2], "ignore_eos": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0,
        "min_p": 0.0, "repetition_penalty": 1.0, "logit_bias": {"5": 1.5}, "stream": True, "return_token_ids": True,
    }  # fmt: skip
    assert body | wanted == body
    assert request_body([1], Sampling(max_tokens=3, seed=8, first_position=4), "m")["seed"] != 8, "other noise"


def test_grammars_are_given_as_lark_that_llguidance_accepts():
    lark = as_lark(json_grammar(SCHEMA))
    assert lark.startswith("%llguidance {}\nstart: %json {")
    assert json.loads(lark.partition("%json ")[2])["properties"] == SCHEMA["properties"]
    assert not LLMatcher.validate_grammar(lark)
    assert as_lark("%llguidance {}\nstart: /a/") == "%llguidance {}\nstart: /a/"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_with_the_tensors_name(tmp_path, dtype, value):
    weights = {"a.lora_A": torch.full((3, 5), 0.5, dtype=dtype), "b.lora_B": torch.ones(7, dtype=dtype)}
    file = tmp_path / "adapter_model.safetensors"
    save_file(weights, file)
    refuse_not_finite(tmp_path)
    weights["b.lora_B"][3] = value
    save_file(weights, file)
    with pytest.raises(ModelError, match=r"b\.lora_B has values that are not finite"):
        refuse_not_finite(tmp_path)


def test_equal_adapters_have_equal_digests_and_files_that_cannot_be_read_are_refused(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
        save_file({"a": torch.ones(3)}, tmp_path / name / "adapter_model.safetensors")
    assert adapter_digest(tmp_path / "one") == adapter_digest(tmp_path / "two")
    save_file({"a": torch.zeros(3)}, tmp_path / "two" / "adapter_model.safetensors")
    assert adapter_digest(tmp_path / "one") != adapter_digest(tmp_path / "two")
    with pytest.raises(ModelError, match="No such file"):
        adapter_digest(tmp_path)
    (tmp_path / "one" / "adapter_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelError, match="cannot be read"):
        refuse_not_finite(tmp_path / "one")


def test_an_adapter_that_is_not_loaded_and_a_server_that_was_given_up_are_said(tmp_path):
    async def ask(engine: VllmEngine, adapter: str | None) -> None:
        await anext(engine.generate([1], Sampling(max_tokens=1, seed=0), adapter))

    async def check() -> None:
        engine = VllmEngine(ServerPlace(tmp_path), "base", {})
        with pytest.raises(ApiError, match="no adapter 'x' is loaded"):
            await ask(engine, "x")
        (tmp_path / "0.failed").write_text("the last words")
        with pytest.raises(ApiError, match="vLLM was given up"):
            await ask(engine, None)
        assert not engine.is_ready
        assert engine.num_live == 0
        await engine.close()

    asyncio.run(check())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kv-cache-tokens", "64"], "--kv-cache-tokens goes with the embedded engine; for vLLM see --vllm-argument"),
        (["--vllm-python", "nowhere"], "no Python with vLLM: nowhere does not exist"),
    ],
)
def test_what_vllm_cannot_be_started_with_is_refused(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("model/config.json").write_text('{"vocab_size": 320}')
    assert main(["model", "--engine", "vllm", *arguments]) == 2
    assert message in capsys.readouterr().err
