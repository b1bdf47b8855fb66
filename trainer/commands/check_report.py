"""What `trainer check` reports: one typed document, as JSON and as text."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, final

from trainer.commands.tables import table_lines
from trainer.config.document import dotted, leaves
from trainer.config.shape import ShapeLimit, TrainingShape
from trainer.launch.local import shown_command
from trainer.planning.fit import limit_of
from trainer.planning.memory import MemoryEstimate
from trainer.planning.plan import (
    SHAPE_VALUES,
    Plan,
    RFTPlan,
    accumulation,
    plan_device_hours,
    resolved_values,
    sequences_per_step,
    step_tokens,
)

PORT: Final = 29500
Basis = Literal["measured", "estimated"]


@final
@dataclass(frozen=True)
class ModelReport:
    """The base model."""

    path: str
    params: int | None
    adapted: str | None
    """Which parts of a mixture of experts get adapters; None for other models, full training and chosen modules."""


@final
@dataclass(frozen=True)
class LimitsReport:
    """The shape's limits for this kind of training."""

    max_params_b: float
    max_seq_tokens: int
    basis: Basis


@final
@dataclass(frozen=True)
class ShapeReport:
    """The shape, and who chose it."""

    name: str
    devices: str
    chosen_by: str
    limits: LimitsReport


@final
@dataclass(frozen=True)
class BatchReport:
    """The arithmetic of a step: 300 rows of 17 tokens are 5,135 tokens, or 6 micro-batches of 1,024."""

    num_rows: int | None
    rows_per_step: int
    sequences_per_step: int
    row_tokens: float | None
    step_tokens: float | None
    micro_batch_tokens: int
    """Of one rank."""
    num_ranks: int
    context_parallel: int
    """Ranks that compute each micro-batch together."""
    accumulation: int | None
    steps_per_epoch: float | None
    steps: int
    epochs: float | None
    is_separate: bool
    """Each micro-batch has one sequence."""


@final
@dataclass(frozen=True)
class MemoryReport:
    """Predicted memory of one device."""

    basis: Basis
    parts_gib: Mapping[str, float]
    total_gib: float
    available_gib: float


@final
@dataclass(frozen=True)
class ValueReport:
    """A resolved value and its origin."""

    value: object
    origin: str


@final
@dataclass(frozen=True)
class CheckReport:
    """Everything that `check` reports; the JSON document of `check --json`."""

    recipe: str
    name: str
    method: Literal["sft", "rft"]
    training: Literal["lora", "full"]
    model: ModelReport
    identity: str
    shape: ShapeReport
    batch: BatchReport
    memory: MemoryReport | None
    device_hours: float | None
    rate_basis: Basis | None
    commands: Mapping[str, str]
    values: Mapping[str, ValueReport]
    warnings: Sequence[str]
    separate_reason: str | None = None
    """Why sequences are trained one by one."""


def describe_plan(plan: Plan, recipe_file: str, overrides: Sequence[str] = ()) -> CheckReport:
    """Return everything that `check` reports of a plan.

    Args:
        plan: The plan.
        recipe_file: The recipe file as the user gave it.
        overrides: `--set` and `--shape` arguments, repeated in the launch commands.
    """
    recipe, shape = plan.recipe, plan.shape
    return CheckReport(
        recipe=recipe_file,
        name=recipe.name,
        method=recipe.method,
        training="lora" if recipe.lora is not None else "full",
        model=_model(plan),
        identity=plan.identity_hash,
        shape=ShapeReport(shape.name, describe_devices(shape), plan.origins["shape"], _limits(plan)),
        batch=_batch(plan),
        memory=_memory(plan.memory) if plan.memory is not None else None,
        device_hours=plan_device_hours(plan),
        rate_basis=shape.rate.basis if shape.rate else None,
        commands=_commands(shape, recipe_file, overrides),
        values=_values(plan),
        warnings=plan.warnings,
        separate_reason=plan.separate_reason,
    )


def _model(plan: Plan) -> ModelReport:
    lora, facts = plan.recipe.lora, plan.facts
    is_all = lora is not None and lora.target_modules == "all-linear"
    adapted = facts.adapted_parts if facts is not None and is_all else None
    return ModelReport(plan.recipe.model.path, facts.params if facts is not None else None, adapted)


def _limits(plan: Plan) -> LimitsReport:
    limit = limit_of(plan.recipe, plan.shape)
    assert limit is not None, "`make_plan` refuses shapes that do not support the kind of training"
    return LimitsReport(limit.max_params_b, limit.max_seq_tokens, limit.basis)


def _batch(plan: Plan) -> BatchReport:
    return BatchReport(
        num_rows=plan.num_rows,
        rows_per_step=plan.recipe.rows_per_step,
        sequences_per_step=sequences_per_step(plan.recipe),
        row_tokens=plan.row_tokens,
        step_tokens=step_tokens(plan),
        micro_batch_tokens=plan.shape.micro_batch_tokens,
        num_ranks=plan.shape.num_ranks,
        context_parallel=plan.shape.context_parallel,
        accumulation=accumulation(plan),
        steps_per_epoch=plan.steps_per_epoch,
        steps=plan.steps,
        epochs=plan.steps / plan.steps_per_epoch if plan.steps_per_epoch else None,
        is_separate=plan.separate_reason is not None,
    )


def _memory(memory: MemoryEstimate) -> MemoryReport:
    return MemoryReport("estimated", dict(memory.parts), memory.total_gib, memory.available_gib)


def _commands(shape: TrainingShape, recipe_file: str, overrides: Sequence[str]) -> dict[str, str]:
    """Launch commands; on several machines accelerate and torchrun have to be started on each."""
    given = "".join(f" {shlex.quote(part)}" for part in overrides)
    accelerate = shown_command(shape, shlex.quote(recipe_file)) + given
    torchrun = f"torchrun --nproc_per_node {shape.ranks_per_node}"
    if shape.nodes > 1:
        rendezvous = f"--machine_rank $NODE_RANK --main_process_ip $MAIN_IP --main_process_port {PORT}"
        accelerate = accelerate.replace(" -m trainer.worker ", f" {rendezvous} -m trainer.worker ", 1)
        torchrun += f" --nnodes {shape.nodes} --node_rank $NODE_RANK --master_addr $MAIN_IP --master_port {PORT}"
    return {
        "trainer": f"trainer train {shlex.quote(recipe_file)}{given}",
        "accelerate": accelerate,
        "torchrun": f"{torchrun} -m trainer.worker {shlex.quote(recipe_file)}{given}",
        "slurm": f"trainer submit {shlex.quote(recipe_file)}{given} --launcher slurm",
    }


def _values(plan: Plan) -> dict[str, ValueReport]:
    """Every resolved value by its dotted name."""
    algorithm = plan.algorithm if isinstance(plan, RFTPlan) else None
    values = {dotted(path): value for path, value in leaves(resolved_values(plan.recipe, algorithm))}
    values |= {f"shape.{name}": getattr(plan.shape, name) for name in SHAPE_VALUES}
    return {name: ValueReport(value, plan.origins[name]) for name, value in values.items()}


def report_lines(
    report: CheckReport,
    *,
    width: int | None = None,
    is_colored: bool = False,
    with_values: bool = False,
    problems: Sequence[str] = (),
) -> list[str]:
    """Return the report as text.

    Args:
        report: The report.
        width: Width of the terminal, to which tables are folded; None does not fold.
        is_colored: Dim values that are defaults.
        with_values: Print every resolved value with its origin.
        problems: What the run would refuse; they are printed before.
    """
    shape, limits = report.shape, report.shape.limits
    size = f", {report.model.params / 1e9:.3g} B parameters" if report.model.params else ""
    kind = "LoRA" if report.training == "lora" else "full-parameter training"
    values = [(name, _shown(each.value), each.origin) for name, each in report.values.items()]
    is_dim = [each.origin == "default" for each in report.values.values()] if is_colored else None
    return [
        f"{report.name}: {report.method}, {kind} of {report.model.path}{size}",
        *([f"adapts  {report.model.adapted}"] if report.model.adapted else []),
        f"shape   {shape.name} ({shape.devices}), by {shape.chosen_by}",
        f"        supports {kind} of up to {limits.max_params_b:g} B parameters, and with a small model rows of up to "
        f"{limits.max_seq_tokens:,} tokens (limits {limits.basis})",
        *((f"sequences one by one: {report.separate_reason}",) if report.separate_reason else ()),
        *("", "batch", *table_lines(_batch_rows(report.batch), indent=2, width=width)),
        *("", *_memory_lines(report.memory)),
        *("", _hours_line(report)),
        *("", "launch", *table_lines([*report.commands.items()], indent=2)),  # not folded: one can copy them
        *(("", "values", *table_lines(values, indent=2, width=width, is_dim=is_dim)) if with_values else ()),
        "",
        _verdict(report, problems),
    ]


def _verdict(report: CheckReport, problems: Sequence[str]) -> str:
    """The last line: whether the run would start."""
    if problems:
        return f"refused: {_count(len(problems), 'problem')} above"
    return f"ready: {_count(report.batch.steps, 'step')} on {report.shape.name}; every value with its origin: --values"


def _batch_rows(batch: BatchReport) -> list[tuple[str, str, str, str]]:
    is_sft = batch.sequences_per_step == batch.rows_per_step
    unit = "row" if is_sft else "prompt"
    total = "tokens unknown before the rows are loaded"
    if batch.step_tokens:
        total = f"{'about' if is_sft else 'at most'} {batch.step_tokens:,.0f} tokens"
    content = _count(batch.rows_per_step, unit)
    content += f" of about {batch.row_tokens:,.0f} tokens" if batch.row_tokens else ""
    content += "" if is_sft else f" x {batch.sequences_per_step // batch.rows_per_step} completions"
    size = "one sequence" if batch.is_separate else f"{batch.micro_batch_tokens:,} tokens"
    micro = f"micro-batches of {size} x {_count(batch.num_ranks, 'rank')}"
    if batch.context_parallel > 1:
        groups = _count(batch.num_ranks // batch.context_parallel, "group")
        size = f"{batch.micro_batch_tokens * batch.context_parallel:,} tokens"
        micro = f"micro-batches of {size} x {groups} of {batch.context_parallel} ranks, each a slice of"
        micro += f" {batch.micro_batch_tokens:,},"
    rows = [("global batch", content, "=", total)]
    if batch.accumulation:
        rows.append(("", f"{micro} x {batch.accumulation:,} accumulated", ">=", "the global batch"))
    else:
        rows.append(("", f"{micro} x as many as needed", "=", "the global batch"))
    steps = _count(batch.steps, "step")
    if batch.num_rows is None or batch.steps_per_epoch is None or batch.epochs is None:
        return [*rows, ("run", steps, "=", "epochs unknown: rows of a hub are counted when they are loaded")]
    per_epoch = f"{_count(batch.num_rows, unit)} / {batch.rows_per_step:,} a step"
    rows.append(("epoch", per_epoch, "=", f"{batch.steps_per_epoch:,.4g} steps"))
    return [*rows, ("run", steps, "=", f"{batch.epochs:.3g} epochs")]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _memory_lines(memory: MemoryReport | None) -> list[str]:
    if memory is None:
        return ["memory per device: no estimate, the sizes of the model are unknown"]
    rows = [(name, f"{gib:8.2f} GiB") for name, gib in memory.parts_gib.items()]
    rows.append(("peak", f"{memory.total_gib:8.2f} GiB of {memory.available_gib:g} GiB"))
    return [f"memory per device ({memory.basis})", *table_lines(rows, indent=2)]


def _hours_line(report: CheckReport) -> str:
    if report.device_hours is not None:
        sampling = ", without sampling" if report.method == "rft" else ""
        return f"device-hours: about {report.device_hours:.3g} (rate {report.rate_basis}{sampling})"
    if report.rate_basis is None:
        return f"device-hours: the shape {report.shape.name} has no rate"
    return "device-hours: unknown, since the sizes of the model or the number of rows are unknown"


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def describe_devices(shape: TrainingShape) -> str:
    """Return number and name of the devices.

    Args:
        shape: The shape, for example of 16 GPUs on 2 machines.
    """
    if shape.gpus == 0:
        return shape.device_name
    machines = f" on {shape.nodes} machines" if shape.nodes > 1 else ""
    return f"{shape.gpus} x {shape.device_name}{machines}"


def describe_limit(limit: ShapeLimit | None) -> str:
    """Return the largest job as text."""
    if limit is None:
        return "not supported"
    return f"{limit.max_params_b:g} B; rows to {limit.max_seq_tokens:,} tokens ({limit.basis})"
