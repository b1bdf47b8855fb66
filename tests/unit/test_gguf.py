"""GGUF files against transformers, which reads them back, and against llama.cpp itself."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_model_dir, tiny_tokenizer
from tokenizers import Regex, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from trainer.data.tokens import TokenSequence
from trainer.errors import ModelError
from trainer.export import gguf_tokenizer
from trainer.export.gguf_export import export_model
from trainer.export.gguf_families import Family
from trainer.export.gguf_file import read_adapter, write_adapter, write_model
from trainer.export.gguf_tokenizer import split_name
from trainer.export.verification import Sample

SERVER = Path(__file__).parents[1] / "llama_server.py"
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama 3": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama with biases": ("llama", {"attention_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
}
LONG = tuple((7919 * index) % 300 + 3 for index in range(90))
SAMPLE = Sample((TokenSequence(LONG, (True,) * len(LONG)),), 1, is_held_out=True)


@pytest.fixture(params=FAMILIES)
def model(request, tmp_path) -> Path:
    arch, changes = FAMILIES[request.param]
    return bfloat16_model(tmp_path / "model", arch, **changes)


def bfloat16_model(path: Path, arch: str, **changes) -> Path:
    tiny_model_dir(path, arch, scale=5.0, **changes)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms are ones and biases zeros in a new model, which hides mistakes
            parameter.data += torch.linspace(-0.5, 0.5, len(parameter)).bfloat16()
    model.save_pretrained(path)
    return path


def test_bf16_reads_back_with_equal_logits(model, tmp_path):
    check = export_model(model, tmp_path / "model.gguf", "bf16", SAMPLE, None)
    assert check.max_logit == 0.0


@pytest.mark.parametrize(("kind", "max_logit"), [("f16", 1e-4), ("q8_0", 0.2)])
def test_other_types_read_back_within_bounds(tmp_path, kind, max_logit):
    model = bfloat16_model(tmp_path / "model", "llama")
    check = export_model(model, tmp_path / "model.gguf", kind, SAMPLE, None)
    assert check.max_logit <= max_logit
    assert (check.max_logit > 1e-3) == (kind == "q8_0")
    assert ((tmp_path / "model.gguf").stat().st_size < 60_000) == (kind == "q8_0")


def test_a_model_that_q8_0_changes_too_much_is_refused(tmp_path):
    model = tiny_model_dir(tmp_path / "model", scale=60.0)  # logits of hundreds: a small relative error is a large one
    with pytest.raises(ModelError, match=r"model.gguf: .* mean KL .*; at most 0.02 is accepted for q8_0. Use bf16"):
        export_model(model, tmp_path / "model.gguf", "q8_0", SAMPLE, None)


@pytest.mark.parametrize(
    ("arch", "changes", "reason"),
    [
        ("mistral", {}, "is a model of type 'mistral'"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "type 'linear'"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8}, "has sliding windows"),
    ],
)
def test_other_families_are_refused_with_the_option_that_converts_them(arch, changes, reason):
    with pytest.raises(ModelError, match=rf"models/x: .*{reason}.*`--converter PATH/convert_hf_to_gguf.py`"):
        Family.of(AutoConfig.for_model(arch, **changes), "models/x")


def test_a_converter_is_run_and_its_file_verified(tmp_path):
    """A converter that copies a file written before: what it writes is read back like ours."""
    model = bfloat16_model(tmp_path / "model", "llama")
    other = bfloat16_model(tmp_path / "other", "llama", seed=1)
    write_model(model, tmp_path / "right.gguf", "bf16", "right")
    write_model(other, tmp_path / "wrong.gguf", "bf16", "wrong")
    converter = tmp_path / "convert.py"
    text = "import shutil, sys\nshutil.copy({!r}, sys.argv[sys.argv.index('--outfile') + 1])\n"
    converter.write_text(text.format(str(tmp_path / "right.gguf")))
    assert export_model(model, tmp_path / "out.gguf", "bf16", SAMPLE, converter).max_logit == 0.0
    converter.write_text(text.format(str(tmp_path / "wrong.gguf")))
    with pytest.raises(ModelError, match="at most 1e-05 is accepted for bf16"):
        export_model(model, tmp_path / "out.gguf", "bf16", SAMPLE, converter)
    converter.write_text("raise SystemExit('no such architecture')\n")
    with pytest.raises(ModelError, match=r"convert.py failed:\nno such architecture"):
        export_model(model, tmp_path / "out.gguf", "bf16", SAMPLE, converter)


def adapter_of(model: Path, path: Path, **changes) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes}
    adapted = get_peft_model(base, LoraConfig(**config))
    torch.manual_seed(1)  # after LONG, neither base nor policy stops: llama.cpp reports no probabilities of a stop
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    adapted.save_pretrained(path)
    return adapted.eval()


def test_an_adapter_reads_back_as_it_was(tmp_path):
    model = bfloat16_model(tmp_path / "model", "llama")
    adapted = adapter_of(model, tmp_path / "adapter")
    write_adapter(tmp_path / "adapter", str(model), None, tmp_path / "adapter.gguf", "f16", "adapter")
    read = read_adapter(tmp_path / "adapter.gguf", tmp_path / "adapter", str(model), None)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.testing.assert_close(
                read[name.replace(".default", "")], parameter.data.half().float(), rtol=0, atol=0
            )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "llama.cpp does not support DoRA adapters. Add --merge"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "llama.cpp supports adapters of linear layers only"),
    ],
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_adapters_that_llama_cpp_does_not_support_are_refused(tmp_path, changes, message):
    model = bfloat16_model(tmp_path / "model", "llama")
    adapter_of(model, tmp_path / "adapter", **changes)
    with pytest.raises(ModelError, match=message):
        write_adapter(tmp_path / "adapter", str(model), None, tmp_path / "adapter.gguf", "f16", "adapter")


# ---- llama.cpp itself


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


class LlamaCpp:
    """llama.cpp's server in a process of its own, which ends with this object."""

    def __init__(self, file: Path, adapter: Path | None = None) -> None:
        pytest.importorskip("xllamacpp", reason="llama.cpp is not installed (pip install xllamacpp)")
        files = [str(file), *([str(adapter)] if adapter is not None else [])]
        process = subprocess.Popen([sys.executable, SERVER, *files], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        weakref.finalize(self, end, process)
        said = (line.split() for line in process.stdout)
        self._address = next(words[1] for words in said if words[:1] == ["address"])
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        content, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(self._address + path, content, kind)
        with self._opener.open(request, timeout=60) as response:
            return json.load(response)

    def top_logprobs(self, ids: tuple[int, ...]) -> dict[int, float]:
        """The ten likeliest next tokens."""
        done = self.post("/completion", {"prompt": list(ids), "n_predict": 1, "temperature": 0, "n_probs": 10})
        return {top["id"]: top["logprob"] for top in done["completion_probabilities"][0]["top_logprobs"]}

    def token_ids(self, text: str) -> list[int]:
        return self.post("/tokenize", {"content": text, "parse_special": True, "add_special": True})["tokens"]


def assert_same_next_token(llama_cpp: LlamaCpp, model: torch.nn.Module, tolerance: float) -> None:
    with torch.inference_mode():
        logprobs = model(input_ids=torch.tensor([LONG])).logits[0, -1].float().log_softmax(-1)
    top = llama_cpp.top_logprobs(LONG)
    assert len(top) == 10
    assert max(top, key=top.__getitem__) == int(logprobs.argmax())
    assert top == pytest.approx({token: float(logprobs[token]) for token in top}, abs=tolerance)


def test_llama_cpp_computes_the_same_distribution(model, tmp_path):
    write_model(model, tmp_path / "model.gguf", "bf16", "tiny")
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    assert_same_next_token(LlamaCpp(tmp_path / "model.gguf"), plain, tolerance=0.05)  # it computes in bfloat16


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_llama_cpp_applies_an_adapter_like_peft(tmp_path, arch, rslora):
    model = bfloat16_model(tmp_path / "model", arch)
    adapted = adapter_of(model, tmp_path / "adapter", use_rslora=rslora)
    write_model(model, tmp_path / "model.gguf", "bf16", "tiny")
    write_adapter(tmp_path / "adapter", str(model), None, tmp_path / "adapter.gguf", "f16", "adapter")
    llama_cpp = LlamaCpp(tmp_path / "model.gguf", tmp_path / "adapter.gguf")
    assert_same_next_token(llama_cpp, adapted, tolerance=0.05)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with pytest.raises(AssertionError):
        assert_same_next_token(llama_cpp, base, tolerance=0.05)


SPLITS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "qwen2": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(gguf_tokenizer.SPLITS["qwen2"][0]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}
TEXTS = (
    "<|im_start|>user\nwhat is the sum of 8 and 90?<|im_end|>\n<|im_start|>assistant\n",
    "the answer is  98.\n\n\tI'll see 1234567 cats, don't I?",
    "Grüße, 你好 🦊 and café!!! the quick brown fox\r\n   jumps",
    "  the answer",
)


@pytest.mark.parametrize("name", SPLITS)
def test_llama_cpp_tokenizes_equally(tmp_path, name):
    model = bfloat16_model(tmp_path / "model", "llama")
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = SPLITS[name]
    tokenizer.save_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert split_name(json.loads(tokenizer.backend_tokenizer.to_str())) == name
    write_model(model, tmp_path / "model.gguf", "bf16", "tiny")
    llama_cpp = LlamaCpp(tmp_path / "model.gguf")
    for text in TEXTS:
        assert llama_cpp.token_ids(text) == tokenizer(text)["input_ids"], text


def test_a_tokenizer_that_splits_in_another_way_is_refused():
    tokenizer = tiny_tokenizer()
    split = pre_tokenizers.Split(Regex(r"\p{L}+"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    with pytest.raises(ModelError, match="the tokenizer is none of those that are written to GGUF here"):
        split_name(json.loads(tokenizer.backend_tokenizer.to_str()))
