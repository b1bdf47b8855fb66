"""`trainer check --memory`: dry-run a training step on fake tensors and measure its peak memory.

The model is built from its config.json with fake tensors, which have shapes but no memory. Policy, learner and loss are
those of training, so they keep the same tensors as a run; the peak is the largest total size of living storages.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
import time
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, PretrainedConfig

from trainer.config.arguments import add_recipe_arguments
from trainer.config.load import config_dirs
from trainer.distributed.world import World
from trainer.errors import EXIT_FINISHED, EXIT_USER, ModelError, ShapeError, TrainerError
from trainer.model.attention import EAGER_MAX_TOKENS
from trainer.model.base_model import empty_model
from trainer.model.policy import Policy, Reference, make_policy
from trainer.planning.choose_shape import reachable_shapes
from trainer.planning.longest_pack import longest_pack
from trainer.planning.memory import GIB, MemoryEstimate
from trainer.planning.model_facts import find_model_config
from trainer.planning.plan import Plan, RFTPlan
from trainer.planning.remedies import find_remedies, remedy_lines
from trainer.run.plan_recipe import plan_recipe
from trainer.training import policy_update
from trainer.training.learner import Learner
from trainer.training.losses import sft_loss
from trainer.training.memory_preflight import longest_batch
from trainer.training.schedule import adam_params

CPU: Final = torch.device("cpu")


@final
@dataclass(frozen=True)
class Measured:
    """Measured sizes of living tensors in GiB."""

    weights_gib: float
    """Model and adapter in the compute dtype."""
    state_gib: float
    """Master weights, gradient sums, optimizer state and reference weights."""
    step_gib: float
    """Peak of a step in addition to weights and state."""
    seconds: float
    """Duration of the measurement."""

    @property
    def total_gib(self) -> float:
        """All tensors at the peak of a step."""
        return self.weights_gib + self.state_gib + self.step_gib


@final
class LiveStorages(TorchDispatchMode):
    """Counts the bytes of all living storages, and their peak."""

    def __init__(self) -> None:
        """Start with no storages."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._living: dict[int, weakref.ref[Any]] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count the storages of its results."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor)
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._living:
            return

        def forget(_: Any) -> None:
            if self._living.pop(key, None) is not None:
                self.now -= size

        self._living[key] = weakref.ref(storage, forget)
        self.now += size
        self.peak = max(self.peak, self.now)


@final
class _OneForNumbers(TorchFunctionMode):
    """Fake tensors have no values; reads return 1.0, which is finite."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.tolist:
            return [1.0] * args[0].numel()
        if func in (torch.Tensor.item, torch.Tensor.__float__):
            return 1.0
        if func is torch.bincount:  # its result size depends on values; [tokens] is an upper bound
            return torch.ones_like(args[0])
        return func(*args, **(kwargs or {}))


def measure(plan: Plan, config: PretrainedConfig) -> Measured:
    """Measure one step of a plan on its largest micro-batch.

    Args:
        plan: Recipe and shape.
        config: The model's configuration.

    Raises:
        ShapeError: The shape shards the model, or splits packs over ranks, which is not supported here.
        ModelError: The model is quantized, which is not supported either.
    """
    if plan.shape.sharding != "none":
        raise ShapeError(f"{plan.shape.name}: a sharded model is only estimated, not measured; omit --memory")
    if plan.shape.context_parallel > 1:
        raise ShapeError(f"{plan.shape.name}: slices of packs are only estimated, not measured; omit --memory")
    if plan.recipe.model.quantization is not None:
        raise ModelError("model.quantization: a model in 4 bits is only estimated, not measured; omit --memory")
    if plan.recipe.model.gradient_checkpointing == "selective":
        raise ModelError("model.gradient_checkpointing: selective is only estimated, not measured; omit --memory")
    begin, recipe = time.perf_counter(), plan.recipe
    lengths = longest_pack(recipe, plan.shape)
    if plan.shape.device == "cuda":  # GPU kernels never keep scores; on the CPU only sequences above this length do not
        lengths = [max(length, EAGER_MAX_TOKENS + 1) for length in lengths]
    real = longest_batch(lengths, config.get_text_config().vocab_size, recipe, CPU)
    policy = _on_meta(plan, config)
    storages = LiveStorages()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, storages, _OneForNumbers():
        materialize_fake(policy)
        batch = _faked(real, fake)
        weights = storages.now
        learner = Learner(policy, World(0, 1, CPU), optimizer=recipe.optimizer.name)
        learner.state_tensors()
        is_fresh = recipe.lora is not None and recipe.lora.warm_start is None
        reference = None
        if isinstance(plan, RFTPlan):
            reference = Reference(policy, plan.algorithm.reference, is_fresh=is_fresh)
        state = storages.now
        storages.peak = storages.now
        if isinstance(plan, RFTPlan) and reference is not None:
            policy_update.learn(learner, [policy_update.Minibatch([batch], 1.0)], reference, plan, 0)
        else:
            learner.learn([batch], sft_loss, adam_params(recipe.optimizer, 0, plan.steps), denominator=1.0)
        seconds = time.perf_counter() - begin
        return Measured(weights / GIB, (state - weights) / GIB, (storages.peak - state) / GIB, seconds)


def _on_meta(plan: Plan, config: PretrainedConfig) -> Policy:
    """Build the policy on the meta device."""
    model, dtype = plan.recipe.model, getattr(torch, plan.recipe.model.compute_dtype)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # PEFT does not convert adapters on the meta device
    try:
        with torch.device("meta"):
            causal_lm = empty_model(config, dtype, trust_remote_code=model.trust_remote_code)
            causal_lm.requires_grad_(False)
            return make_policy(causal_lm.eval(), model, plan.recipe.lora, plan.recipe.seed)
    finally:
        torch.set_default_dtype(before)


def materialize_fake(policy: nn.Module) -> None:
    """Replace meta tensors by fake CPU tensors; shared parameters stay shared."""
    made: dict[int, nn.Parameter] = {}
    for module in policy.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=CPU)
                    made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=CPU)


def _faked(value: Any, fake: FakeTensorMode) -> Any:
    """Return a batch with fake tensors instead of real ones."""
    if isinstance(value, torch.Tensor):
        return fake.from_tensor(value)
    if isinstance(value, Mapping):
        return {name: _faked(item, fake) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_faked(item, fake) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _faked(getattr(value, field.name), fake) for field in dataclasses.fields(value)}
        return type(value)(**fields)
    return value


def config_of(plan: Plan) -> PretrainedConfig:
    """Return the model's configuration from its directory, the local hub cache, or the card of a well-known model.

    Raises:
        ModelError: There is none, or transformers does not know its type.
    """
    model = plan.recipe.model
    known = find_model_config(model.path, config_dirs("models"), model.revision)
    if known is None:
        raise ModelError(f"{model.path}: no config.json was found, so its memory cannot be measured")
    fields = {str(name): value for name, value in known.items() if name != "model_type"}
    try:
        if Path(model.path).is_dir():
            return AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
        return AutoConfig.for_model(str(known.get("model_type")), **fields)
    except ValueError as error:
        raise ModelError(f"{model.path}: {str(error).splitlines()[0]}") from None


@final
@dataclass(frozen=True)
class Part:
    """One line of the comparison, in GiB."""

    estimated: float
    measured: float | None
    """None for what cannot be measured on fake tensors."""


@final
@dataclass(frozen=True)
class Comparison:
    """Measured beside estimated memory; the JSON document of `check --memory --json`."""

    parts_gib: Mapping[str, Part]
    estimated_gib: float
    measured_gib: float
    """Peak with measured parts where there are any, and estimated ones otherwise."""
    available_gib: float
    pack_tokens: int
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether the measured peak is within the memory of the device."""
        return self.measured_gib <= self.available_gib


def compare(plan: Plan, measured: Measured, estimate: MemoryEstimate) -> Comparison:
    """Compare a measured step with the estimate.

    Args:
        plan: The plan.
        measured: Tensors of a step on fake tensors.
        estimate: The plan's estimate. It is used for what fake tensors cannot show, for example the process.
    """
    sampling = estimate.phases.get("sampling", 0.0)
    parts = {
        "weights, adapter": Part(estimate.weights_gib, measured.weights_gib),
        "masters, gradients, optimizer, reference": Part(estimate.state_gib, measured.state_gib),
        "a step, in addition": Part(estimate.phases["learning"], measured.step_gib),
        **({"sampling, instead of a step": Part(sampling, None)} if sampling else {}),
        "copies, fragmentation, process": Part(estimate.other_gib, None),
    }
    running = measured.weights_gib + measured.state_gib + max(measured.step_gib, sampling) + estimate.other_gib
    return Comparison(
        parts_gib=parts,
        estimated_gib=estimate.total_gib,
        measured_gib=max(running, estimate.total_gib if "weights as stored" in estimate.parts else 0.0),
        available_gib=estimate.available_gib,
        pack_tokens=sum(longest_pack(plan.recipe, plan.shape)),
        seconds=measured.seconds,
    )


def comparison_lines(comparison: Comparison, shape_name: str) -> list[str]:
    """Return the comparison as text."""
    lines = [
        f"memory per device of {shape_name}, a micro-batch of {comparison.pack_tokens:,} tokens",
        f"  {'':42}{'estimated':>12}{'measured':>12}   GiB",
    ]
    for name, part in comparison.parts_gib.items():
        measured = "" if part.measured is None else f"{part.measured:.2f}"
        lines.append(f"  {name:42}{part.estimated:12.2f}{measured:>12}")
    lines.append(f"  {'peak':42}{comparison.estimated_gib:12.2f}{comparison.measured_gib:12.2f}")
    lines.append(f"  {'available':42}{comparison.available_gib:12g}")
    return [*lines, f"measured on fake tensors in {comparison.seconds:.0f} s; see docs/memory.md for what is included"]


def main(argv: list[str] | None = None) -> int:
    """Measure a step and print it beside the estimate; returns 2 if the peak exceeds the memory of the device."""
    arguments = _parse(argv)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        plan = plan_recipe(Path(arguments.recipe), arguments.set, arguments.shape)
        if plan.memory is None:
            raise ModelError(
                f"{plan.recipe.model.path}: the sizes of the model are unknown, so its memory cannot be measured"
            )
        comparison = compare(plan, measure(plan, config_of(plan)), plan.memory)
    except TrainerError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    if arguments.json:
        sys.stdout.write(json.dumps(dataclasses.asdict(comparison), ensure_ascii=False) + "\n")
    else:
        sys.stdout.write("\n".join(comparison_lines(comparison, plan.shape.name)) + "\n")
    if comparison.fits:
        return EXIT_FINISHED
    remedies = find_remedies(plan.recipe, plan.shape, plan.facts, reachable_shapes())
    sys.stderr.write("\n".join(["does not fit", *remedy_lines(remedies)]) + "\n")
    return EXIT_USER


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="trainer.checks.memory_dry_run", description=__doc__)
    add_recipe_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
