"""Reinforcement fine-tuning: the loop."""

from __future__ import annotations

import time
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import final

from trainer.config.recipe import DataSource
from trainer.data.chat import ChatEncoder, load_tokenizer
from trainer.data.sources import read_rows
from trainer.errors import DataError
from trainer.model.policy import Reference
from trainer.planning.plan import RFTPlan
from trainer.rewards.row_checks import refuse_unscorable_rows
from trainer.rewards.runner import RewardRunner
from trainer.run.journal_upkeep import JournalUpkeep
from trainer.sampling import open_sampler
from trainer.sampling.colocated import rest
from trainer.training import policy_update
from trainer.training.ahead import rollout_source
from trainer.training.attempt import Attempt
from trainer.training.evaluate import EvaluationSettings, RewardEvaluation
from trainer.training.group_sampler import Prompt
from trainer.training.judge_calls import judge_metrics, open_judging
from trainer.training.memory_preflight import probe_memory, probe_sampling
from trainer.training.metrics import Values
from trainer.training.open_groups import make_prompt, open_groups
from trainer.training.refill_memory import open_memory
from trainer.training.rollouts import Rollouts, sampling_params, summarize


def train(attempt: Attempt, plan: RFTPlan) -> None:
    """Train from the newest checkpoint to the end.

    Raises:
        UserError: the rows, the model or the rewards are unusable.
        PreemptedError: a stop was requested; the state is saved.
    """
    recipe, rollout, world = plan.recipe, plan.recipe.rollout, attempt.world
    tokenizer = load_tokenizer(recipe.model)
    encoder = ChatEncoder(tokenizer, recipe.model, recipe.data, for_prompts=True)
    prompts = _prompts(attempt, plan, encoder, recipe.data.train, None)
    attempt.count_trained_rows(len(prompts))
    plan = plan.model_copy(update={"steps": attempt.plan.steps})
    held_out: list[Prompt] = []
    if recipe.data.eval is not None:
        held_out = _prompts(attempt, plan, encoder, recipe.data.eval, recipe.data.eval_rows)
    learner = attempt.open_learner()
    policy = learner.policy
    reference = Reference(
        policy, plan.algorithm.reference, is_fresh=recipe.lora is not None and recipe.lora.warm_start is None
    )
    memory = open_memory(rollout, attempt.saver, attempt.say)
    attempt.resume(learner)
    probe_memory(learner, plan, reference)
    with ExitStack() as stack:
        limits, judging = recipe.reward_limits, open_judging(attempt.run, world, attempt.stop, attempt.say)
        rewards = stack.enter_context(
            RewardRunner(
                recipe.reward_functions,
                base_dir=Path(plan.recipe_dir),
                num_workers=limits.num_workers,
                timeout_s=limits.timeout_s,
                memory_limit_gib=limits.memory_limit_gib,
                column=recipe.reward_column,
                judging=judging,
            )
        )
        sampler = stack.enter_context(
            open_sampler(plan, policy, tokenizer, world, server_log=attempt.server_log, say=attempt.say)
        )
        params = sampling_params(recipe, rollout, encoder.stop_ids)
        probe_sampling(sampler, params, plan, policy, world, attempt.run)
        groups = open_groups(stack, plan, encoder, sampler, params, rewards, attempt)
        rollouts = Rollouts(plan, prompts, groups, attempt.run, memory)
        keep_last = recipe.keep_last if world.is_main else None
        upkeep = stack.enter_context(closing(JournalUpkeep(attempt.run, keep_last, rollout.keep_steps, attempt.say)))
        source = stack.enter_context(
            rollout_source(rollouts, partial(sampler.publish, policy), plan.steps, attempt.say, partial(rest, sampler))
        )
        evaluation = RewardEvaluation(held_out, groups, EvaluationSettings.of(recipe))

        def evaluate() -> Values:
            sampler.publish(policy, attempt.step)
            return evaluation(attempt.run.evaluation(attempt.step))

        attempt.evaluate_at_start(learner, evaluate)
        while attempt.step < plan.steps:
            clock = Clock()
            with attempt.abandonable(learner):
                drawn = source.of_step(attempt.step)
                sampled_s = clock.lap()
                budget = policy.pack_limit(plan.shape.micro_batch_tokens)
                parts = policy_update.minibatches(drawn, plan, world.device, budget)
                update = policy_update.learn(learner, parts, reference, plan, attempt.step)
                learned_s = clock.lap()
                source.settle()
                sampled_s += clock.lap()
            values = {f"train/{name}": value for name, value in update.metrics.items()}
            values |= summarize(drawn, world) | source.measured(drawn)
            values |= {"perf/sample_s": sampled_s, "perf/learn_s": learned_s}
            values |= judge_metrics(recipe, judging, world)
            values |= attempt.performance(tokens=values["rollout/tokens"], step_s=clock.total())
            attempt.end_step(learner, values, evaluate, update.skipped_rows)
            upkeep.begin()
    attempt.finish(learner)


@final
class Clock:
    """Times the phases of a step, in seconds."""

    def __init__(self) -> None:
        """Start the clock."""
        self.begin = self.last = time.perf_counter()

    def lap(self) -> float:
        """Time since the previous lap."""
        now = time.perf_counter()
        lap, self.last = now - self.last, now
        return lap

    def total(self) -> float:
        """Time since the start."""
        return time.perf_counter() - self.begin


def _prompts(
    attempt: Attempt, plan: RFTPlan, encoder: ChatEncoder, source: DataSource, limit: int | None
) -> list[Prompt]:
    """The rows of a source, checked and encoded; `limit` keeps the first rows only.

    Raises:
        DataError: a row is no prompt or too long, or every row was dropped.
    """
    rows = read_rows(source, encoder.data, limit)
    refuse_unscorable_rows(plan.recipe.reward_functions, rows, plan.recipe.reward_column)
    made = [make_prompt(row, plan, encoder) for row in rows]
    prompts = [prompt for prompt in made if prompt is not None]
    num_dropped, name = len(made) - len(prompts), source.path or source.hub
    if num_dropped:
        limit_tokens = encoder.data.max_seq_tokens
        text = (
            f"{name}: {num_dropped:,} of {len(made):,} prompts are dropped (data.overlong): with "
            f"{plan.recipe.rollout.max_completion_tokens:,} tokens of a completion they exceed {limit_tokens:,} "
            "(data.max_seq_tokens)"
        )
        if not prompts:
            raise DataError(text)
        attempt.say(text)
    longest = max(len(prompt.token_ids) for prompt in prompts)
    attempt.say(f"{name}: {len(prompts):,} prompts, the longest of {longest:,} tokens")
    return prompts
