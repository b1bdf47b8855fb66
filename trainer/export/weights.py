"""The policy that has the chosen weights of a run, and their files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

import torch

from trainer.data.chat import load_tokenizer
from trainer.export.choice import Weights
from trainer.model.adapters import RUN_ADAPTER
from trainer.model.policy import Policy, load_policy
from trainer.planning.plan import Plan
from trainer.training.masters import read_masters

CPU: Final = torch.device("cpu")


def load_trained(plan: Plan, weights: Weights) -> Policy:
    """The run's policy with these weights in float32 on the CPU, as training computes it.

    Raises:
        ModelError: the base model or the weights cannot be loaded.
        CheckpointError: the checkpoint cannot be read.
    """
    recipe = plan.recipe
    plain = {"compute_dtype": "float32", "quantization": None, "gradient_checkpointing": False}
    plain |= {"activation_offload": False}
    model = recipe.model.model_copy(update=plain)
    if recipe.lora is None and not weights.is_checkpoint:
        return load_policy(model.model_copy(update={"path": str(weights.directory)}), None, recipe.seed, CPU)
    lora = None if recipe.lora is None else recipe.lora.model_copy(update={"warm_start": None})
    policy = load_policy(model, lora, recipe.seed, CPU)
    policy.eval()
    parameters = policy.trained_parameters()
    with torch.no_grad():
        if weights.is_checkpoint:
            read_masters(weights.directory, {name: value.data for name, value in parameters.items()})
        elif policy.adapters is not None:
            saved = policy.adapters.load_tensors(RUN_ADAPTER, weights.directory)
            for name, parameter in parameters.items():
                parameter.copy_(saved[name])
    return policy


def write_weights(plan: Plan, weights: Weights, policy: Policy, directory: Path) -> None:
    """Write an adapter as PEFT reads it, or a whole model as transformers does, with its tokenizer.

    Args:
        plan: the plan of the run.
        weights: what is exported; files are copied, a checkpoint is converted.
        policy: has these weights. A model from a checkpoint is rounded to the recipe's dtype in place.
        directory: an existing, empty directory.
    """
    if not weights.is_checkpoint:
        shutil.copytree(weights.directory, directory, dirs_exist_ok=True)
        return
    masters = {name: value.detach().clone() for name, value in policy.trained_parameters().items()}
    if plan.recipe.lora is None:
        policy.to(getattr(torch, plan.recipe.model.compute_dtype))
    policy.save(directory, masters)
    load_tokenizer(plan.recipe.model).save_pretrained(str(directory))
