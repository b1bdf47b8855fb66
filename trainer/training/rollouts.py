"""The rollouts of a step: replayed from the journal, or sampled and scored; refilled if groups are flat."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import TypeVar, final

from trainer.algorithms import group_advantages
from trainer.config.presets import AdvantageEstimator
from trainer.config.recipe import RFTRecipe
from trainer.config.rft_sections import RolloutSettings
from trainer.data.order import epoch_order, rows_of_step
from trainer.distributed.world import World
from trainer.errors import PreemptedError, RewardError
from trainer.planning.identity import environment_digests
from trainer.planning.plan import RFTPlan
from trainer.run.directory import RunDir
from trainer.run.journal import ChunkHeader, note_begun, read_chunk, set_aside, write_chunk
from trainer.sampling.sampler import SamplingParams
from trainer.training.conversation_metrics import conversation_metrics
from trainer.training.group_sampler import GroupRequest, Groups, Pending, Prompt
from trainer.training.prompt_record import journal_prompt
from trainer.training.refill_memory import RefillMemory, spread
from trainer.types import Group, Rollout

T = TypeVar("T")


@final
@dataclass(frozen=True)
class StepRollouts:
    """The groups of a step on this rank, and the cost of sampling them."""

    groups: tuple[Group, ...]
    """To train on."""
    positions: tuple[int, ...]
    """Of each of `groups` among those of all ranks, in the order in which their rows were chosen."""
    sampled: tuple[Group, ...]
    """All groups that were sampled, including those that refill replaced."""
    num_replayed: int
    """Chunks that came from the journal."""


@final
@dataclass(frozen=True)
class Candidate:
    """A group that a step may draw."""

    request: GroupRequest
    position: int
    """Among the candidates of the step."""


@final
@dataclass(frozen=True)
class OpenChunk:
    """A chunk that was replayed, or whose rollouts are being scored."""

    number: int
    header: ChunkHeader
    recorded: Sequence[Group] | None
    """From the journal."""
    pending: Pending | None = None
    """Sampled now."""


@final
class Rollouts:
    """Samples and scores the groups of each step, chunk by chunk."""

    def __init__(
        self,
        plan: RFTPlan,
        prompts: Sequence[Prompt],
        sampler: Groups,
        run: RunDir,
        memory: RefillMemory | None = None,
    ) -> None:
        """Prepare to sample; nothing is drawn yet.

        Args:
            plan: rows per step, seed, rollout and algorithm settings.
            prompts: every row of the training data, by its index.
            sampler: draws and scores groups.
            run: where the journal is.
            memory: of earlier steps, which orders the prompts of `refill`; None: it begins here.
        """
        algorithm = plan.algorithm
        self.estimator = algorithm.advantage
        self.is_masked = algorithm.overlong == "mask"
        self.overlong_reward = algorithm.overlong_reward if algorithm.overlong == "punish" else None
        self.recipe, self.settings, self.prompts = plan.recipe, plan.recipe.rollout, prompts
        self.sampler, self.run = sampler, run
        self.memory = RefillMemory() if memory is None else memory
        self.environment = environment_digests(plan.recipe, Path(plan.recipe_dir)) or None
        self.world, self.stop = sampler.world, sampler.stop
        bad_sources = self.world.from_main(run.read_excluded())
        self.excluded = {index for index, prompt in enumerate(prompts) if str(prompt.row) in bad_sources}

    def of_step(self, step: int) -> StepRollouts:
        """The rollouts of a step on this rank.

        Raises:
            PreemptedError: a stop was requested; chunks written so far are kept.
            RewardError: too many rollouts have no reward.
        """
        candidates = self.candidates(step)
        num_wanted, next_chunk, num_replayed = self.recipe.rows_per_step, 0, 0
        kept: dict[int, Group] = {}
        sampled: list[Group] = []
        for _ in range(1 + (self.settings.max_refill_rounds if self.settings.refill else 0)):
            chosen = list(islice(candidates, num_wanted))
            chunks = list(split_chunks(chosen, self.settings.chunk_prompts, self.world.size))
            groups, from_journal = self._round(step, next_chunk, chunks)
            next_chunk += len(chunks)
            num_replayed += from_journal
            sampled += groups
            mine = [candidate.position for chunk in chunks[self.world.rank :: self.world.size] for candidate in chunk]
            kept |= {
                position: group
                for position, group in zip(mine, groups, strict=True)
                if not (self.settings.refill and group.is_flat)
            }
            num_wanted = self.recipe.rows_per_step - int(self.world.sum_of([float(len(kept))])[0])
            if num_wanted <= 0 or not chosen:
                break
        self.refuse_failures(step, sampled)
        everywhere = sorted(position for positions in self.world.gather(list(kept)) for position in positions)
        positions = tuple(everywhere.index(position) for position in kept)
        return StepRollouts(tuple(kept.values()), positions, tuple(sampled), num_replayed)

    def candidates(self, step: int) -> Iterator[Candidate]:
        """The step's own rows, then every other row: those first that are likely to have a signal.

        The order is a function of seed, step and what the memory holds of earlier steps.
        """
        own = rows_of_step(self.recipe.seed, step, self.recipe.rows_per_step, len(self.prompts), self.excluded)
        unavailable = set(own) | self.excluded
        size = self.settings.group_size
        num_earlier: Counter[int] = Counter()
        rows = chain(own, self._spare_rows(step, unavailable))
        for position, index in enumerate(rows):
            first_sample = num_earlier[index] * size  # a row that comes twice gets other noise the second time
            yield Candidate(GroupRequest(self.prompts[index], size, first_sample), position)
            num_earlier[index] += 1

    def _spare_rows(self, step: int, unavailable: Collection[int]) -> Iterator[int]:
        """Every other row; nothing is computed before the first one is asked for."""
        others = epoch_order(self.recipe.seed, -1 - step, len(self.prompts))
        places = {self.prompts[index].row.index: index for index in others if index not in unavailable}
        yield from map(places.__getitem__, self.memory.order(places))

    def remember(self, drawn: StepRollouts) -> None:
        """Take the rewards of a step into the memory that `refill` uses; after its updates, so that a retry is alike.

        Args:
            drawn: of a step, on this rank.
        """
        if self.settings.refill:
            mine = [(group.row.index, value) for group in drawn.sampled if (value := spread(group)) is not None]
            self.memory.observe(sorted(each for of_rank in self.world.gather(mine) for each in of_rank))

    def measured(self, drawn: StepRollouts) -> dict[str, float]:
        """With `refill`: the share of the drawn tokens whose rollouts have an advantage and are trained.

        Args:
            drawn: of a step, on this rank.
        """
        if not self.settings.refill:
            return {}
        teaching = sum(
            rollout.num_drawn
            for group in drawn.groups
            for rollout in group.rollouts
            if rollout.advantage and not (self.is_masked and rollout.finish_reason == "length")
        )
        every = sum(rollout.num_drawn for group in drawn.sampled for rollout in group.rollouts)
        total, sampled = self.world.sum_of([float(teaching), float(every)])
        return {"rollout/gradient_token_frac": total / max(1.0, sampled)}

    def _round(self, step: int, first_chunk: int, chunks: Sequence[Sequence[Candidate]]) -> tuple[list[Group], int]:
        """Replay or sample this rank's chunks; one chunk is scored while the next is sampled.

        Returns:
            The groups in order, and how many chunks were replayed.
        """
        groups: list[Group] = []
        num_replayed = 0
        unfinished: OpenChunk | None = None
        for begin in range(0, len(chunks), self.world.size):
            index = begin + self.world.rank
            if index < len(chunks):
                chunk = self.open_chunk(step, first_chunk + index, [candidate.request for candidate in chunks[index]])
                groups += self.close_chunk(unfinished)
                unfinished = chunk
                num_replayed += chunk.recorded is not None
            if self.stop.agreed(self.world):
                self.close_chunk(unfinished)
                raise PreemptedError(f"stopped while sampling step {step + 1}; what was sampled is kept")
        return groups + self.close_chunk(unfinished), num_replayed

    def open_chunk(self, step: int, number: int, requests: Sequence[GroupRequest]) -> OpenChunk:
        """Replay a chunk, or sample it and start to score it.

        Args:
            step: that trains on it, from 0.
            number: of the chunk in the step.
            requests: its groups.
        """
        header = self._header(step, requests)
        recorded = read_chunk(self.run, number, header, [request.prompt.row for request in requests])
        if recorded is not None:
            return OpenChunk(number, header, recorded)
        note_begun(self.run, header.step, number)
        return OpenChunk(number, header, None, self.sampler.submit(requests, self.sampler.params.at_step(header.step)))

    def close_chunk(self, chunk: OpenChunk | None) -> list[Group]:
        """The groups of a chunk; of a sampled one wait for the rewards, compute advantages and write the journal."""
        if chunk is None:
            return []
        if chunk.recorded is not None:
            return list(chunk.recorded)
        assert chunk.pending is not None
        groups = chunk.pending.result()
        if self.overlong_reward is not None:
            groups = [penalize_overlong(group, self.overlong_reward) for group in groups]
        groups = [with_advantages(group, self.estimator) for group in groups]
        prompts = [journal_prompt(group.row, self.recipe.data, group.rollouts[0].conversation) for group in groups]
        write_chunk(self.run, chunk.number, chunk.header, groups, prompts)
        return groups

    def _header(self, step: int, requests: Sequence[GroupRequest]) -> ChunkHeader:
        return ChunkHeader(
            step=step,
            rows=tuple(request.prompt.row.index for request in requests),
            group_size=self.settings.group_size,
            world_size=self.world.size,
            length=(self.recipe.steps, self.recipe.epochs),
            environment=self.environment,
        )

    def refuse_failures(self, step: int, groups: Sequence[Group]) -> None:
        """Refuse a step of which too many rollouts have no reward.

        Raises:
            RewardError: with the first failure.
        """
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        failures = [rollout.failure or "" for rollout in rollouts if rollout.reward is None]
        num_failed, total = self.world.sum_of([float(len(failures)), float(len(rollouts))])
        limit = self.recipe.reward_limits.max_failed_frac
        if num_failed > limit * total:
            first = next((text for texts in self.world.gather(failures[:1]) for text in texts), "")
            # a replay would fail again, even with a corrected reward function
            aside = self.world.from_main(set_aside(self.run, step) if self.world.is_main else None)
            raise RewardError(
                f"{num_failed:.0f} of {total:.0f} rollouts have no reward, more than reward_limits.max_failed_frac "
                f"({limit:g}); they are in {aside}. The first:\n{first}"
            )


def penalize_overlong(group: Group, reward: float) -> Group:
    """Replace the reward of every completion that hit the token limit; a failed one keeps none."""

    def penalized(rollout: Rollout) -> Rollout:
        is_overlong = rollout.finish_reason == "length" and rollout.reward is not None
        return replace(rollout, reward=reward) if is_overlong else rollout

    return replace(group, rollouts=tuple(map(penalized, group.rollouts)))


def with_advantages(group: Group, estimator: AdvantageEstimator) -> Group:
    """The group with the advantage of each rollout."""
    (advantages,) = group_advantages([[rollout.reward for rollout in group.rollouts]], estimator)
    rollouts = zip(group.rollouts, advantages, strict=True)
    return replace(group, rollouts=tuple(replace(rollout, advantage=advantage) for rollout, advantage in rollouts))


def split_chunks(rows: Sequence[T], chunk_prompts: int, world_size: int) -> Iterator[Sequence[T]]:
    """Chunks of at most `chunk_prompts` rows, small enough that every rank gets one.

    >>> list(split_chunks([1, 2, 3, 4, 5], 2, 1)), list(split_chunks([1, 2, 3, 4], 8, 2))
    ([[1, 2], [3, 4], [5]], [[1, 2], [3, 4]])

    Args:
        rows: to split, in order.
        chunk_prompts: largest size of a chunk.
        world_size: number of ranks.
    """
    size = max(1, min(chunk_prompts, -(-len(rows) // world_size)))
    for begin in range(0, len(rows), size):
        yield rows[begin : begin + size]


def sampling_params(recipe: RFTRecipe, settings: RolloutSettings, stop_ids: frozenset[int]) -> SamplingParams:
    """How training rollouts are sampled, at step 0.

    Args:
        recipe: of the run; its seed selects the noise.
        settings: the recipe's `rollout` section.
        stop_ids: token ids that end a completion.
    """
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
    """The rollout/ metrics of a step, over all ranks and all sampled groups."""
    rollouts = [rollout for group in drawn.sampled for rollout in group.rollouts]
    rewards = [rollout.reward for rollout in rollouts if rollout.reward is not None]
    total = world.sum_by_name(
        {
            "groups": len(drawn.sampled),
            "flat_groups": sum(group.is_flat for group in drawn.sampled),
            "rollouts": len(rollouts),
            "scored": len(rewards),
            "reward": math.fsum(rewards),
            "squared_reward": math.fsum(reward * reward for reward in rewards),
            "drawn_tokens": sum(rollout.num_drawn for rollout in rollouts),
            "tokens": sum(rollout.num_tokens for rollout in rollouts),
            "truncated": sum(rollout.finish_reason == "length" for rollout in rollouts),
            "replayed_chunks": drawn.num_replayed,
        }
    )
    mean = total["reward"] / max(1.0, total["scored"])
    return {
        "rollout/reward": mean,
        "rollout/reward_std": math.sqrt(max(0.0, total["squared_reward"] / max(1.0, total["scored"]) - mean * mean)),
        "rollout/completion_tokens": total["drawn_tokens"] / total["rollouts"],
        "rollout/truncated_frac": total["truncated"] / total["rollouts"],
        "rollout/flat_group_frac": total["flat_groups"] / total["groups"],
        "rollout/failed": total["rollouts"] - total["scored"],
        "rollout/groups": total["groups"],
        "rollout/tokens": total["tokens"],
        "rollout/sampled_tokens": total["drawn_tokens"],
        "perf/replayed_chunks": total["replayed_chunks"],
        **{f"rollout/reward/{name}": value for name, value in _mean_rewards(rollouts, world).items()},
        **conversation_metrics(rollouts, world),
    }


def _mean_rewards(rollouts: Sequence[Rollout], world: World) -> dict[str, float]:
    """Mean of each reward by name, over the rollouts of all ranks on which it did not abstain or fail."""
    names = {name for rollout in rollouts for name in rollout.rewards}
    values = {name: [value for each in rollouts if (value := each.rewards.get(name)) is not None] for name in names}
    sums = world.sum_by_name({name: math.fsum(given) for name, given in values.items()})
    counts = world.sum_by_name({name: len(given) for name, given in values.items()})
    return {name: value / max(1.0, counts[name]) for name, value in sums.items()}
