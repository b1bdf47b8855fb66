"""Completions behind one copy of their prompt compute what each computes alone; what teaches nothing is measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from block_masks import assert_blocks_leave_no_cell_out
from groups import CPU, drawn, four_groups, make_learner, make_plan, minibatches, perturb, run_step
from tiny import VOCAB_SIZE, tiny_model_dir

from trainer.config.recipe import LoraSettings, ModelSettings
from trainer.data.tokens import TokenSequence
from trainer.model import attention, flex
from trainer.model.batch import Batch, tree_batches
from trainer.model.eager_attention import AttentionOptions
from trainer.model.layout import PackedLayout
from trainer.model.policy import load_policy
from trainer.model.trees import Tree, grow_trees

pytestmark = pytest.mark.filterwarnings(
    "ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"  # PEFT's own patterns
)
TREES = ((13, (7, 2, 7, 30)), (9, ()), (20, (3, 1)))
"""Prefix and branches; the second is a plain sequence. Longer than the tiny models' window of 8."""


def sequences_of(prefix: int, branches: tuple[int, ...], generator: torch.Generator) -> list[TokenSequence]:
    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist())

    prompt = ids(prefix)
    if not branches:
        return [TokenSequence(prompt, (False,) * 4 + (True,) * (prefix - 4))]
    return [TokenSequence(prompt + ids(length), (False,) * prefix + (True,) * length) for length in branches]


def make_trees() -> list[Tree]:
    generator = torch.Generator().manual_seed(0)
    return [Tree(tuple(sequences_of(prefix, branches, generator)), prefix) for prefix, branches in TREES]


@pytest.mark.parametrize("arch", ["llama", "qwen3", "mistral", "mixtral", "gemma2", "gpt_oss"])
def test_a_tree_gives_the_logprobs_and_gradients_of_its_sequences(tmp_path, arch):
    model = ModelSettings(path=str(tiny_model_dir(tmp_path, arch, scale=5.0)), compute_dtype="float32")
    policy = load_policy(model, LoraSettings(rank=4), 0, CPU)
    perturb(policy)
    trees = make_trees()
    packed = Batch.pack_trees(trees, CPU)
    plain = Batch.pack([sequence for tree in trees for sequence in tree.sequences], CPU)
    assert packed.num_tokens == 13 + 46 + 9 + 20 + 4
    assert plain.num_tokens == 4 * 13 + 46 + 9 + 2 * 20 + 4
    found = []
    for batch in (packed, plain):
        policy.zero_grad()
        scores = policy(batch, temperature=0.7)
        (scores.logprobs * torch.linspace(-1, 1, batch.num_trained)).sum().backward()
        gradients = {name: value.grad.clone() for name, value in policy.trained_parameters().items()}
        found.append((scores.logprobs.detach(), gradients))
    (ours, our_gradients), (theirs, their_gradients) = found
    assert torch.equal(packed.targets, plain.targets)
    assert torch.equal(packed.sequence_ids, plain.sequence_ids)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)
    for name, gradient in our_gradients.items():
        torch.testing.assert_close(gradient, their_gradients[name], rtol=1e-3, atol=1e-4 * gradient.abs().max().item())


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("window", [None, 8])
def test_the_gpu_path_sees_the_same_trees(window):
    layout = PackedLayout.of_trees(TREES, CPU)
    total = sum(prefix + sum(branches) for prefix, branches in TREES)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 4, total, 16, generator=generator) for _ in range(3))
    form = AttentionOptions(0.25, window, None, None)
    try:
        found = flex.attend_flex(query, key, value, layout, form)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"this torch has no FlexAttention on CPU: {error}")
    torch.testing.assert_close(found, attention._bucketed(query, key, value, layout, form), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 128, 200])
@pytest.mark.parametrize(
    "trees",
    [((200, (150, 90, 60)), (300, ()), (130, (128, 128))), ((128, (128,) * 3),), ((3, (5,) * 60), (256, (1, 1)))],
)
def test_blocks_of_the_gpu_mask_leave_no_cell_out(trees, window):
    assert_blocks_leave_no_cell_out(PackedLayout.of_trees(trees, CPU), window)


def test_trees_keep_the_budget_and_lose_nothing():
    generator = torch.Generator().manual_seed(1)
    sequences = sequences_of(40, (30, 10, 25, 5, 60), generator)
    trees = grow_trees(sequences, 100)
    assert sorted(len(each.token_ids) for tree in trees for each in tree.sequences) == [45, 50, 65, 70, 100]
    assert all(tree.num_tokens <= 100 for tree in trees)
    assert [len(tree.sequences) for tree in trees] == [1, 2, 2]
    assert all(sum(tree.num_tokens for tree in pack) <= 100 for pack in tree_batches(trees, 100))


def test_sequences_that_share_little_stay_plain():
    generator = torch.Generator().manual_seed(1)
    sequences = sequences_of(2, (60, 60), generator)
    assert [tree.lengths for tree in grow_trees(sequences, 1000)] == [(62, ()), (62, ())]
    other = replace(sequences[1], token_ids=(sequences[0].token_ids[0] + 1, *sequences[1].token_ids[1:]))
    assert len(grow_trees([sequences[0], other], 1000)) == 2


class TestStill:
    """Groups whose advantages are all zero, without a penalty: nothing to learn, yet measured."""

    def test_they_stand_in_packs_of_their_own(self, tmp_path):
        packs = [pack for part in minibatches(drawn(four_groups()), make_plan(kl_coef=0.0), CPU) for pack in part.packs]
        assert [pack.is_forward_only for pack in packs] == [False, True]
        assert not packs[1].inputs.advantages.any()
        assert all(not pack.is_forward_only for part in minibatches(drawn(four_groups()), make_plan(kl_coef=0.1), CPU)
                   for pack in part.packs)  # fmt: skip

    def test_leaving_out_their_backward_pass_changes_no_number(self, tmp_path, monkeypatch):
        model_dir = tiny_model_dir(tmp_path)
        plan = make_plan(kl_coef=0.0)
        found = []
        for with_gradient in (False, True):
            learner = make_learner(model_dir, plan)
            if with_gradient:
                forward_backward = learner.forward_backward
                monkeypatch.setattr(
                    learner,
                    "forward_backward",
                    lambda batch, *args, f=forward_backward, **kw: f(
                        replace(batch, is_forward_only=False), *args, **kw
                    ),
                )
            found.append((run_step(learner, plan, four_groups()), {k: v.clone() for k, v in learner.masters.items()}))
        (ours, our_masters), (theirs, their_masters) = found
        assert ours == theirs
        assert all(torch.equal(our_masters[name], their_masters[name]) for name in our_masters)
