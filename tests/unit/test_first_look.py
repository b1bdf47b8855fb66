"""`trainer check` refuses what first rows and file headers already show; the last line is a verdict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_recipe import RFT, SFT, write_small

from trainer.commands.cli import main


@pytest.fixture(autouse=True)
def _in_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def check(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["check", "recipe.yaml", *arguments])
    out, err = capsys.readouterr()
    return code, out.splitlines()[-1], err


def write_weights() -> None:
    names = [f"model.layers.{n}.{part}.weight" for n in range(2) for part in ("self_attn.q_proj", "mlp.up_proj")]
    save_file({name: torch.zeros(2, 2) for name in [*names, "model.embed_tokens.weight"]}, "model/w.safetensors")


def test_a_good_recipe_is_ready(capsys: pytest.CaptureFixture[str]) -> None:
    write_small(Path())
    code, verdict, err = check(capsys)
    assert (code, err) == (0, "")
    assert verdict == "ready: 10 steps on cpu; every value with its origin: --values"


def test_every_bad_row_among_the_first_is_named_and_the_count_is_the_verdict(
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_small(Path())
    rows = ['{"prompt": "a", "completion": "b"}', '{"prompt": "a"', '{"chosen": "a", "rejected": "b"}']
    Path("train.jsonl").write_text("\n".join(rows) + "\n")
    code, verdict, err = check(capsys)
    assert (code, verdict) == (2, "refused: 2 problems above")
    first, second = err.splitlines()
    assert first.startswith("train.jsonl:2: not JSON")
    assert second.startswith("train.jsonl:3:")
    assert "preference" in second


def test_a_table_of_the_wrong_form_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    write_small(Path(), SFT.replace("train.jsonl", "train.csv"))
    Path("train.csv").write_text("question,reply\na,b\n")
    code, verdict, err = check(capsys)
    assert (code, verdict) == (2, "refused: 1 problem above")
    assert "\ntrain.csv:" in err
    assert "question" in err


@pytest.mark.parametrize(
    ("targets", "problem"),
    [
        ("[q_proj, FAKE_TARGET]", "lora.target_modules: no module is called `FAKE_TARGET`; the model has"),
        ("[q_prj]", "lora.target_modules: no module is called `q_prj`; did you mean `q_proj`?"),
        ("[q_proj, embed_tokens]", "lora.target_modules: `embed_tokens` is an embedding"),
    ],
)
def test_target_modules_that_cannot_have_an_adapter_are_refused(
    capsys: pytest.CaptureFixture[str], targets: str, problem: str
) -> None:
    write_small(Path(), SFT.replace("  rank: 4\n", f"  rank: 4\n  target_modules: {targets}\n"))
    write_weights()
    code, verdict, err = check(capsys)
    assert (code, verdict) == (2, "refused: 1 problem above")
    assert err.startswith(problem)


def test_target_modules_may_be_the_end_of_a_dotted_name(capsys: pytest.CaptureFixture[str]) -> None:
    write_small(Path(), SFT.replace("  rank: 4\n", "  rank: 4\n  target_modules: [self_attn.q_proj, up_proj]\n"))
    write_weights()
    assert check(capsys)[0] == 0


def test_a_missing_chat_template_and_too_few_positions_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    write_small(Path())
    config = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    Path("model/tokenizer_config.json").write_text("{}")
    code, verdict, err = check(capsys)
    assert (code, verdict) == (2, "refused: 2 problems above")
    assert "the tokenizer has no chat template. Set `model.chat_template` to a Jinja file or to a built-in" in err
    assert "data.max_seq_tokens: 128 tokens, but the model has 64 positions" in err
    assert check(capsys, "--set", "model.chat_template=chatml", "--set", "data.max_seq_tokens=64")[0] == 0


@pytest.mark.parametrize(
    ("rope", "is_refused"),
    [
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}, False),  # 2 x 64 = 128
        ({"rope_type": "yarn", "factor": 1.5, "original_max_position_embeddings": 64}, True),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8}, True),  # the 64 are 8 x 8
        ({"rope_type": "default", "rope_theta": 10000.0}, True),
    ],
)
def test_scaled_rotary_positions_count(
    capsys: pytest.CaptureFixture[str], rope: dict[str, Any], is_refused: bool
) -> None:
    write_small(Path())
    config = json.loads(Path("model/config.json").read_text())
    config |= {"max_position_embeddings": 64, "rope_scaling": rope}
    Path("model/config.json").write_text(json.dumps(config))
    code, _, err = check(capsys)
    assert (code == 2) is is_refused
    assert ("the model has 64 positions" in err) is is_refused


@pytest.mark.parametrize(
    ("template", "row", "is_refused"),
    [
        ("{{ messages }}<|new|>", "a", True),
        ("{{ messages }}", "a <|new|> b", True),
        ("{{ messages }}", "a", False),  # a token that nothing uses needs no row
    ],
)
def test_a_token_without_an_embedding_row_is_refused_where_it_is_used(
    capsys: pytest.CaptureFixture[str], template: str, row: str, is_refused: bool
) -> None:
    write_small(Path())
    settings = {"chat_template": template, "added_tokens_decoder": {"320": {"content": "<|new|>"}}}
    Path("model/tokenizer_config.json").write_text(json.dumps(settings))
    tokens = {"added_tokens": [{"id": 0, "content": "<|end|>"}, {"id": 320, "content": "<|new|>"}]}
    Path("model/tokenizer.json").write_text(json.dumps(tokens))
    Path("train.jsonl").write_text(json.dumps({"prompt": row, "completion": "b"}) + "\n")
    code, _, err = check(capsys)
    assert (code == 2) is is_refused
    assert ("'<|new|>' (id 320) has no row in the model's embedding (320 rows)" in err) is is_refused


def test_a_gold_answer_that_no_completion_can_match_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    write_small(Path(), RFT)
    Path("train.jsonl").write_text('{"prompt": "a", "answer": "3/8"}\n' * 6)
    code, _, err = check(capsys)
    assert code == 2
    assert err.startswith("train.jsonl:1: answer is not a number: '3/8'")
