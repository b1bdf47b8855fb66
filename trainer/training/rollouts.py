"""The rollouts of a step: from the journal, or sampled and scored; refilled where groups are flat."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, TypeVar, final

from trainer.algorithms import group_advantages
from trainer.config.presets import ResolvedAlgorithm
from trainer.config.recipe import Recipe, RolloutSettings
from trainer.data.order import epoch_order, rows_of_step
from trainer.distributed.preemption import StopFlag
from trainer.distributed.world import World
from trainer.errors import PreemptedError, RewardError
from trainer.planning.plan import RFTPlan
from trainer.rewards.runner import RewardRunner, Scored, Scoring
from trainer.run.directory import RunDir
from trainer.run.journal import note_begun, read_chunk, set_aside, write_chunk
from trainer.sampling.sampler import Sampler, SampleRequest, SamplingParams
from trainer.types import Completion, Group, Rollout, Row

T = TypeVar("T")


@final
@dataclass(frozen=True)
class Prompt:
    """A row and its tokens up to where the model goes on."""

    row: Row
    token_ids: tuple[int, ...]


@final
@dataclass(frozen=True)
class StepRollouts:
    """The groups of a step on this rank, and what was spent on them."""

    groups: tuple[Group, ...]
    """To train on."""
    positions: tuple[int, ...]
    """Of each of `groups` among those of all ranks, in the order in which their rows were chosen."""
    sampled: tuple[Group, ...]
    """All that were sampled, those that refill replaced included."""
    num_replayed: int
    """Chunks that came from the journal."""


@final
@dataclass(frozen=True)
class _Draw:
    """A group to be drawn in a step."""

    prompt: Prompt
    earlier: int
    """Groups of the same row before it in the step, whose noise is another."""
    number: int
    """Among the groups of the step."""


@final
@dataclass(frozen=True)
class _Pending:
    """A chunk whose completions are being scored."""

    number: int
    draws: Sequence[_Draw]
    completions: list[list[Completion]]
    texts: list[list[str]]
    scoring: Scoring


@final
class Rollouts:
    """Samples and scores the groups of each step, chunk by chunk."""

    def __init__(
        self,
        plan: RFTPlan,
        prompts: Sequence[Prompt],
        sampler: Sampler,
        rewards: RewardRunner,
        run: RunDir,
        world: World,
        stop: StopFlag,
        params: SamplingParams,
    ) -> None:
        """Bring together what a step's rollouts need; `params` are those of training, their step is replaced."""
        self.recipe, self.settings, self.algorithm = plan.recipe, plan.recipe.rollout, plan.algorithm
        self.prompts, self.sampler, self.rewards = prompts, sampler, rewards
        self.run, self.world, self.stop, self.params = run, world, stop, params
        bad = world.from_main(run.read_excluded())
        self.excluded = {index for index, prompt in enumerate(prompts) if str(prompt.row) in bad}

    def of_step(self, step: int) -> StepRollouts:
        """The rollouts of a step on this rank.

        Raises:
            PreemptedError: asked to stop; chunks written so far are kept.
            RewardError: too many rollouts have no reward.
        """
        candidates = self._candidates(step)
        wanted, next_chunk, replayed = self.recipe.rows_per_step, 0, 0
        kept: dict[int, Group] = {}
        sampled: list[Group] = []
        rounds = 1 + (self.settings.max_refill_rounds if self.settings.refill else 0)
        for _ in range(rounds):
            chosen = list(islice(candidates, wanted))
            chunks = list(split_chunks(chosen, self.settings.chunk_prompts, self.world.size))
            groups, from_journal = self._round(step, next_chunk, chunks)
            next_chunk += len(chunks)
            replayed += from_journal
            sampled += groups
            mine = [draw.number for chunk in chunks[self.world.rank :: self.world.size] for draw in chunk]
            kept |= {
                number: group
                for number, group in zip(mine, groups, strict=True)
                if not (self.settings.refill and group.is_flat)
            }
            wanted = self.recipe.rows_per_step - int(self.world.sum_of([float(len(kept))])[0])
            if wanted <= 0 or not chosen:
                break
        self._refuse_failures(step, sampled)
        everywhere = sorted(number for numbers in self.world.gather(list(kept)) for number in numbers)
        positions = tuple(everywhere.index(number) for number in kept)
        return StepRollouts(tuple(kept.values()), positions, tuple(sampled), replayed)

    def _candidates(self, step: int) -> Iterator[_Draw]:
        """The step's own rows, then every other row in an order that is a function of (seed, step)."""
        own = rows_of_step(self.recipe.seed, step, self.recipe.rows_per_step, len(self.prompts), self.excluded)
        is_own = set(own) | self.excluded
        others = epoch_order(self.recipe.seed, -1 - step, len(self.prompts))
        seen: Counter[int] = Counter()
        for number, index in enumerate(chain(own, (index for index in others if index not in is_own))):
            yield _Draw(self.prompts[index], seen[index], number)
            seen[index] += 1

    def _round(self, step: int, first_chunk: int, chunks: Sequence[Sequence[_Draw]]) -> tuple[list[Group], int]:
        """Sample this rank's chunks; the rewards of one are computed while the next is sampled."""
        groups: list[Group] = []
        replayed = 0
        pending: _Pending | None = None
        for begin in range(0, len(chunks), self.world.size):
            place = begin + self.world.rank
            if place < len(chunks):
                number = first_chunk + place
                draws = chunks[place]
                rows = [draw.prompt.row for draw in draws]
                found = read_chunk(self.run, step, number, self._header(step, rows), rows)
                fresh = self._begin(step, number, draws) if found is None else None
                groups += self._finish(step, pending)
                pending = fresh
                if found is not None:
                    groups += found
                    replayed += 1
            if self.stop.agreed(self.world):
                self._finish(step, pending)
                raise PreemptedError(f"stopped while sampling step {step + 1}; what was sampled is kept")
        return groups + self._finish(step, pending), replayed

    def _begin(self, step: int, number: int, draws: Sequence[_Draw]) -> _Pending:
        note_begun(self.run, step, number)
        size = self.settings.group_size
        requests = [
            SampleRequest(draw.prompt.token_ids, draw.prompt.row.index, size, first_sample=draw.earlier * size)
            for draw in draws
        ]
        completions = self.sampler.sample(requests, self.params.at_step(step))
        texts = [[self.sampler.text_of(completion) for completion in group] for group in completions]
        items = [(text, draw.prompt.row) for draw, group in zip(draws, texts, strict=True) for text in group]
        return _Pending(number, draws, completions, texts, self.rewards.submit(items))

    def _finish(self, step: int, pending: _Pending | None) -> list[Group]:
        """Wait for the rewards of a chunk and write it down."""
        if pending is None:
            return []
        scores = iter(pending.scoring.result())
        groups = [
            Group(
                draw.prompt.row,
                tuple(
                    make_rollout(draw.prompt, completion, text, next(scores), self.algorithm)
                    for completion, text in zip(completions, texts, strict=True)
                ),
            )
            for draw, completions, texts in zip(pending.draws, pending.completions, pending.texts, strict=True)
        ]
        rewards = [[rollout.reward for rollout in group.rollouts] for group in groups]
        advantages = group_advantages(rewards, self.algorithm.advantage)
        header = self._header(step, [group.row for group in groups])
        write_chunk(self.run, step, pending.number, header, groups, advantages)
        return groups

    def _header(self, step: int, rows: Sequence[Row]) -> dict[str, Any]:
        return {
            "step": step,
            "rows": [row.index for row in rows],
            "group_size": self.settings.group_size,
            "world_size": self.world.size,
            # a resume may change the length, and with it learning rates and so the weights since the last checkpoint
            "length": [self.recipe.steps, self.recipe.epochs],
        }

    def _refuse_failures(self, step: int, groups: Sequence[Group]) -> None:
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        failures = [rollout.failure or "" for rollout in rollouts if rollout.reward is None]
        failed, total = self.world.sum_of([float(len(failures)), float(len(rollouts))])
        limit = self.recipe.reward_limits.max_failed_frac
        if failed > limit * total:
            first = next((text for texts in self.world.gather(failures[:1]) for text in texts), "")
            # a replay would fail again, also after the reward is mended
            aside = self.world.from_main(set_aside(self.run, step) if self.world.is_main else None)
            raise RewardError(
                f"{failed:.0f} of {total:.0f} rollouts have no reward, more than reward_limits.max_failed_frac "
                f"({limit:g}); they are in {aside}. The first:\n{first}"
            )


def make_rollout(
    prompt: Prompt, completion: Completion, text: str, scored: Scored, algorithm: ResolvedAlgorithm
) -> Rollout:
    """A single-turn rollout: the prompt's tokens, then one trained segment."""
    num_prompt = len(prompt.token_ids)
    is_punished = algorithm.overlong == "punish" and completion.finish_reason == "length" and scored.reward is not None
    return Rollout(
        token_ids=prompt.token_ids + completion.token_ids,
        trained=(False,) * num_prompt + (True,) * len(completion.token_ids),
        sampler_logprobs=(0.0,) * num_prompt + completion.logprobs,
        finish_reason=completion.finish_reason,
        policy_version=completion.policy_version,
        text=text,
        reward=algorithm.overlong_reward if is_punished else scored.reward,
        rewards=dict(scored.rewards),
        failure=scored.failure,
    )


def split_chunks(rows: Sequence[T], chunk_prompts: int, world_size: int) -> Iterator[Sequence[T]]:
    """Chunks of at most `chunk_prompts` rows, small enough that every rank gets one.

    >>> list(split_chunks([1, 2, 3, 4, 5], 2, 1)), list(split_chunks([1, 2, 3, 4], 8, 2))
    ([[1, 2], [3, 4], [5]], [[1, 2], [3, 4]])
    """
    size = max(1, min(chunk_prompts, -(-len(rows) // world_size)))
    for begin in range(0, len(rows), size):
        yield rows[begin : begin + size]


def sampling_params(recipe: Recipe, settings: RolloutSettings, stop_ids: frozenset[int]) -> SamplingParams:
    """How training rollouts are drawn."""
    return SamplingParams(
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        min_p=settings.min_p,
        max_completion_tokens=settings.max_completion_tokens,
        stop=tuple(settings.stop),
        stop_ids=stop_ids,
        seed=recipe.seed,
        step=0,
    )


def summarize(drawn: StepRollouts, world: World) -> dict[str, float]:
    """The rollout/ values of a step, over all ranks and everything that was sampled."""
    groups = drawn.sampled
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    scored = [rollout.reward for rollout in rollouts if rollout.reward is not None]
    names = sorted({name for rollout in rollouts for name in rollout.rewards})
    names = sorted({name for part in world.gather(names) for name in part})
    parts = {
        name: [value for rollout in rollouts if (value := rollout.rewards.get(name)) is not None] for name in names
    }
    sums = [
        float(len(groups)),
        float(len(rollouts)),
        float(len(scored)),
        math.fsum(scored),
        math.fsum(reward * reward for reward in scored),
        float(sum(sum(rollout.trained) for rollout in rollouts)),
        float(sum(len(rollout.token_ids) for rollout in rollouts)),
        float(sum(rollout.finish_reason == "length" for rollout in rollouts)),
        float(sum(group.is_flat for group in groups)),
        float(drawn.num_replayed),
        *(math.fsum(values) for values in parts.values()),
        *(float(len(values)) for values in parts.values()),
    ]
    total = iter(world.sum_of(sums))
    num_groups, num_rollouts, num_scored, reward, square, drawn_tokens, tokens, cut, flat, replayed = islice(total, 10)
    part_sums, part_counts = list(islice(total, len(names))), list(total)
    mean = reward / max(1.0, num_scored)
    values = {
        "rollout/reward": mean,
        "rollout/reward_std": math.sqrt(max(0.0, square / max(1.0, num_scored) - mean * mean)),
        "rollout/completion_tokens": drawn_tokens / num_rollouts,
        "rollout/truncated_frac": cut / num_rollouts,
        "rollout/flat_group_frac": flat / num_groups,
        "rollout/failed": num_rollouts - num_scored,
        "rollout/groups": num_groups,
        "rollout/tokens": tokens,
        "rollout/sampled_tokens": drawn_tokens,
        "perf/replayed_chunks": replayed,
    }
    for name, total_part, count in zip(names, part_sums, part_counts, strict=True):
        values[f"rollout/reward/{name}"] = total_part / max(1.0, count)
    return values
