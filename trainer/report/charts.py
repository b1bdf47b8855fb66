"""Which curves the page draws, in which order, under which names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, final

PARTS: Final = "rollout/reward/"


@final
@dataclass(frozen=True)
class Chart:
    """One chart: a metric of training, the held-out metric that belongs to it, and what it means."""

    title: str
    metric: str | None = None
    held_out: str | None = None
    interval: tuple[str, str] | None = None
    """Held-out metrics of the ends of the interval."""
    beside: str | None = None
    """A second metric, drawn dashed."""
    about: str = ""

    def names(self) -> set[str]:
        """Every metric of the chart."""
        names = {self.metric, self.held_out, self.beside, *(self.interval or ())}
        return {name for name in names if name is not None}


@final
@dataclass(frozen=True)
class Section:
    """Charts under one heading."""

    title: str
    charts: list[Chart] = field(default_factory=list)
    is_open: bool = True
    """Whether the charts are shown before the reader asks for them."""


SFT_LOSS: Final = Chart("Loss", "train/loss", "eval/loss", about="mean over trained tokens")
RFT: Final = (
    Chart(
        "Reward",
        "rollout/reward",
        "eval/reward",
        ("eval/reward_low", "eval/reward_high"),
        about="mean of the weighted sum over completions",
    ),
    Chart("Standard deviation of the reward", "rollout/reward_std", about="over all completions of a step"),
)
POLICY: Final = (
    Chart("KL to the reference", "train/ref_kld", about="k3 estimate of KL(policy || reference)"),
    Chart("KL of the update", "train/ppo_kl", about="k3 estimate of KL(old || policy)"),
    Chart("Entropy", "train/entropy", about="of the policy's next token, nats"),
)
COMPLETIONS: Final = (
    Chart("Completion length", "rollout/completion_tokens", "eval/completion_tokens", about="tokens, mean"),
    Chart("Cut at the token limit", "rollout/truncated_frac", "eval/truncated_frac", about="fraction of completions"),
    Chart("Flat groups", "rollout/flat_group_frac", about="fraction of prompts whose rewards are all equal"),
    Chart("Failed rewards", "rollout/failed", "eval/failed", about="completions without a reward, left out"),
)
OPTIMIZER: Final = (
    Chart("Gradient norm", "train/grad_norm", about="before clipping"),
    Chart("Learning rate", "train/learning_rate", about="by the schedule"),
    Chart("Clipped tokens", "train/clip_frac", about="fraction of trained tokens"),
)
MACHINE: Final = (
    Chart("Tokens per second", "perf/tokens_per_s", about="all tokens of a step, all devices"),
    Chart("Seconds per step", "perf/step_s", about="without evaluation and saving"),
    Chart("Peak memory", "perf/peak_gib", beside="perf/predicted_gib", about="GiB of one device; dashed: predicted"),
)


def sections(names: Iterable[str]) -> list[Section]:
    """The charts of the metrics that the runs have; every metric is in one of them.

    Args:
        names: of all metrics of all runs.
    """
    names = sorted(set(names))
    parts = [_part(name.removeprefix(PARTS), names) for name in names if name.startswith(PARTS)]
    is_rft = any(name.startswith("rollout/") for name in names) or "eval/reward" in names
    learning: Sequence[Chart] = [*RFT, *parts, *_pass_at(names), *POLICY] if is_rft else [SFT_LOSS, *OPTIMIZER, *POLICY]
    optimizer: Sequence[Chart] = (
        [Chart("Policy loss", "train/loss", about="the objective of the algorithm"), *OPTIMIZER] if is_rft else []
    )
    found = [
        Section("Learning", _with_data(learning, names)),
        Section("Completions", _with_data(COMPLETIONS, names)),
        Section("Optimizer", _with_data(optimizer, names)),
        Section("Speed and memory", _with_data(MACHINE, names)),
    ]
    drawn = {name for section in found for chart in section.charts for name in chart.names()}
    rest = [_plain(name) for name in names if name not in drawn]
    return [section for section in [*found, Section("Other metrics", rest, is_open=False)] if section.charts]


def _with_data(charts: Sequence[Chart], names: Sequence[str]) -> list[Chart]:
    return [chart for chart in charts if chart.metric in names or chart.held_out in names]


def _part(name: str, names: Sequence[str]) -> Chart:
    held_out = f"eval/reward/{name}"
    is_evaluated = held_out in names
    return Chart(f"Reward: {name}", PARTS + name, held_out if is_evaluated else None, about="mean, before its weight")


def _pass_at(names: Sequence[str]) -> list[Chart]:
    found = [name for name in names if name.startswith("eval/pass_at_")]
    return [
        Chart(f"pass@{name.removeprefix('eval/pass_at_')}", held_out=name, about="held-out prompts") for name in found
    ]


def _plain(name: str) -> Chart:
    return Chart(name, held_out=name) if name.startswith("eval/") else Chart(name, name)
