"""FlashAttention-4 on a GPU: what the run tests before it uses it, and a policy's gradients with and without it."""

from __future__ import annotations

import pytest
import torch
from compiled import gradients, make_pack

from trainer.config.recipe import LoraSettings, ModelSettings
from trainer.model.flash_choice import KERNELS, AttentionKind, problem_of, problem_of_package
from trainer.model.policy import load_policy

pytestmark = pytest.mark.skipif(problem_of_package() is not None, reason=str(problem_of_package()))
LLAMA = AttentionKind(32, 8, 128, 128, torch.bfloat16, 128**-0.5, None, None, False)
KINDS = {
    "Llama 3.1 8B": LLAMA,
    "SmolLM2 135M": LLAMA._replace(heads=9, kv_heads=3, width=64, value_width=64, scaling=0.125),
    "Gemma 2 9B": LLAMA._replace(heads=16, width=256, value_width=256, scaling=0.0625, window=4096, softcap=50.0),
    "gpt-oss": LLAMA._replace(heads=64, width=64, value_width=64, scaling=0.125, window=128, has_sinks=True),
    "float16": LLAMA._replace(dtype=torch.float16),
}


@pytest.mark.parametrize("name", KINDS)
def test_the_kernels_compute_what_torch_computes_a_thousand_times(cuda, name):
    assert problem_of(KERNELS, cuda, KINDS[name]) is None


def test_gradients_are_those_of_flex_attention(cuda, model_dir):
    settings = [ModelSettings(path=str(model_dir), flash_attention=flag) for flag in (True, False)]
    ours, plain = (load_policy(each, LoraSettings(rank=4), 0, cuda) for each in settings)
    for lengths in ((200, 90, 30), (140, 150, 61, 9), (250,)):
        pack = make_pack(lengths, cuda)
        (_, found), (_, wanted) = gradients(ours, pack), gradients(plain, pack)
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=2e-2, atol=2e-2 * float(gradient.abs().max()))
    assert ours.compiled is not None
    assert ours.compiled.flash_attention
    assert ours.compiled.problem is None
