"""Sequences of one conversation that share beginnings of different lengths, trained tokens included."""

from __future__ import annotations

import pytest
import torch
from block_masks import assert_blocks_leave_no_cell_out
from groups import CPU, perturb
from rewritten import conversation
from tiny import VOCAB_SIZE, tiny_model_dir

from trainer.config.recipe import LoraSettings, ModelSettings
from trainer.data.tokens import TokenSequence
from trainer.model import attention, flex
from trainer.model.batch import Batch
from trainer.model.eager_attention import AttentionOptions
from trainer.model.layout import PackedLayout
from trainer.model.policy import load_policy
from trainer.model.trees import MIN_SAVED_FRAC, grow_forks, grow_trees

pytestmark = pytest.mark.filterwarnings(
    "ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"  # PEFT's own patterns
)
TREES = ((40, (5, 9, 3)), (9, ()), (20, (3, 1)))
FORKS = ((12, 30, 12), (), (20, 20))


def test_the_last_turn_is_the_prefix_and_earlier_ones_are_its_branches():
    (tree,) = grow_forks(conversation(3), 1000)
    # the last sequence has 3 questions of 11, 2 answers of 4, and a turn of 10
    assert tree.prefix == 3 * 11 + 2 * 4 + 10
    assert [len(each.token_ids) for each in tree.sequences] == [51, 36, 21]
    assert tree.forks == (51, 2 * 11 + 4, 11)
    assert tree.lengths == (51, (10, 10))
    assert tree.num_tokens == 71
    assert sum(tree.num_tokens for tree in grow_trees(conversation(3), 1000)) == 51 + 36 + 21 - 2 * 11


def test_trained_tokens_of_an_earlier_turn_lie_in_the_prefix_once():
    first, second = conversation(2, keeps=1)
    assert second.token_ids[: len(first.token_ids)] == first.token_ids
    (tree,) = grow_forks([first, second], 1000)
    assert tree.sequences == (first, second), "the second one continues all of the first"
    assert (tree.lengths, tree.forks) == ((15, (21,)), (15, 15))
    batch = Batch.pack_trees([tree], CPU)
    assert (batch.num_tokens, batch.num_trained) == (36, 4 + 10)
    in_prefix = batch.scored[batch.scored < 15]
    assert in_prefix.tolist() == [10, 11, 12, 13], (
        "the trained tokens of the first turn are predicted within the prefix"
    )


def test_trees_keep_the_budget_and_lose_nothing():
    sequences = conversation(6)
    trees = grow_forks(sequences, 120)
    assert sorted(len(each.token_ids) for tree in trees for each in tree.sequences) == sorted(
        len(each.token_ids) for each in sequences
    )
    assert all(tree.num_tokens <= 120 for tree in trees)
    assert len(trees) > 1


def test_sequences_that_share_one_prefix_keep_the_trees_that_they_had():
    """So that runs without rewritten turns keep their bits."""
    generator = torch.Generator().manual_seed(1)
    prompt = tuple(torch.randint(3, VOCAB_SIZE, (40,), generator=generator).tolist())
    sequences = [TokenSequence((*prompt, 3 + number, *range(5, 9)), (False,) * 40 + (True,) * 5) for number in range(3)]
    assert grow_forks(sequences, 1000) == grow_trees(sequences, 1000)
    assert MIN_SAVED_FRAC > 0


FAMILIES = ["llama", "qwen3", "mistral", "mixtral", "gemma2", "gpt_oss"]


@pytest.mark.parametrize(
    ("arch", "is_double"), [*((arch, False) for arch in FAMILIES), ("llama", True), ("mistral", True)]
)
@pytest.mark.parametrize("keeps", [0, 2])
def test_a_forked_tree_gives_the_loss_and_gradients_of_its_sequences(tmp_path, arch, is_double, keeps):
    """In float32 sums of other lengths round otherwise; with float64 weights what remains is float32 statistics."""
    model = ModelSettings(path=str(tiny_model_dir(tmp_path, arch)), compute_dtype="float32")
    policy = load_policy(model, LoraSettings(rank=4), 0, CPU)
    perturb(policy)
    if is_double:
        policy.double()
    tolerance = 1e-6 if is_double else 5e-6
    sequences = conversation(4, keeps=keeps)
    trees = grow_forks(sequences, 1000)
    packed = Batch.pack_trees(trees, CPU)
    assert packed.num_tokens < sum(len(each.token_ids) for each in sequences) / 1.5
    found = []
    for batches in ([packed], [Batch.pack([each], CPU) for tree in trees for each in tree.sequences]):
        policy.zero_grad()
        terms, logprobs = [], []
        for batch in batches:
            scores = policy(batch, temperature=0.7)
            term = (scores.logprobs * batch.inputs.weights).sum() / 50
            term.backward()
            terms.append(term.item())
            logprobs.append(scores.logprobs.detach())
        gradients = {name: value.grad.clone() for name, value in policy.trained_parameters().items()}
        found.append((sum(terms), torch.cat(logprobs), gradients))
    (loss, ours, our_gradients), (expected, theirs, their_gradients) = found
    assert loss == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    for name, gradient in our_gradients.items():
        largest = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(gradient, their_gradients[name], rtol=0, atol=tolerance * largest)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("window", [None, 8])
def test_the_gpu_path_sees_the_same_forks(window):
    layout = PackedLayout.of_trees(TREES, CPU, forks=FORKS)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 4, layout.num_tokens, 16, generator=generator) for _ in range(3))
    form = AttentionOptions(0.25, window, None, None)
    try:
        found = flex.attend_flex(query, key, value, layout, form)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"this torch has no FlexAttention on CPU: {error}")
    torch.testing.assert_close(found, attention._bucketed(query, key, value, layout, form), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 128, 200])
@pytest.mark.parametrize(
    ("trees", "forks"),
    [
        (((400, (150, 90, 60)), (300, ()), (130, (128, 128))), ((3, 256, 399), (), (130, 130))),
        (((512, (128,) * 3),), ((128, 256, 384),)),
    ],
)
def test_blocks_of_the_gpu_mask_leave_no_cell_out(trees, forks, window):
    assert_blocks_leave_no_cell_out(PackedLayout.of_trees(trees, CPU, forks=forks), window)
