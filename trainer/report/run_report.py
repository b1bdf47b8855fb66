"""What the page says of one run: header, curves, timeline, rollouts, samples."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

from trainer.planning.plan import Plan, RFTPlan
from trainer.report.curves import HELD_OUT, Curves, read_curves
from trainer.report.rollouts import PageRollouts, RolloutReader
from trainer.report.samples import BeforeAfter, before_after
from trainer.report.settings import Setting, settings_of
from trainer.report.timeline import AttemptSpan, Event, attempt_spans, began_at, events
from trainer.run.best import best_value
from trainer.run.console import duration
from trainer.run.directory import RunDir
from trainer.run.judge_ledger import judge_totals
from trainer.run.metrics_reader import Record
from trainer.run.sinks import sink_problems
from trainer.run.tracker import read_tracker

NO_ROLLOUTS: Final = PageRollouts([], 0, 0, "")
MAX_EVENTS: Final = 500


@final
@dataclass(frozen=True)
class Standing:
    """The state of a run now, as `trainer status` says it."""

    state: str
    is_live: bool
    message: str | None = None
    phase: str | None = None
    seconds_left: float | None = None


@final
@dataclass(frozen=True)
class Tile:
    """One of the large numbers at the top."""

    label: str
    value: str
    note: str = ""


@final
@dataclass(frozen=True)
class RunReport:
    """One run, ready to be written as JSON."""

    name: str
    root: str
    standing: Standing
    about: list[str]
    """Short facts: method, model, adapter, shape, rows."""
    tiles: list[Tile]
    settings: list[Setting]
    warnings: list[str]
    notes: list[str]
    """What the page leaves out or averages, as sentences."""
    curves: Curves
    attempts: list[AttemptSpan]
    events: list[Event]
    excluded: list[str]
    """Rows that the run leaves out since their loss was not finite."""
    rollouts: PageRollouts
    samples: BeforeAfter | None
    is_rft: bool


@final
class RunReporter:
    """Reads a run for the page, once or again and again."""

    def __init__(self, run: RunDir, standing: Callable[[RunDir], Standing]) -> None:
        """Nothing but the plan is read yet.

        Args:
            run: any run.
            standing: says how it stands.

        Raises:
            LaunchError: it has no readable plan.
        """
        self.run, self._standing = run, standing
        plan = run.read_plan()
        is_rft = isinstance(plan, RFTPlan)
        self._reader = (
            RolloutReader(run, plan.recipe.rollout.group_size, plan.recipe.rows_per_step)
            if isinstance(plan, RFTPlan)
            else None
        )
        self._is_rft = is_rft

    def version(self) -> tuple[object, ...]:
        """Changes when the report would."""
        run = self.run
        files = (run.metrics_file, run.attempts_file, run.outcome_file, run.plan_file)
        stats = [(file.stat().st_mtime_ns, file.stat().st_size) if file.exists() else None for file in files]
        steps = run.journal_steps()
        chunks = len(run.journal_chunks(steps[-1])) if steps else 0
        return (
            run.is_locked(),
            *stats,
            len(steps),
            chunks,
            len(run.journal_steps(refused=True)),
            len(run.evaluation_steps()),
            len(run.answer_steps()),
            len(sink_problems(run)),
        )

    def read(self) -> RunReport:
        """The report of the run now."""
        run, plan, standing = self.run, self.run.read_plan(), self._standing(self.run)
        records, attempts = run.read_metrics(), run.read_attempts()
        began = began_at(attempts, records)
        spans = attempt_spans(attempts, records, run.read_outcome(), is_live=standing.is_live)
        curves = read_curves(records, began)
        rollouts = self._reader.read() if self._reader is not None else NO_ROLLOUTS
        found = events(run, spans, records, began)
        samples = before_after(run)
        return RunReport(
            name=run.name,
            root=str(run.root),
            standing=standing,
            about=_about(plan),
            tiles=_tiles(run, plan, records, spans, standing),
            settings=settings_of(plan),
            warnings=list(plan.warnings),
            notes=[*_notes(curves, rollouts, found, samples), *_lost_trackers(run)],
            curves=curves,
            attempts=spans,
            events=found[:MAX_EVENTS],
            excluded=sorted(run.read_excluded()),
            rollouts=rollouts,
            samples=samples,
            is_rft=self._is_rft,
        )


def _about(plan: Plan) -> list[str]:
    recipe, lora = plan.recipe, plan.recipe.lora
    method = f"RFT, {plan.algorithm.name}" if isinstance(plan, RFTPlan) else "SFT"
    trained = f"LoRA, rank {lora.rank}" if lora is not None else "all parameters"
    rows = [f"{plan.num_rows:,} rows"] if plan.num_rows else []
    return [method, Path(recipe.model.path).name, trained, f"shape {plan.shape.name}", *rows]


def _tiles(
    run: RunDir, plan: Plan, records: Sequence[Record], spans: Sequence[AttemptSpan], standing: Standing
) -> list[Tile]:
    step = records[-1]["step"] if records else 0
    left = f"{duration(standing.seconds_left)} left" if standing.seconds_left is not None else ""
    tiles = [*_best_tile(run), Tile("Steps", f"{step:,} of {plan.steps:,}", left or _epochs(plan, step))]
    if records and spans:
        wall = (records[-1].get("time") or 0.0) - began_at(run.read_attempts(), records)
        starts = f"{len(spans)} attempts" if len(spans) > 1 else "1 attempt"
        tiles.append(Tile("Time", duration(max(0.0, wall)), starts))
    rates = [record["perf/tokens_per_s"] for record in records if "perf/tokens_per_s" in record]
    if rates:
        tiles.append(Tile("Tokens per second", f"{statistics.median(rates):,.0f}", "median of all steps"))
    peaks = [record["perf/peak_gib"] for record in records if "perf/peak_gib" in record]
    if peaks:
        predicted = plan.memory.total_gib if plan.memory is not None else None
        tiles.append(Tile("Peak memory", f"{max(peaks):.1f} GiB", f"{predicted:.1f} predicted" if predicted else ""))
    totals = judge_totals(run)
    if totals is not None:
        tokens = totals.prompt_tokens + totals.completion_tokens
        tiles.append(Tile("Judge tokens", f"{tokens:,}", f"{totals.answers:,} answers"))
    return tiles


def _epochs(plan: Plan, step: int) -> str:
    per_epoch = plan.steps_per_epoch
    if not per_epoch:
        return ""
    epochs = step / per_epoch
    return f"{epochs:.2f} epochs" if epochs < 10 else f"{epochs:,.0f} epochs"


def _best_tile(run: RunDir) -> list[Tile]:
    records = run.comparable_metrics()
    best = best_value(records)
    if best is None:
        return []
    first = next(record for record in records if best.name in record)
    when = "before training" if first["step"] == 0 else f"at step {first['step']}"
    label = f"Best held-out {best.name.removeprefix(HELD_OUT)}"
    return [Tile(label, f"{best.value:.3f}", f"step {best.step}; {first[best.name]:.3f} {when}")]


def _lost_trackers(run: RunDir) -> Iterator[str]:
    """Copies of the metrics that receive nothing more."""
    tracker = read_tracker(run)
    if tracker is not None and tracker.problem is not None:
        yield f"{tracker.problem}; trainer sync {run.root} sends what is missing."
    for name, why in sink_problems(run).items():
        yield f"{name} receives nothing more ({why}); trainer sync {run.root} --to {name} copies all."


def _notes(curves: Curves, rollouts: PageRollouts, found: Sequence[Event], samples: BeforeAfter | None) -> list[str]:
    notes = []
    if curves.steps_per_point > 1:
        notes.append(
            f"Curves: each point is the mean of {curves.steps_per_point} of {curves.num_steps:,} steps; "
            "the band reaches from the smallest to the largest value. Every step is in metrics.jsonl."
        )
    for name, number in sorted(curves.not_finite.items()):
        notes.append(f"{name}: {number:,} {'value is' if number == 1 else 'values are'} not finite and not drawn.")
    if len(found) > MAX_EVENTS:
        notes.append(f"Events: the first {MAX_EVENTS} of {len(found):,}.")
    if rollouts.left_out:
        notes.append(f"Rollouts: {rollouts.left_out}")
    if samples is not None and len(samples.samples) < samples.num_prompts:
        notes.append(f"Before and after: {len(samples.samples)} of {samples.num_prompts:,} prompts are shown.")
    return notes
