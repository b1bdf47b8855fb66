"""The training API in process: slots, losses, fused passes, states."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import VOCAB_SIZE, tiny_model_dir

from trainer.api.datum import Datum
from trainer.api.service import Service, TrainingModel, open_service
from trainer.api.slots import Base, Slot, joined
from trainer.api.states import newest_state
from trainer.checkpoints.saved_state import state_problem
from trainer.config.recipe import LoraSettings, ModelSettings
from trainer.errors import CheckpointError, DataError, ModelError, NumericalError, UserError
from trainer.training.schedule import AdamParams

CPU = torch.device("cpu")
ADAM = AdamParams(1e-2, 0.9, 0.95, 1e-12, 0.0, None)
TENANTS = {
    "cross_entropy": LoraSettings(rank=4, target_modules=["q_proj", "v_proj", "down_proj"]),
    "ppo": LoraSettings(rank=8, alpha=8.0),
    "cispo": LoraSettings(rank=2, target_modules=["gate_proj", "o_proj"]),
    "importance_sampling": LoraSettings(rank=16, target_modules=["k_proj"]),
    "gspo": LoraSettings(rank=3),
}
"""Of each loss one tenant, with another rank and other layers."""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tiny_model_dir(tmp_path_factory.mktemp("model"), "llama", scale=5.0)


@pytest.fixture(scope="module")
def service(model_dir) -> Service:
    return open_service(model_dir, compute_dtype="float32")


def data_of(loss: str, seed: int = 0, lengths: tuple[int, ...] = (17, 40, 9)) -> list[Datum]:
    random = np.random.default_rng(seed)
    data = []
    for length in lengths:
        tokens, targets = random.integers(VOCAB_SIZE, size=(2, length)).tolist()
        inputs = {"logprobs": -5 - random.random(length), "advantages": random.normal(size=length)}
        if loss == "cross_entropy":
            inputs = {"weights": random.random(length)}
        if loss == "gspo":
            inputs["sequence_ratio_mask"] = [0.0] * 3 + [1.0] * (length - 3)
        data.append(Datum.of(tokens, target_tokens=targets, **inputs))
    return data


def base_of(model_dir, *, is_checkpointed: bool = False) -> Base:
    settings = ModelSettings(path=str(model_dir), compute_dtype="float32", gradient_checkpointing=is_checkpointed)
    return Base(settings, CPU, micro_batch_tokens=60)


def masters(slot: Slot) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in slot.learner.masters.values()]


@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_tenants_in_one_pack_train_as_each_alone_to_the_bit(model_dir, is_checkpointed) -> None:
    base = base_of(model_dir, is_checkpointed=is_checkpointed)
    slots = {loss: base.open(lora, seed) for seed, (loss, lora) in enumerate(TENANTS.items())}
    together: dict[str, list[np.ndarray]] = {loss: [] for loss in TENANTS}
    for step in range(3):
        batches = {loss: slot.micro_batches(data_of(loss, step), loss) for loss, slot in slots.items()}
        assert all(len(each) == 2 for each in batches.values())
        found: dict[str, list[Any]] = {loss: [] for loss in TENANTS}
        for part in range(2):  # one micro-batch of each in every pack
            results = base.run([each[part][1] for each in batches.values()], backward=True)
            for (loss, each), result in zip(batches.items(), results, strict=True):
                found[loss].append((each[part][0], result))
        for loss, slot in slots.items():
            together[loss] += joined(found[loss]).logprobs
            slot.optim_step(ADAM)
    for seed, (loss, lora) in enumerate(TENANTS.items()):
        alone = base_of(model_dir, is_checkpointed=is_checkpointed).open(lora, seed)
        begin = masters(alone)
        expected = []
        for step in range(3):
            expected += alone.forward(data_of(loss, step), loss, backward=True).logprobs
            alone.optim_step(ADAM)
        assert all(np.array_equal(*pair) for pair in zip(together[loss], expected, strict=True)), loss
        assert all(torch.equal(*pair) for pair in zip(masters(slots[loss]), masters(alone), strict=True)), loss
        assert not any(torch.equal(*pair) for pair in zip(masters(alone), begin, strict=True)), loss


def test_a_slot_that_is_freed_leaves_the_others_as_they_were(model_dir) -> None:
    base = base_of(model_dir)
    first, second = base.open(TENANTS["ppo"], 0), base.open(TENANTS["cispo"], 1)
    first.forward(data_of("ppo"), "ppo", backward=True)
    first.optim_step(ADAM)
    before = first.forward(data_of("ppo"), "ppo").logprobs
    base.close(second)
    third = base.open(TENANTS["importance_sampling"], 2)
    third.forward(data_of("importance_sampling"), "importance_sampling", backward=True)
    third.optim_step(ADAM)
    after = first.forward(data_of("ppo"), "ppo").logprobs
    assert all(np.array_equal(*pair) for pair in zip(before, after, strict=True))


def slope(service: Service, loss: str, config: dict[str, float] | None = None) -> tuple[np.ndarray, list[torch.Tensor]]:
    """Terms of a loss, and the gradient of their sum."""
    model = service.create(rank=4, seed=3)
    result = model.forward_backward(data_of(loss), loss, config)
    gradients = [master.grad.clone() for master in model._slot.learner.masters.values()]
    model.close()
    return np.concatenate(result.losses), gradients


@pytest.mark.parametrize("loss", sorted(TENANTS))
def test_losses_are_the_protocol_s_formulas(service, loss) -> None:
    def formula(data, logprobs):
        terms = []
        for datum, own in zip(data, logprobs, strict=True):
            inputs = {name: torch.from_numpy(values) for name, values in datum.inputs.items()}
            if loss == "cross_entropy":
                terms.append(-own * inputs["weights"])
                continue
            ratio, advantages = (own - inputs["logprobs"]).exp(), inputs["advantages"]
            if loss == "gspo":  # the mean is over marked tokens, and all tokens carry it
                mean = (own.detach() - inputs["logprobs"])[3:].mean()
                ratio = (mean + own - own.detach()).exp()
            clipped = ratio.clamp(0.9, 1.1)
            terms.append(
                {
                    "importance_sampling": -ratio * advantages,
                    "ppo": -torch.minimum(ratio * advantages, clipped * advantages),
                    "cispo": -clipped.detach() * advantages * own,
                    "gspo": -torch.minimum(ratio * advantages, clipped * advantages),
                }[loss]
            )
        return torch.cat(terms).sum(), {}

    bounds = {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1} if loss in {"ppo", "cispo", "gspo"} else None
    terms, gradients = slope(service, loss, bounds)
    model = service.create(rank=4, seed=3)
    result = model.forward_backward(data_of(loss), formula)
    assert result.metrics["loss:sum"] == pytest.approx(terms.sum(), rel=1e-4)
    for ours, theirs in zip(gradients, model._slot.learner.masters.values(), strict=True):
        assert theirs.grad is not None
        torch.testing.assert_close(ours, theirs.grad, rtol=1e-4, atol=1e-5)
    assert max(float(gradient.abs().max()) for gradient in gradients) > 0
    model.close()


def test_sampled_logprobs_are_those_of_forward(service) -> None:
    model = service.create(rank=4, seed=5)
    for _ in range(3):
        model.forward_backward(data_of("cross_entropy"), "cross_entropy")
        model.optim_step(1e-2)
    other = service.create(rank=2, seed=6)  # the sampler follows the model that samples
    other.sample([1, 2, 3], max_tokens=2)
    drawn = model.sample([5, 6, 7], 3, max_tokens=6, stop=[])
    data = [Datum.shifted([5, 6, 7, *completion.token_ids]) for completion in drawn]
    for completion, logprobs in zip(drawn, model.forward(data).logprobs, strict=True):
        assert completion.logprobs == pytest.approx(logprobs[2:].tolist(), abs=1e-4)
    model.close()
    other.close()


def train(model: TrainingModel, steps: range) -> list[float]:
    losses = []
    for step in steps:
        losses.append(model.forward_backward(data_of("ppo", step), "ppo").metrics["loss:sum"])
        model.optim_step(1e-2, weight_decay=0.1, max_grad_norm=1.0)
    return losses


def test_a_state_continues_elsewhere_to_the_bit(service, model_dir, tmp_path) -> None:
    model = service.create(rank=4, seed=1)
    train(model, range(3))
    model.save_state(tmp_path / "state")
    assert state_problem(tmp_path / "state") is None
    expected = train(model, range(3, 6))
    elsewhere = open_service(model_dir, compute_dtype="float32").create_from(tmp_path / "state")
    assert elsewhere.updates == 3
    assert train(elsewhere, range(3, 6)) == expected
    model.load_state(tmp_path / "state")
    assert train(model, range(3, 6)) == expected
    model.load_state(tmp_path / "state", optimizer=False)
    assert model.updates == 0
    assert train(model, range(3, 6)) != expected
    model.close()


def test_states_that_do_not_fit_are_refused_and_change_nothing(service, tmp_path_factory, tmp_path) -> None:
    model, small = service.create(rank=4, seed=1), service.create(rank=2, seed=1)
    train(model, range(2))
    model.save_state(tmp_path / "state")
    small.save_state(tmp_path / "small")
    other_dir = tiny_model_dir(tmp_path_factory.mktemp("other"), "llama", seed=1)
    other = open_service(other_dir, compute_dtype="float32").create(rank=4)
    other.save_state(tmp_path / "foreign")
    expected = train(model, range(2, 4))
    model.load_state(tmp_path / "state")
    with pytest.raises(CheckpointError, match="rank 2 and not 4"):
        model.load_state(tmp_path / "small")
    with pytest.raises(CheckpointError, match="another base model"):
        model.load_state(tmp_path / "foreign")
    with pytest.raises(CheckpointError, match="no state of the training API"):
        model.load_state(tmp_path / "nothing")
    damaged = tmp_path / "small" / "__0_0.distcp"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match="damaged"):
        small.load_state(tmp_path / "small")
    settings = json.loads((tmp_path / "foreign" / "state.json").read_text())
    settings["base"] = service.base.digest  # a state.json that lies
    (tmp_path / "foreign" / "state.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="belongs to another run"):
        model.load_state(tmp_path / "foreign")
    assert train(model, range(2, 4)) == expected
    for each in (model, small):
        each.close()


def test_the_newest_valid_state_wins(service, tmp_path) -> None:
    model = service.create(rank=2)
    for name in ("step-000001", "step-000002", "step-000003"):
        model.save_state(tmp_path / name)
    (tmp_path / "step-000003" / "manifest.json").unlink()
    (tmp_path / "step-000002" / "adapter_config.json").write_text("{}")
    assert newest_state(tmp_path) == tmp_path / "step-000001"
    assert sorted(each.name for each in tmp_path.iterdir()) == [
        "step-000001", "step-000002.broken", "step-000003.broken",
    ]  # fmt: skip
    assert newest_state(Path("nowhere")) is None
    model.close()


GOOD = data_of("ppo")[0]
INPUTS: dict[str, Any] = dict(GOOD.inputs)


@pytest.mark.parametrize(
    ("datum", "says"),
    [
        (Datum((), {}), "no tokens"),
        (Datum.of([1] * 600, target_tokens=[1] * 600), "600 tokens, the model reads at most 512"),
        (Datum.of([1, VOCAB_SIZE], **INPUTS), r"model_input\[1\] is 320; the model has the tokens 0 to 319"),
        (Datum.of(GOOD.tokens, **{**INPUTS, "target_tokens": [-1] * 17}), r"target_tokens\[0\] is -1"),
        (Datum.of(GOOD.tokens, target_tokens=GOOD.inputs["target_tokens"]), "ppo needs loss_fn_inputs advantages, log"),
        (Datum.of(GOOD.tokens, **INPUTS, mask=[1.0] * 17), "ppo does not take mask; it takes advantages, log"),
        (Datum.of(GOOD.tokens, **{**INPUTS, "advantages": [1.0]}), r"advantages has shape \[1\], and .* 17 tok"),
        (Datum.of(GOOD.tokens, **{**INPUTS, "advantages": [float("nan")] * 17}), r"advantages\[0\] is not finite"),
        (Datum.of(GOOD.tokens, **{**INPUTS, "logprobs": [[0.0]] * 17}), r"logprobs has shape \[17, 1\]"),
    ],
)  # fmt: skip
def test_data_that_cannot_be_trained_on_are_refused_by_index(service, datum, says) -> None:
    model = service.create(rank=2)
    with pytest.raises(DataError, match=f"datum 1: .*{says}"):
        model.forward_backward([data_of("ppo")[0], Datum.of(datum.tokens, **datum.inputs)], "ppo")
    model.close()


def test_other_mistakes_are_refused(service) -> None:
    model = service.create(rank=2)
    with pytest.raises(UserError, match="'dro' is not one of cross_entropy, importance_sampling, ppo, cispo, gspo;"):
        model.forward_backward(data_of("ppo"), "dro")
    with pytest.raises(UserError, match="cross_entropy does not take beta; it takes none"):
        model.forward(data_of("cross_entropy"), "cross_entropy", {"beta": 1.0})
    with pytest.raises(UserError, match="clip_low_threshold = 'x' is not a finite number"):
        model.forward(data_of("ppo"), "ppo", {"clip_low_threshold": "x"})
    unmarked = Datum.of(GOOD.tokens, **INPUTS, sequence_ratio_mask=[0.0] * 17)
    with pytest.raises(DataError, match="datum 0: sequence_ratio_mask marks no token"):
        model.forward([unmarked], "gspo")
    with pytest.raises(DataError, match="no data"):
        model.forward([])
    with pytest.raises(ModelError, match="target_modules"):
        service.create(target_modules=["nothing"])
    before = masters(model._slot)
    with pytest.raises(NumericalError, match="custom loss is not finite"):
        model.forward_backward(
            data_of("cross_entropy"), lambda _, own: (sum(each.sum() for each in own) * float("nan"), {})
        )
    model._slot.learner._gradient.fill_(float("nan"))
    with pytest.raises(NumericalError, match="nothing was updated"):
        model.optim_step(1e-2)
    assert all(torch.equal(*pair) for pair in zip(masters(model._slot), before, strict=True))
    assert model.updates == 0
    model.close()


def test_a_refused_adapter_leaves_no_slot_behind(service) -> None:
    before = sorted(service.base.slots)
    with pytest.raises(ModelError):
        service.create(target_modules=["nothing"])
    assert sorted(service.base.slots) == before
    assert service.base.policy.adapters is not None
    assert len(service.base.policy.adapters.names) == len(before) + 1
