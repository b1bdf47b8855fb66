"""Learning, resuming and sampling on a GPU: the numbers of the CPU, and of a run that nobody interrupts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from project import LONG, Done, Project, Run, Running, is_at_step, wait_for
from tiny import VOCAB_SIZE, ComputeDtype, tiny_tokenizer

from trainer.config.recipe import LoraSettings, ModelSettings, OptimizerSettings
from trainer.data.tokens import TokenInputs, TokenSequence
from trainer.distributed.world import World
from trainer.model.batch import Batch
from trainer.model.packing_check import verify_packing
from trainer.model.policy import Policy, Reference, load_policy, score
from trainer.sampling.local import LocalSampler
from trainer.sampling.sampler import SampleRequest, SamplingParams
from trainer.training.learner import Learner
from trainer.training.losses import sft_loss
from trainer.training.schedule import AdamParams

CPU = torch.device("cpu")
LENGTHS: Final = ((40, 7, 90, 3), (200, 31), (12,))
ADAM: Final = AdamParams.of(OptimizerSettings(epsilon=1e-2), 1e-2)
"""With the usual epsilon AdamW's first update is the gradient's sign, which rounding may turn where it is near zero."""
WORKER: Final = [sys.executable, "-m", "trainer.worker"]
RECIPE: Final[dict[str, Any]] = LONG | {"deterministic": True, "model__compute_dtype": "bfloat16", "shape": "gpu.yaml"}


def make_policy_on(device: torch.device, model_dir: Path, *, is_lora: bool, dtype: ComputeDtype = "float32") -> Policy:
    """The same numbers on every device, with an adapter that is not zero."""
    settings = ModelSettings(path=str(model_dir), compute_dtype=dtype)
    policy = load_policy(settings, LoraSettings(rank=4) if is_lora else None, 0, device)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.trained_parameters().items():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return policy


def make_rows(lengths: tuple[int, ...], seed: int) -> list[TokenSequence]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number, length in enumerate(lengths):
        tokens = tuple(torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist())
        trained = (False, False) + (True,) * (length - 2)
        rows.append(TokenSequence(tokens, trained, TokenInputs(weights=(1.0 + number,) * (length - 2))))
    return rows


def learned(learner: Learner, device: torch.device, steps: int) -> list[dict[str, float]]:
    """Metrics of some steps of three micro-batches each."""
    found = []
    for step in range(steps):
        groups = [make_rows(lengths, 10 * step + number) for number, lengths in enumerate(LENGTHS)]
        denominator = sum(sum(row.inputs.weights) for group in groups for row in group)
        packs = [Batch.pack(group, device) for group in groups]
        found.append(learner.learn(packs, sft_loss, ADAM, denominator=denominator).metrics)
    return found


@pytest.mark.parametrize("is_lora", [True, False], ids=["lora", "full"])
def test_steps_equal_those_of_the_cpu(cuda, model_dir, is_lora):
    ours, theirs = (
        Learner(make_policy_on(device, model_dir, is_lora=is_lora), World(0, 1, device)) for device in (cuda, CPU)
    )
    for learner in (ours, theirs):
        for number, lengths in enumerate(LENGTHS):
            learner.forward_backward(Batch.pack(make_rows(lengths, number), learner.world.device), sft_loss)
    for name, master in theirs.masters.items():
        assert master.grad is not None
        mine = ours.masters[name].grad
        assert mine is not None
        distance = (mine.cpu() - master.grad).abs().max() / master.grad.abs().max()
        assert distance < 1e-4, f"gradient of {name}: {distance:.2e}"
    for learner in (ours, theirs):
        learner.optim_step(ADAM, 100.0)
    for record, other in zip(learned(ours, cuda, 4), learned(theirs, CPU, 4), strict=True):
        assert record == pytest.approx(other, rel=1e-4)
    for name, master in theirs.masters.items():
        distance = (ours.masters[name].cpu() - master).abs().max() / master.abs().max()
        assert distance < 1e-4, f"{name} after five updates: {distance:.2e}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_neighbours_do_not_leak(cuda, model_dir, dtype):
    policy = make_policy_on(cuda, model_dir, is_lora=True, dtype=dtype)
    verify_packing(policy, cuda)
    assert policy.separate_reason is None


def test_the_reference_of_a_fresh_adapter_is_the_policy(cuda, model_dir):
    policy = load_policy(ModelSettings(path=str(model_dir)), LoraSettings(rank=4), 0, cuda)
    pack = Batch.pack(make_rows((60, 9), 0), cuda)
    reference = Reference(policy, "initial", is_fresh=True).logprobs(pack, 0.7)
    distance = (reference - score(policy, pack, 0.7)).abs().max()
    assert distance == 0.0, "ref_kld is exactly 0 at step 0"


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.05)])
def test_the_sampler_reports_the_trainers_logprobs(cuda, model_dir, dtype, tolerance):
    """Of every token, at a temperature, with rows that end at many lengths; in bf16 the mean is compared."""
    policy = make_policy_on(cuda, model_dir, is_lora=True, dtype=dtype)
    policy.eval()
    sampler = LocalSampler(policy, tiny_tokenizer())
    sampler.publish(policy, 0)
    asked = [SampleRequest(tuple(range(3, 3 + length)), row, 6) for row, length in enumerate((5, 130, 17, 40))]
    params = SamplingParams(48, frozenset(range(50, 60)), seed=1, step=2, temperature=0.8)
    groups = sampler.sample(asked, params)
    drawn = [completion for group in groups for completion in group]
    assert len({len(completion.token_ids) for completion in drawn}) > 4
    sequences = [
        TokenSequence(
            request.prompt_ids + completion.token_ids,
            (False,) * len(request.prompt_ids) + (True,) * len(completion.token_ids),
        )
        for request, group in zip(asked, groups, strict=True)
        for completion in group
    ]
    trainers = score(policy, Batch.pack(sequences, cuda), 0.8).cpu()
    samplers = torch.tensor([value for completion in drawn for value in completion.logprobs])
    distance = (trainers - samplers).abs()
    assert (distance.max() if dtype == "float32" else distance.mean()) < tolerance
    assert sampler.sample(asked, params) == groups, "equal noise draws equal tokens"


class TestResume:
    """The real worker, with deterministic kernels, killed and started again."""

    def start(self, project: Project, name: str) -> Running:
        environment = {"PYTHONPATH": str(Path(__file__).parents[2])}
        return project.start([*WORKER, project.recipe("long.yaml", **RECIPE), "--name", name], environment)

    def finished(self, project: Project, name: str) -> tuple[Run, Done]:
        done = self.start(project, name).wait(timeout_s=600)
        assert done.code == 0, done.said
        return project.run(name), done

    @pytest.fixture(scope="class")
    def whole(self, project: Project) -> Run:
        return self.finished(project, "whole")[0]

    def test_twice_the_same_run_is_the_same(self, project, whole):
        again, _ = self.finished(project, "again")
        assert again.values() == whole.values()
        assert again.adapter() == whole.adapter()

    def test_killed_twice_it_equals_the_whole_run(self, project, whole):
        run = project.run("killed")
        for step in (9, 31):
            started = self.start(project, "killed")
            wait_for(is_at_step(run, step), started)
            project.kill_all()
            assert not (run.root / "outcome.json").exists(), "died without a word"
        _, done = self.finished(project, "killed")
        assert "resumed" in done.stderr
        assert [attempt["attempt"] for attempt in run.attempts()] == [1, 2, 3]
        assert run.steps() == list(range(61))
        assert run.values() == whole.values()
        assert run.adapter() == whole.adapter()
        assert run.adapter("adapter-best") == whole.adapter("adapter-best")
