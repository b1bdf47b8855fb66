"""What makes the host wait for a GPU: counted on CPU tensors, by the operations whose result the host needs.

Also that the padding, which packs get on a GPU only, changes no value.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from groups import drawn, four_groups, make_learner, make_plan, minibatches
from tiny import VOCAB_SIZE, tiny_model_dir
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.algorithms.normalize import sequence_sizes
from trainer.data.tokens import TokenInputs, TokenSequence
from trainer.model.batch import Batch, padding_of
from trainer.model.policy import Policy
from trainer.model.trees import Tree, grow_trees
from trainer.training.learner import Learner
from trainer.training.losses import PolicyLoss, sft_loss
from trainer.training.schedule import AdamParams

CPU = torch.device("cpu")
ADAM = AdamParams(1e-3, 0.9, 0.999, 1e-8, 0.0, 1.0)
WAITING = ("_local_scalar_dense", "nonzero", "_unique", "unique_", "bincount", "masked_select", "is_nonzero", "equal.")


class _Waits(TorchDispatchMode):
    """Records operations whose result, or whose shape of the result, must be known on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function).removeprefix("aten.")
        is_bool_index = name.startswith("index.") and any(
            each is not None and each.dtype == torch.bool for each in args[1]
        )
        if name.startswith(WAITING) or is_bool_index:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@contextmanager
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    mode, read = _Waits(), torch.Tensor.tolist
    with monkeypatch.context() as patch, mode:

        def counted(tensor: torch.Tensor) -> Any:
            mode.found.append("tolist")
            return read(tensor)

        patch.setattr(torch.Tensor, "tolist", counted)
        yield mode.found


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("model"), "qwen2")


def rows_of(lengths: tuple[int, ...]) -> list[TokenSequence]:
    generator = torch.Generator().manual_seed(sum(lengths))
    rows = []
    for number, length in enumerate(lengths):
        tokens = tuple(torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist())
        inputs = TokenInputs(weights=(1.0,) * (length - 1))
        rows.append(TokenSequence(tokens, (False,) + (True,) * (length - 1), inputs, f"rows.jsonl:{number + 1}"))
    return rows


def test_an_sft_update_waits_once_however_many_packs_it_has(model_dir, monkeypatch):
    learner = make_learner(model_dir, make_plan())
    packs = [Batch.pack(rows_of(lengths), CPU) for lengths in ((5, 9), (20,), (3, 4, 6))]
    learner.learn(packs, sft_loss, ADAM, denominator=10.0)  # the first one makes what is made once
    with waits(monkeypatch) as found:
        learner.learn(packs, sft_loss, ADAM, denominator=10.0)
    assert found == ["tolist"]


@pytest.mark.parametrize("algorithm", [{"name": "grpo"}, {"name": "gspo"}, {"name": "cispo"}], ids=str)
def test_the_packs_of_a_policy_update_wait_for_nothing(model_dir, monkeypatch, algorithm):
    plan = make_plan(micro_batch_tokens=40, **algorithm)
    learner = make_learner(model_dir, plan)
    parts = minibatches(drawn(four_groups()), plan, CPU)
    packs = [pack.with_logprobs(ref=torch.zeros(pack.num_trained)) for part in parts for pack in part.packs]
    assert len(packs) > 2
    with waits(monkeypatch) as found:
        results = learner.accumulate(packs, PolicyLoss(plan.algorithm), with_entropy=True)
    assert found == []
    with waits(monkeypatch) as found:
        assert sum(result.sums["tokens"] for result in results) == sum(pack.num_trained for pack in packs)
    assert found == ["tolist"], "the sums of all packs are read together"


def test_packs_are_counted_where_the_host_does_read(monkeypatch):
    """The count above is not zero because nothing is seen."""
    values = torch.tensor([1.0, 0.0, 2.0])
    with waits(monkeypatch) as found:
        float(values[0])
        values[values > 0].tolist()
        torch.bincount(values.long())
    assert found == ["_local_scalar_dense.default", "index.Tensor", "tolist", "bincount.default"]


def test_rows_with_a_loss_that_is_not_finite_are_named_from_later_packs_too(model_dir):
    learner = make_learner(model_dir, make_plan())
    packs = [Batch.pack(rows_of((5, 9)), CPU), Batch.pack(rows_of((7, 6, 8)), CPU)]
    weights = packs[1].inputs.weights.clone()
    weights[packs[1].sequence_ids == 1] = float("nan")
    packs[1] = replace(packs[1], inputs=replace(packs[1].inputs, weights=weights))
    update = learner.learn(packs, sft_loss, ADAM, denominator=10.0)
    assert update.skipped_rows == ("rows.jsonl:2",)
    assert learner.learn(packs[:1], sft_loss, ADAM, denominator=10.0).skipped_rows == (), "nothing is left over"


def test_sizes_of_sequences_are_the_same_with_and_without_reading_the_ids():
    ids = torch.tensor([0, 0, 2, 2, 2, 4])
    assert sequence_sizes(ids, 6).tolist() == [2, 0, 3, 0, 1, 0]
    assert sequence_sizes(ids).tolist() == [2, 0, 3, 0, 1]


@pytest.mark.parametrize(("num_tokens", "padding"), [(1, 255), (128, 128), (200, 56), (256, 0), (257, 127), (384, 0)])
def test_padded_packs_have_whole_mask_blocks(num_tokens, padding):
    assert padding_of(num_tokens) == padding


def _values(policy: Policy, pack: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    policy.train()
    logprobs = policy(pack).logprobs
    parameters = policy.trained_parameters()
    found = torch.autograd.grad((logprobs * torch.linspace(0.5, 1.5, len(logprobs))).sum(), list(parameters.values()))
    policy.eval()
    return logprobs.detach(), dict(zip(parameters, found, strict=True))


def trees_of(kind: str) -> list[Tree]:
    rows = rows_of((30, 7, 12))
    if kind == "rows":
        return [Tree.of_one(row) for row in rows]
    prompt = tuple(range(20))
    branches = [
        TokenSequence(prompt + row.token_ids, (False,) * 20 + (True,) * len(row.token_ids), row.inputs) for row in rows
    ]
    return grow_trees(branches, 1000)


@pytest.mark.parametrize("kind", ["rows", "tree"])
def test_padding_changes_neither_values_nor_gradients(model_dir, kind):
    policy = make_learner(model_dir, make_plan()).policy
    plain, padded = (Batch.pack_trees(trees_of(kind), CPU, is_padded=each) for each in (False, True))
    assert padded.num_tokens == padded.layout.num_tokens == 256
    assert (padded.layout.trees, padded.layout.max_len) == (plain.layout.trees, plain.layout.max_len)
    assert plain.layout.padding == 0
    assert torch.equal(padded.scored, plain.scored)
    (logprobs, found), (expected, wanted) = _values(policy, padded), _values(policy, plain)
    torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-6)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_padding_belongs_to_no_sequence_in_the_mask_of_a_gpu(monkeypatch):
    """The layout that a GPU gets has the coordinates of every token, made on the host with the pack."""
    monkeypatch.setattr("trainer.model.layout.to_device", lambda tensor, _device: tensor)
    rows = rows_of((30, 7, 12))
    on_gpu = Batch.pack(rows, torch.device("meta"))
    on_cpu = Batch.pack(rows, CPU, is_padded=True)
    assert on_gpu.layout.buckets == ()
    assert on_gpu.layout.made_coordinates is not None
    assert torch.equal(on_gpu.layout.coordinates(), on_cpu.layout.coordinates())
    tree, _, _, position = on_cpu.layout.coordinates()
    assert tree.bincount().tolist() == [30, 7, 12, 256 - 49]
    assert position[49:].tolist() == list(range(207))


def test_a_model_that_computes_sequences_alone_gets_no_padding(model_dir):
    policy = make_learner(model_dir, make_plan()).policy
    policy.run_separately("for the test")
    row = rows_of((30,))
    seen: list[int] = []
    policy.causal_lm.get_input_embeddings().register_forward_hook(lambda _m, ids, _o: seen.append(ids[0].numel()))
    padded, plain = (policy(Batch.pack(row, CPU, is_padded=each)).logprobs for each in (True, False))
    assert seen == [30, 30]
    assert torch.equal(padded, plain)


def test_only_packs_for_a_gpu_and_one_adapter_are_padded():
    row = rows_of((30,))
    assert Batch.pack(row, CPU).num_tokens == 30
    assert Batch.pack(row, torch.device("meta")).num_tokens == 256
    assert Batch.pack(row, torch.device("meta"), adapters=["slot1"]).num_tokens == 30


def test_learner_and_packs_use_no_other_copy_to_a_device(monkeypatch):
    """Each tensor of a pack goes through `to_device`, which copies from pinned memory."""
    moved: list[torch.Size] = []

    def count(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        moved.append(tensor.shape)
        return tensor.to(device)

    monkeypatch.setattr("trainer.model.layout.to_device", count)
    monkeypatch.setattr("trainer.model.batch.to_device", count)
    pack = Batch.pack(rows_of((30, 7)), torch.device("meta"))
    assert moved == [(2, 256), (3, 35), (4, 256), (4,), (35,), (0,), (0,)]
    held = [pack.token_ids, pack.positions, pack.scored, pack.targets, pack.sequence_ids, pack.inputs.weights]
    assert all(tensor.device.type == "meta" for tensor in held)


def test_state_of_the_learner_is_independent_of_how_often_sums_are_read(model_dir):
    packs = [Batch.pack(rows_of(lengths), CPU) for lengths in ((5, 9), (20,), (3, 4, 6))]
    updates = []
    for is_read in (False, True):
        learner: Learner = make_learner(model_dir, make_plan())
        for pack in packs:
            result = learner.forward_backward(pack, sft_loss)
            assert result is not None
            assert not is_read or result.sums["tokens"] == pack.num_trained
        updates.append(learner.optim_step(ADAM, 10.0))
    assert updates[0] == updates[1]
