"""`trainer check --memory`: the real step of a model that is not there.

The model is made from its config.json alone, of fake tensors, which have sizes and no memory. Policy, learner and loss
are those of training, so what they keep is what a run keeps; a counter of living storages gives the peak.
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
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from trainer.config.load import config_dirs, load_recipe
from trainer.distributed.world import World
from trainer.errors import EXIT_FINISHED, EXIT_USER, ModelError, ShapeError, TrainerError
from trainer.model import attention
from trainer.model.policy import Policy, Reference, make_policy
from trainer.planning.longest_pack import longest_pack
from trainer.planning.memory import GIB, MemoryEstimate
from trainer.planning.model_facts import find_model_config
from trainer.planning.plan import Plan, make_plan, plan_memory
from trainer.planning.remedies import remedy_lines
from trainer.training import policy_update
from trainer.training.learner import Learner
from trainer.training.losses import sft_loss
from trainer.training.memory_preflight import longest_batch
from trainer.training.schedule import adam_params

CPU: Final = torch.device("cpu")


@final
@dataclass(frozen=True)
class Measured:
    """GiB of living tensors."""

    weights_gib: float
    """The model, adapter included, in the compute dtype."""
    state_gib: float
    """Masters, gradient sums, optimizer state, reference."""
    step_gib: float
    """What a step needs above weights and state, at its peak."""
    seconds: float
    """That the measurement took."""

    @property
    def total_gib(self) -> float:
        """Tensors at the peak of a step."""
        return self.weights_gib + self.state_gib + self.step_gib


@final
class LiveStorages(TorchDispatchMode):
    """Counts the bytes of storages while they live."""

    def __init__(self) -> None:
        """Begin with none."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._living: dict[int, weakref.ref[Any]] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and look at what it made."""
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor)
        return made

    def _see(self, tensor: torch.Tensor) -> None:
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
    """Fake tensors have no values; whoever asks for one gets 1, which is finite."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.tolist:
            return [1.0] * args[0].numel()
        if func in (torch.Tensor.item, torch.Tensor.__float__):
            return 1.0
        if func is torch.bincount:  # its size is its largest value; no sequence is as many as tokens
            return torch.ones_like(args[0])
        return func(*args, **(kwargs or {}))


def measure(plan: Plan, config: PretrainedConfig) -> Measured:
    """Peak of the living tensors of one step of a plan, with the longest pack.

    Args:
        plan: recipe and shape.
        config: the model's.

    Raises:
        ShapeError: the shape splits the model over ranks, which is not measured here.
        ModelError: the model is quantized, which is not measured either.
    """
    if plan.shape.sharding == "full":
        raise ShapeError(f"{plan.shape.name}: a sharded model is only estimated, not measured; leave --memory out")
    if plan.recipe.model.quantization is not None:
        raise ModelError("model.quantization: a model in 4 bits is only estimated, not measured; leave --memory out")
    begin, recipe = time.perf_counter(), plan.recipe
    lengths = longest_pack(recipe, plan.shape)
    if plan.shape.device == "cuda":  # its kernel keeps no scores at any length; the CPU's does so only above this one
        lengths = [max(length, attention.EAGER_MAX_TOKENS + 1) for length in lengths]
    real = longest_batch(lengths, config.get_text_config().vocab_size, recipe, CPU)
    policy = _made_of_nothing(plan, config)
    storages = LiveStorages()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, storages, _OneForNumbers():
        _give_sizes(policy)
        batch = _faked(real, fake)
        weights = storages.now
        learner = Learner(policy, World(0, 1, CPU))
        learner.state_tensors()
        is_fresh = recipe.lora is not None and recipe.lora.warm_start is None
        kind = recipe.algorithm.reference if recipe.algorithm is not None else "base"
        reference = Reference(policy, kind, is_fresh=is_fresh) if recipe.method == "rft" else None
        state = storages.now
        storages.peak = storages.now
        if reference is None:
            learner.learn([batch], sft_loss, adam_params(recipe.optimizer, 0, plan.steps), denominator=1.0)
        else:
            policy_update.learn(learner, [policy_update.Minibatch([batch], 1.0)], reference, plan, 0)
        seconds = time.perf_counter() - begin
        return Measured(weights / GIB, (state - weights) / GIB, (storages.peak - state) / GIB, seconds)


def _made_of_nothing(plan: Plan, config: PretrainedConfig) -> Policy:
    """The policy on the meta device."""
    model, dtype = plan.recipe.model, getattr(torch, plan.recipe.model.compute_dtype)
    attention.register()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # PEFT leaves an adapter on meta in the dtype that it was made in
    try:
        with torch.device("meta"):
            causal_lm = AutoModelForCausalLM.from_config(
                config,
                dtype=dtype,
                attn_implementation=attention.PACKED_ATTENTION,
                trust_remote_code=model.trust_remote_code,
            )
            causal_lm.requires_grad_(False)
            return make_policy(causal_lm.eval(), model, plan.recipe.lora, plan.recipe.seed)
    finally:
        torch.set_default_dtype(before)


def _give_sizes(policy: nn.Module) -> None:
    """Put fake tensors of the CPU in place of those on meta; shared ones stay shared."""
    made: dict[int, Any] = {}
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
    """A batch with fake tensors in place of its own."""
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
    """The model's config, from its directory, the hub's local cache, or our card of a well-known name.

    Raises:
        ModelError: there is none, or transformers does not know its type.
    """
    model = plan.recipe.model
    found = find_model_config(model.path, config_dirs("models"))
    if found is None:
        raise ModelError(f"{model.path}: no config.json is known here, so its memory cannot be measured")
    fields = {str(name): value for name, value in found.items() if name != "model_type"}
    try:
        if Path(model.path).is_dir():
            return AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
        return AutoConfig.for_model(str(found.get("model_type")), **fields)
    except ValueError as error:
        raise ModelError(f"{model.path}: {str(error).splitlines()[0]}") from None


def describe(plan: Plan, measured: Measured, estimate: MemoryEstimate) -> dict[str, Any]:
    """Measured beside estimated, in GiB; what only the machine itself could show is estimated in both."""
    sampling = estimate.phases.get("sampling", 0.0)
    parts: dict[str, tuple[float, float | None]] = {
        "weights, adapter": (estimate.weights_gib, measured.weights_gib),
        "masters, gradients, optimizer, reference": (estimate.state_gib, measured.state_gib),
        "a step on top of them": (estimate.phases["learning"], measured.step_gib),
        **({"sampling, at another time": (sampling, None)} if sampling else {}),
        "copies, fragmentation, process": (estimate.other_gib, None),
    }
    running = measured.weights_gib + measured.state_gib + max(measured.step_gib, sampling) + estimate.other_gib
    return {
        "parts_gib": {name: {"estimated": first, "measured": second} for name, (first, second) in parts.items()},
        "estimated_gib": estimate.total_gib,
        "measured_gib": max(running, estimate.total_gib if "weights as stored" in estimate.parts else 0.0),
        "available_gib": estimate.available_gib,
        "pack_tokens": sum(longest_pack(plan.recipe, plan.shape)),
        "seconds": measured.seconds,
    }


def lines_of(about: Mapping[str, Any], shape_name: str) -> list[str]:
    """The comparison as text."""
    lines = [
        f"memory per device of {shape_name}, a micro-batch of {about['pack_tokens']:,} tokens",
        f"  {'':42}{'estimated':>12}{'measured':>12}   GiB",
    ]
    for name, part in about["parts_gib"].items():
        measured = "" if part["measured"] is None else f"{part['measured']:.2f}"
        lines.append(f"  {name:42}{part['estimated']:12.2f}{measured:>12}")
    lines.append(f"  {'peak':42}{about['estimated_gib']:12.2f}{about['measured_gib']:12.2f}")
    lines.append(f"  {'available':42}{about['available_gib']:12g}")
    return [
        *lines,
        f"measured on tensors without contents in {about['seconds']:.0f} s; docs/memory.md says what is in it",
    ]


def main(argv: list[str] | None = None) -> int:
    """Measure, and print it beside the estimate; the exit code is 2 where the peak is more than the device has."""
    arguments = _parse(argv)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        plan = make_plan(load_recipe(Path(arguments.recipe), arguments.set), arguments.shape)
        estimate = plan_memory(plan)
        if estimate is None:
            raise ModelError(
                f"{plan.recipe.model.path}: its sizes are not known here, so its memory cannot be measured"
            )
        about = describe(plan, measure(plan, config_of(plan)), estimate)
    except TrainerError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    if arguments.json:
        sys.stdout.write(json.dumps(about, ensure_ascii=False) + "\n")
    else:
        sys.stdout.write("\n".join(lines_of(about, plan.shape.name)) + "\n")
    if about["measured_gib"] <= about["available_gib"]:
        return EXIT_FINISHED
    sys.stderr.write("\n".join(["does not fit", *remedy_lines(plan.recipe, plan.shape)]) + "\n")
    return EXIT_USER


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="trainer.checks.memory_dry_run", description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe field")
    parser.add_argument("--shape", help="training shape")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
