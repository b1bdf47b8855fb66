"""Kernels of a layer that ranks share, and of the same layer whole, lowered for an H100; prints them as JSON.

FSDP2's hooks run on torch's `fake` process group, which moves nothing: the weights have no meaning, their shapes do.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from typing import Any, Final
from unittest import mock

import torch
from lowered_kernels import kernels_of
from lowered_layers import first_pass_as_on_gpu, pack_of
from lowering import CARDS, Program, flex_as_on_gpu, gpu_backend
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig

from trainer.config.recipe import LoraSettings, ModelSettings
from trainer.model import attention, lora_mlp
from trainer.model.base_model import empty_model
from trainer.model.policy import make_policy

CPU: Final = torch.device("cpu")
RANKS: Final = 8
OPERATOR: Final = re.compile(r"torch\.ops\.(trainer\.\w+)\.default\(")
PACKS: Final = ((47,), (200, 90, 30), (400, 90))
"""The first is computed uncompiled, the others by one graph."""


def programs(*, is_sharded: bool) -> list[Program]:
    """The forward and the backward program of a small Llama's layers.

    Args:
        is_sharded: split the layers over `RANKS` ranks.
    """
    torch._dynamo.reset()
    kept: list[Program] = []
    config = AutoConfig.for_model(
        "llama", num_hidden_layers=2, hidden_size=256, num_attention_heads=2, num_key_value_heads=1, head_dim=128,
        intermediate_size=512, vocab_size=128, pad_token_id=0,
    )  # fmt: skip
    causal_lm: Any = empty_model(config, torch.bfloat16).to_empty(device=CPU).requires_grad_(False)
    with torch.no_grad():
        for value in causal_lm.parameters():
            value.fill_(0.01)
    policy = make_policy(causal_lm, ModelSettings(path="none"), LoraSettings(rank=16), 0)
    policy.compile_layers(gpu_backend(CARDS["sm_90"], kept))
    if is_sharded:
        policy.shard(init_device_mesh("cpu", (RANKS,)), CPU)
    policy.train()
    for lengths in PACKS:
        policy(pack_of(lengths)).logprobs.sum().backward()
    if policy.compiled is None or policy.compiled.problem is not None:
        raise RuntimeError(f"the layers were not compiled: {policy.compiled and policy.compiled.problem}")
    return kept


def main() -> None:
    """Print the Triton source of each kernel, and the names of our operators, of the whole and of the sharded layer."""
    warnings.simplefilter("ignore")
    attention.register()
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    found = {}
    # the operator of a gated layer, with torch's products: its kernels do not run on a CPU
    with flex_as_on_gpu(), first_pass_as_on_gpu(), mock.patch.object(lora_mlp, "has_kernels", return_value=True):
        for name in ("whole", "sharded"):
            made = programs(is_sharded=name == "sharded")
            found[name] = {
                each.kind: {
                    "kernels": [source for _, source in kernels_of(each)],
                    "operators": OPERATOR.findall(each.source),
                }
                for each in made
            }
    distributed.destroy_process_group()
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
