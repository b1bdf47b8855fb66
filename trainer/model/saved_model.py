"""Write a model whose parameters are all trained, complete as its base is."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from transformers import PreTrainedModel
from transformers.utils import cached_file

PROCESSOR_FILES: Final = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""Files of a model of images and text that neither the model nor the tokenizer writes."""


def save_model(causal_lm: PreTrainedModel, directory: Path, trained: Mapping[str, torch.Tensor], base: str) -> None:
    """Write weights, config.json, generation_config.json and the processor's files.

    The weights are the trained parameters and every tensor of the base that is not trained, such as the `layer_scalar`
    buffer of each layer of Gemma 4: without it transformers would load the buffer's initial value.

    Args:
        causal_lm: the model that was trained.
        directory: an existing, empty directory.
        trained: values of the trained parameters by name, in the dtype of the files.
        base: path or hub name of the base model.
    """
    causal_lm.save_pretrained(str(directory), state_dict={**_untrained(causal_lm), **trained})
    revision = None if Path(base).is_dir() else causal_lm.config._commit_hash
    for name in PROCESSOR_FILES:
        source = cached_file(
            base,
            name,
            revision=revision,
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
        )
        if source is not None:
            shutil.copyfile(source, directory / name)


def _untrained(causal_lm: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Persistent buffers and frozen parameters by name; of tied parameters none, since one name stands for all."""
    trained = {name for name, value in causal_lm.named_parameters(remove_duplicate=False) if value.requires_grad}
    return {name: value.cpu() for name, value in causal_lm.state_dict().items() if name not in trained}
