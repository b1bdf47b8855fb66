"""Reinforcement fine-tuning: the loop."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

from trainer.config.recipe import DataSource
from trainer.data.chat import ChatEncoder, load_tokenizer
from trainer.data.sources import read_rows
from trainer.model.policy import Reference
from trainer.rewards.runner import RewardRunner
from trainer.sampling import make_sampler
from trainer.training import policy_update
from trainer.training.attempt import Session, Values
from trainer.training.evaluate import RewardEvaluation
from trainer.training.memory_preflight import probe_memory, probe_sampling
from trainer.training.rollouts import Prompt, Rollouts, sampling_params, summarize


def train(session: Session) -> None:
    """Train from the newest checkpoint to the end.

    Raises:
        UserError: rows, model or rewards cannot be trained with.
        PreemptedError: asked to stop; the state is saved.
    """
    plan, recipe, world = session.plan, session.plan.recipe, session.world
    rollout, algorithm = recipe.rollout, recipe.algorithm
    assert rollout is not None
    assert algorithm is not None
    tokenizer = load_tokenizer(recipe.model)
    encoder = ChatEncoder(tokenizer, recipe.model, recipe.data, for_prompts=True)
    prompts = _prompts(session, encoder, recipe.data.train, None)
    held_out = _prompts(session, encoder, recipe.data.eval, recipe.data.eval_rows) if recipe.data.eval else []
    learner = session.open_learner()
    policy = learner.policy
    is_fresh = recipe.lora is not None and recipe.lora.warm_start is None
    reference = Reference(policy, algorithm.reference, is_fresh=is_fresh)
    state = session.resume(learner)
    probe_memory(learner, plan, reference)
    with ExitStack() as stack:
        limits = recipe.reward_limits
        rewards = stack.enter_context(
            RewardRunner(
                recipe.rewards,
                base_dir=Path(plan.recipe_dir),
                num_workers=limits.num_workers,
                timeout_s=limits.timeout_s,
                memory_limit_gib=limits.memory_limit_gib,
            )
        )
        sampler = make_sampler(rollout, policy, tokenizer, world)
        params = sampling_params(recipe, rollout, encoder.stop_ids)
        probe_sampling(sampler, params, plan, policy, world)
        rollouts = Rollouts(recipe, prompts, sampler, rewards, session.run, world, session.stop, params)
        answer = RewardEvaluation(held_out, sampler, rewards, params, rollout.eval_samples, world, session.stop.moved)

        def evaluate() -> Values:
            sampler.publish(policy, state.step)
            return answer(session.run.evaluation(state.step))

        if state.step == 0 and session.saved_step is None and held_out:
            session.log.write(0, session.evaluated(learner, evaluate))
        while state.step < plan.steps:
            clock = Clock()
            with session.stoppable(state, learner):
                sampler.publish(policy, state.step)
                drawn = rollouts.of_step(state.step)
                sampled_s = clock.lap()
                parts = policy_update.minibatches(drawn, plan, world.device)
                learned = policy_update.learn(learner, parts, reference, plan, state.step)
            values = {f"train/{name}": value for name, value in learned.items()}
            values |= summarize(drawn, world) | {"perf/sample_s": sampled_s, "perf/learn_s": clock.lap()}
            values |= session.performance(tokens=values["rollout/tokens"], step_s=clock.total())
            state.step += 1
            session.after_step(state, learner, values, evaluate)
    session.finish(learner)


class Clock:
    """Seconds of the phases of a step."""

    def __init__(self) -> None:
        """Start."""
        self.begin = self.last = time.perf_counter()

    def lap(self) -> float:
        """Since the last lap."""
        now = time.perf_counter()
        lap, self.last = now - self.last, now
        return lap

    def total(self) -> float:
        """Since the start."""
        return time.perf_counter() - self.begin


def _prompts(session: Session, encoder: ChatEncoder, source: DataSource, limit: int | None) -> list[Prompt]:
    rows = read_rows(source, encoder.data, limit)
    rollout = session.plan.recipe.rollout
    room = rollout.max_completion_tokens if rollout is not None else 1
    prompts = [Prompt(row, encoder.encode_prompt(row, room)) for row in rows]
    longest = max(len(prompt.token_ids) for prompt in prompts)
    session.say(f"{source.path or source.hub}: {len(prompts):,} prompts, the longest of {longest:,} tokens")
    return prompts
