"""The learner: how terms become a gradient and an update, whatever the micro-batches."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import VOCAB_SIZE, ComputeDtype, tiny_model, tiny_model_dir

from trainer.algorithms import LossTerms
from trainer.config.recipe import LoraSettings, ModelSettings, OptimizerSettings
from trainer.data.tokens import TokenInputs, TokenSequence
from trainer.distributed.world import World
from trainer.errors import PreemptedError
from trainer.model import attention
from trainer.model.batch import Batch
from trainer.model.policy import Policy, load_policy, score
from trainer.planning.schedule import learning_rate
from trainer.training.learner import Learner, Update
from trainer.training.losses import sft_loss
from trainer.training.schedule import AdamParams

CPU = torch.device("cpu")
WORLD = World(rank=0, size=1, device=CPU)
LENGTHS = (12, 5, 9, 3, 17)
RATE = 1e-2


def make_rows(seed: int = 0) -> list[TokenSequence]:
    """Rows of unequal length, trained from their third token on, with unequal weights."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number, length in enumerate(LENGTHS):
        tokens = tuple(torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist())
        trained = (False, False) + (True,) * (length - 2)
        rows.append(TokenSequence(tokens, trained, TokenInputs(weights=(1.0 + 0.5 * number,) * (length - 2))))
    return rows


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tiny_model_dir(tmp_path_factory.mktemp("model"), "qwen2", scale=4.0)


def lora_policy(model_dir, compute_dtype: ComputeDtype = "float32") -> Policy:
    """A policy whose adapter is not zero, as after some training."""
    policy = load_policy(ModelSettings(path=str(model_dir), compute_dtype=compute_dtype), LoraSettings(rank=4), 0, CPU)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.trained_parameters().items():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return policy


def full_policy() -> Policy:
    attention.register()
    model = tiny_model("qwen2", scale=4.0)
    model.set_attn_implementation(attention.PACKED_ATTENTION)
    return Policy(model, None, "tiny")


def adam(rate: float = RATE, **settings) -> AdamParams:
    return AdamParams.of(OptimizerSettings(**settings), rate)


def step(learner: Learner, groups: list[list[TokenSequence]], rate: float = RATE, **settings) -> dict[str, float]:
    denominator = sum(sum(row.inputs.weights) for group in groups for row in group)
    batches = [Batch.pack(group, CPU) for group in groups]
    return learner.learn(batches, sft_loss, adam(rate, **settings), denominator=denominator).metrics


def summed_gradient(learner: Learner, groups: list[list[TokenSequence]]) -> dict[str, torch.Tensor]:
    for group in groups:
        learner.forward_backward(Batch.pack(group, CPU), sft_loss)
    return {name: master.grad.clone() for name, master in learner.masters.items()}


def assert_same_gradient(ours: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> None:
    assert ours.keys() == other.keys()
    for name, gradient in ours.items():
        assert gradient.abs().max() > 0, name
        assert (gradient - other[name]).abs().max() <= tolerance * gradient.abs().max(), name


@pytest.mark.parametrize("make", [lora_policy, lambda _: full_policy()], ids=["lora", "full"])
def test_one_micro_batch_and_five_agree(model_dir, make):
    rows = make_rows()
    one, five = (Learner(make(model_dir), WORLD) for _ in range(2))
    together = summed_gradient(one, [rows])
    apart = summed_gradient(five, [[row] for row in rows])
    assert_same_gradient(together, apart, 1e-5)


def test_an_update_from_one_micro_batch_and_from_five_agree(model_dir):
    rows = make_rows()
    one, five = (Learner(lora_policy(model_dir), WORLD) for _ in range(2))
    whole, parts = step(one, [rows]), step(five, [[row] for row in rows])
    assert whole == pytest.approx(parts, rel=1e-5)
    assert whole["tokens"] == sum(LENGTHS) - 2 * len(LENGTHS)
    for name, master in one.masters.items():
        torch.testing.assert_close(master, five.masters[name], rtol=0, atol=RATE * 1e-2)


def test_row_order_changes_nothing(model_dir):
    rows = make_rows()
    forward, backward = (Learner(lora_policy(model_dir), WORLD) for _ in range(2))
    assert_same_gradient(summed_gradient(forward, [rows]), summed_gradient(backward, [rows[::-1]]), 1e-5)


def test_loss_and_gradient_are_those_of_autograd_written_out(model_dir):
    policy, rows = lora_policy(model_dir), make_rows()
    plain = lora_policy(model_dir)
    plain.causal_lm.set_attn_implementation("eager")
    total, weight = torch.zeros(()), 0.0
    for row in rows:
        ids = torch.tensor(row.token_ids)
        logprobs = plain.causal_lm(input_ids=ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        picked = logprobs.gather(1, ids[1:, None]).squeeze(1)[1:]  # the first two tokens are not trained
        total = total - row.inputs.weights[0] * picked.sum()
        weight += sum(row.inputs.weights)
    loss = total / weight
    loss.backward()
    expected: dict[str, Any] = {name: parameter.grad for name, parameter in plain.trained_parameters().items()}

    learner = Learner(policy, WORLD)
    gradient = {name: value / weight for name, value in summed_gradient(learner, [rows]).items()}
    values = learner.optim_step(adam(max_grad_norm=None), weight).metrics
    assert values["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert values["grad_norm"] == pytest.approx(
        math.sqrt(sum(float(g.square().sum()) for g in expected.values())), rel=1e-5
    )
    assert_same_gradient(expected, gradient, 1e-4)


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_gradients_are_summed_in_float32_and_freed(model_dir, compute_dtype):
    learner = Learner(lora_policy(model_dir, compute_dtype), WORLD)
    first = summed_gradient(learner, [make_rows()])
    twice = summed_gradient(learner, [make_rows()])
    for name, master in learner.masters.items():
        assert master.dtype == master.grad.dtype == torch.float32
        assert torch.equal(twice[name], 2 * first[name])  # exact in float32, and nothing was lost between
    if compute_dtype == "bfloat16":
        assert all(parameter.dtype == torch.bfloat16 for parameter in learner.parameters.values())
        assert all(parameter.grad is None for parameter in learner.parameters.values())


def test_updates_too_small_for_bfloat16_accumulate_in_the_masters(model_dir):
    learner = Learner(lora_policy(model_dir, "bfloat16"), WORLD)
    name = next(name for name in learner.masters if "lora_A" in name)
    before = learner.masters[name].clone()
    assert torch.equal(before, learner.parameters[name].float())
    rate = 1e-6  # of weights around 0.1, whose step in bf16 is 5e-4
    for _ in range(3):
        step(learner, [make_rows()], rate)
    moved = (learner.masters[name] - before).abs()
    assert moved.mean() == pytest.approx(3 * rate, rel=0.1)  # Adam moves by the rate where the gradient is steady
    assert torch.equal(learner.parameters[name], learner.masters[name].bfloat16())


def test_float32_parameters_are_their_own_masters(model_dir):
    learner = Learner(lora_policy(model_dir), WORLD)
    assert all(learner.masters[name] is parameter for name, parameter in learner.parameters.items())


def test_the_gradient_is_clipped_to_the_norm_and_reported_before(model_dir):
    free, clipped = (Learner(lora_policy(model_dir), WORLD) for _ in range(2))
    norm = step(free, [make_rows()], max_grad_norm=None)["grad_norm"]
    assert norm > 1e-3
    assert step(clipped, [make_rows()], max_grad_norm=1e-3)["grad_norm"] == norm
    # After one step Adam's first moment is 0.1 times the gradient.
    for learner, wanted in ((free, norm), (clipped, 1e-3)):
        moments = [state["exp_avg"] for state in learner.optimizer.made.state.values()]
        assert 10 * math.sqrt(sum(float(moment.square().sum()) for moment in moments)) == pytest.approx(
            wanted, rel=1e-4
        )


def test_weight_decay_is_on_matrices_only():
    decayed, plain = (Learner(full_policy(), WORLD) for _ in range(2))
    before = {name: master.detach().clone() for name, master in decayed.masters.items()}
    for learner, weight_decay in ((decayed, 0.5), (plain, 0.0)):
        step(learner, [make_rows()], weight_decay=weight_decay)
    kinds = set()
    for name, master in decayed.masters.items():
        shrinkage = plain.masters[name] - master
        if master.ndim >= 2:
            torch.testing.assert_close(shrinkage, RATE * 0.5 * before[name], rtol=1e-3, atol=1e-6)
        else:
            assert torch.equal(shrinkage, torch.zeros_like(shrinkage)), name
        kinds.add((master.ndim, name.rsplit(".", 1)[-1]))
    assert kinds == {(2, "weight"), (1, "weight"), (1, "bias")}  # matrices, norms, biases


@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=str)
def test_a_loss_that_is_not_finite_updates_nothing(model_dir, poison):
    learner = Learner(lora_policy(model_dir), WORLD)
    step(learner, [make_rows()])
    before = {name: tensor.clone() for name, tensor in learner.state_tensors().items()}
    batch = Batch.pack(make_rows(), CPU)

    def poisoned(scores, batch):
        terms = sft_loss(scores, batch)
        return LossTerms(loss=terms.loss * poison, metrics={})

    learner.forward_backward(batch, poisoned)
    rows = tuple(sorted(set(batch.sources)))
    skipped = {"learning_rate": RATE, "tokens": batch.num_trained, "skipped": 1.0}
    assert learner.optim_step(adam(), 1.0) == Update(skipped, rows)
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.state_tensors().items())
    assert learner.updates == 1
    assert math.isfinite(step(learner, [make_rows()])["loss"])  # and no poison is left in the sums


@pytest.mark.parametrize(("bad", "named"), [(1, [2]), (None, [1, 2, 3])])
def test_a_skipped_update_names_its_rows(model_dir, bad, named):
    """The rows whose loss is not finite; where each loss is and the gradient is not, all rows of the update."""
    learner = Learner(lora_policy(model_dir), WORLD)
    rows = [replace(row, source=f"rows.jsonl:{number}") for number, row in enumerate(make_rows()[:3], start=1)]

    def poisoned(scores, batch):
        loss = sft_loss(scores, batch).loss
        if bad is None:
            return LossTerms(loss=loss + (scores.logprobs - scores.logprobs.detach()).abs().sqrt(), metrics={})
        return LossTerms(loss=loss.where(batch.sequence_ids != bad, float("inf")), metrics={})

    learner.forward_backward(Batch.pack(rows, CPU), poisoned)
    update = learner.optim_step(adam(), 1.0)
    assert update.metrics["skipped"] == 1.0
    assert update.skipped_rows == tuple(f"rows.jsonl:{number}" for number in named)


def test_an_abandoned_update_changes_nothing(model_dir):
    """Once the grace period is nearly over no micro-batch is begun, and the update is no update."""
    asked = iter([False, True])
    learner = Learner(lora_policy(model_dir), WORLD, lambda: next(asked))
    before = {name: tensor.clone() for name, tensor in learner.state_tensors().items()}
    for row in make_rows()[:3]:  # the third is not even asked about
        learner.forward_backward(Batch.pack([row], CPU), sft_loss)
    with pytest.raises(PreemptedError, match="the step begun is abandoned"):
        learner.optim_step(adam(), 1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.state_tensors().items())
    assert learner.updates == 0


def test_metrics_are_means_over_trained_tokens(model_dir):
    learner = Learner(lora_policy(model_dir), WORLD)

    def with_metric(scores, batch):
        return LossTerms(loss=sft_loss(scores, batch).loss, metrics={"owner": batch.sequence_ids.double() + 1})

    for row in make_rows():
        learner.forward_backward(Batch.pack([row, row], CPU), with_metric)
    # Each pack has its row twice, of owners 1 and 2.
    assert learner.optim_step(adam(), 1.0).metrics["owner"] == pytest.approx(1.5)


def test_a_pack_gives_its_own_logprobs_and_sums(model_dir):
    """And not those of the packs before it, which are in the update's sums."""
    learner, rows = Learner(lora_policy(model_dir), WORLD), make_rows()
    packs = [Batch.pack(part, CPU) for part in (rows[:2], rows[2:])]
    results = learner.accumulate(packs, sft_loss)
    for pack, result in zip(packs, results, strict=True):
        expected = score(learner.policy, pack, 1.0)
        torch.testing.assert_close(result.logprobs, expected, rtol=0, atol=1e-6)
        assert not result.logprobs.requires_grad
        assert result.sums["tokens"] == pack.num_trained
        assert result.sums["loss"] == pytest.approx(-float((expected * pack.inputs.weights).sum()), rel=1e-5)
    total = learner.optim_step(adam(), 1.0).metrics
    assert total["loss"] == pytest.approx(sum(result.sums["loss"] for result in results))
    assert total["tokens"] == sum(LENGTHS) - 2 * len(LENGTHS)


def test_a_dummy_pack_changes_nothing(model_dir):
    ours, theirs = (Learner(lora_policy(model_dir), WORLD) for _ in range(2))
    rows = make_rows()
    results = ours.accumulate([Batch.pack(rows, CPU), Batch.dummy(CPU)], sft_loss)
    theirs.accumulate([Batch.pack(rows, CPU)], sft_loss)
    assert results[1].sums == {}
    assert ours.optim_step(adam(), 1.0) == theirs.optim_step(adam(), 1.0)
    assert all(torch.equal(master, theirs.masters[name]) for name, master in ours.masters.items())


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_state_goes_round_and_learning_goes_on_bit_for_bit(model_dir, compute_dtype):
    first = Learner(lora_policy(model_dir, compute_dtype), WORLD)
    step(first, [make_rows(0)])
    saved = {name: tensor.clone() for name, tensor in first.state_tensors().items()}
    expected = step(first, [make_rows(1)])

    second = Learner(lora_policy(model_dir, compute_dtype), WORLD)
    target = second.state_tensors()  # before any update
    assert {name: tensor.shape for name, tensor in target.items()} == {
        name: tensor.shape for name, tensor in saved.items()
    }
    assert {tensor.dtype for tensor in target.values()} == {torch.float32}
    for name, tensor in target.items():
        tensor.copy_(saved[name])  # as a load does
    second.refresh()
    assert step(second, [make_rows(1)]) == expected
    after = second.state_tensors()
    assert all(torch.equal(tensor, after[name]) for name, tensor in first.state_tensors().items())


def test_state_names_masters_and_both_moments(model_dir):
    learner = Learner(lora_policy(model_dir), WORLD)
    kinds = {
        name.split("/")[0] + "/" + name.rsplit("/", 1)[1] for name in learner.state_tensors() if "optimizer" in name
    }
    assert kinds == {"optimizer/step", "optimizer/exp_avg", "optimizer/exp_avg_sq"}
    assert {name.removeprefix("masters/") for name in learner.state_tensors() if "masters" in name} == set(
        learner.masters
    )


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({"schedule": "constant"}, [1.0, 1.0, 1.0, 1.0]),
        ({"schedule": "linear"}, [1.0, 0.75, 0.5, 0.25]),
        ({"schedule": "cosine"}, [1.0, 0.8535534, 0.5, 0.1464466]),  # (1 + cos(pi k / 4)) / 2
        ({"schedule": "linear", "min_learning_rate_frac": 0.2}, [1.0, 0.8, 0.6, 0.4]),
        ({"schedule": "cosine", "warmup_steps": 2}, [0.5, 1.0, 1.0, 0.5]),
        ({"schedule": "constant", "warmup_steps": 8}, [0.125, 0.25, 0.375, 0.5]),  # longer than the run
    ],
)
def test_the_learning_rate_of_each_of_four_steps(settings, rates):
    optimizer = OptimizerSettings(learning_rate=1.0, **settings)
    assert [learning_rate(optimizer, number, 4) for number in range(4)] == pytest.approx(rates)


def test_beyond_the_end_the_learning_rate_stays_at_its_floor():
    # A resume with more steps than before never asks for this; a caller that does gets no negative rate.
    settings = OptimizerSettings(learning_rate=1.0, schedule="cosine", min_learning_rate_frac=0.1)
    assert learning_rate(settings, 9, 4) == pytest.approx(0.1)


def test_dropout_is_on_while_learning_and_off_after(model_dir):
    seen = []
    policy = load_policy(
        ModelSettings(path=str(model_dir), compute_dtype="float32"), LoraSettings(rank=2, dropout=0.5), 0, CPU
    )
    learner = Learner(policy, WORLD)

    def watching(scores, batch):
        seen.append(policy.training)
        return sft_loss(scores, batch)

    learner.learn([Batch.pack(make_rows(), CPU)], watching, adam(), denominator=1.0)
    assert seen == [True]
    assert not policy.training
