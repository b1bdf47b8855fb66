"""Groups of rollouts with several turns: the policy and its environments.

In process, in rounds: a round draws the next turn of every rollout that is not finished, in the order of the rollouts,
as one batch. Which rollouts are in a batch thus depends on tokens and observations only, never on how long an
environment took. On servers, which batch by themselves, a rollout goes on as soon as its own environment has answered.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any, final

from trainer.config.rft_sections import ENVIRONMENT_REWARD, RewardSpec, RolloutSettings
from trainer.data.forms import read_conversation
from trainer.data.next_prompt import PromptWriter, TokenizedPrompt
from trainer.distributed.preemption import StopFlag
from trainer.distributed.world import World
from trainer.environments.pool import EnvironmentDiedError, EnvironmentPool
from trainer.environments.tool_calls import ParsedTurn, parse_turn
from trainer.errors import DataError
from trainer.planning.plan import RFTPlan
from trainer.rewards.call_result import CallResult
from trainer.rewards.runner import RewardRunner, Scored, Scoring, weigh
from trainer.sampling.sampler import MAX_CONCURRENT, Sampler, SamplingParams
from trainer.training.group_sampler import GroupRequest, scored_groups
from trainer.training.live_rollout import LiveRollout, SequenceInProgress
from trainer.training.tool_template import refuse_template_without_tools
from trainer.types import Group, ToolCall


@final
@dataclass(frozen=True)
class PendingConversations:
    """Finished rollouts whose reward functions are being computed."""

    groups: tuple[Group, ...]
    results: tuple[CallResult, ...]
    """What the environment gave each rollout."""
    specs: tuple[RewardSpec, ...]
    """Of the environment's own reward, then those of the functions."""
    scoring: Scoring

    def result(self) -> list[Group]:
        """Wait for the rewards; returns the groups with them."""
        functions = self.scoring.call_results() if len(self.specs) > 1 else [[] for _ in self.results]
        scores = (
            Scored(None, failure=own.failure) if own.failure is not None else weigh(self.specs, [own, *of_item])
            for own, of_item in zip(self.results, functions, strict=True)
        )
        return scored_groups(self.groups, scores)


@final
@dataclass(frozen=True)
class ConversationSampler:
    """Draws groups with an environment or tools; in place of `GroupSampler`."""

    sampler: Sampler
    rewards: RewardRunner
    params: SamplingParams
    world: World
    stop: StopFlag
    pool: EnvironmentPool
    writer: PromptWriter
    plan: RFTPlan

    @property
    def settings(self) -> RolloutSettings:
        """The recipe's `rollout` section."""
        return self.plan.recipe.rollout

    @property
    def max_tokens(self) -> int:
        """Most tokens of a rollout, over all of its sequences."""
        return min(
            self.settings.max_tokens or self.plan.recipe.data.max_seq_tokens, self.plan.recipe.data.max_seq_tokens
        )

    def submit(self, requests: Sequence[GroupRequest], params: SamplingParams) -> PendingConversations:
        """Play the rollouts of groups to their ends and start to score them.

        Args:
            requests: one per group.
            params: how to sample them.
        """
        lives = [
            LiveRollout(request.prompt.row, request.first_sample + number, self.pool.open())
            for request in requests
            for number in range(request.num_samples)
        ]
        try:
            self.pool.map(lambda live: self._reset(live, params), lives)
            for live in lives:
                self._begin(live)
            play = self._play_apart if self.sampler.draws_apart else self._play_in_rounds
            play(lives, params)
            if self.pool.compares_groups:
                ends = iter(lives)
                self.pool.map(self._compare, [[next(ends) for _ in range(each.num_samples)] for each in requests])
            return self._finish(requests, lives)
        finally:
            self.pool.map(lambda live: live.remote.close(), lives)

    def _play_in_rounds(self, lives: Sequence[LiveRollout], params: SamplingParams) -> None:
        """Play all rollouts turn by turn; a round ends with its slowest environment."""
        turn = 0
        while current := [live for live in lives if live.stop is None]:
            self._round(current, params, turn)
            self.stop.moved()
            turn += 1

    def _play_apart(self, lives: Sequence[LiveRollout], params: SamplingParams) -> None:
        """Play each rollout by itself; at most `MAX_CONCURRENT` at a time."""
        has_failed = threading.Event()

        def play(live: LiveRollout) -> None:
            turn = 0
            while live.stop is None and not has_failed.is_set():
                try:
                    self._round([live], params, turn)
                except BaseException:
                    has_failed.set()  # the others end with their turn
                    raise
                self.stop.moved()
                turn += 1

        with ThreadPoolExecutor(max(1, min(len(lives), MAX_CONCURRENT)), thread_name_prefix="rollout") as threads:
            list(threads.map(play, lives))

    def _reset(self, live: LiveRollout, params: SamplingParams) -> None:
        messages: Sequence[Mapping[str, Any]] = ()
        if self.settings.environment is None:
            messages = read_conversation(live.row, self.plan.recipe.data, with_completion=False).messages
        try:
            start = live.remote.reset(live.row, messages, rollout_seed(params, live.row.index, live.sample))
        except EnvironmentDiedError as error:
            live.die(error)
            return
        live.messages, live.tools = list(start["messages"]), tuple(start["tools"])
        live.num_prompt = len(live.messages)

    def _begin(self, live: LiveRollout) -> None:
        if live.stop is None:
            if live.tools:  # of the recipe, or of the environment's `Start`
                refuse_template_without_tools(self.writer.template, self.writer.arguments)
            prompt = self._prompt(live)
            if prompt is None:
                return
            self._new_sequence(live, prompt)
            if not self._has_room(live):
                live.die(
                    f"the first prompt has {live.num_tokens:,} tokens and a turn may have "
                    f"{self.settings.max_completion_tokens:,}; a rollout may have {self.max_tokens:,} "
                    "(rollout.max_tokens, data.max_seq_tokens)"
                )

    def _prompt(self, live: LiveRollout) -> TokenizedPrompt | None:
        """The prompt of the next turn; None, and a failed rollout, where the chat template refuses the messages."""
        try:
            return self.writer.first(live.messages, live.tools, str(live.row))
        except DataError as error:
            live.die(error)
            return None

    def _new_sequence(self, live: LiveRollout, prompt: TokenizedPrompt) -> None:
        live.prompt_text = prompt.text
        live.sequences.append(SequenceInProgress(list(prompt.token_ids), [False] * len(prompt.token_ids)))

    def _has_room(self, live: LiveRollout) -> bool:
        return live.num_tokens + self.settings.max_completion_tokens <= self.max_tokens

    def _round(self, lives: Sequence[LiveRollout], params: SamplingParams, turn: int) -> None:
        """Draw one turn of each rollout, and let its environment answer."""
        drawn = self.sampler.sample([live.request(turn) for live in lives], params)
        for live, (completion,) in zip(lives, drawn, strict=True):
            live.take(completion, turn)
            live.parsed = self._parsed(live)
            live.messages.append(live.parsed.message)
        observed = self.pool.map(lambda live: self._observe(live), lives)
        for live, observation in zip(lives, observed, strict=True):
            if observation is not None:
                self._continue(live, *observation)
            if live.stop is not None:
                live.cache.clear()

    def _parsed(self, live: LiveRollout) -> ParsedTurn:
        """The last turn; where no tools were offered, all of it is text."""
        text = live.prefilled + self.writer.raw_text(live.drawn)
        return parse_turn(text) if live.tools else ParsedTurn({"role": "assistant", "content": text})

    def _observe(self, live: LiveRollout) -> tuple[dict[str, Any], float] | None:
        span = live.turns[-1]
        if span.finish == "length":
            live.stop = "length"
            return None
        parsed = live.parsed
        wire = {
            "number": span.number,
            "text": live.text,
            "message": parsed.message,
            "finish": span.finish,
            "calls": [asdict(call) for call in parsed.calls],
        }
        begin = time.monotonic()
        try:
            return live.remote.step(wire), time.monotonic() - begin
        except EnvironmentDiedError as error:
            live.die(error)
            return None

    def _continue(self, live: LiveRollout, observation: Mapping[str, Any], seconds: float) -> None:
        """Record an observation, and write the next prompt or end the rollout."""
        calls = tuple(ToolCall(**call) for call in observation["calls"])
        reward = observation["reward"]
        live.turns[-1] = replace(
            live.turns[-1], reward=reward, calls=calls, info=observation["info"], seconds=round(seconds, 4)
        )
        if reward is not None:
            live.reward = (live.reward or 0.0) + reward
        for name, value in observation["parts"].items():
            live.parts[name] = live.parts.get(name, 0.0) + value
        live.messages += observation["messages"]
        limit = self.settings.max_time_s
        if observation["done"]:
            live.stop = "done"
        elif len(live.turns) >= self.settings.max_turns:
            live.stop = "max_turns"
        elif limit is not None and time.monotonic() - live.began > limit:
            live.stop = "time"
        else:
            self._extend(live)

    def _extend(self, live: LiveRollout) -> None:
        prompt = self._prompt(live)
        if prompt is None:
            return
        tail = self.writer.tail(live.prompt_text, live.drawn, prompt.text)
        if tail is None:
            self._new_sequence(live, prompt)
        else:
            live.sequences[-1].extend(tail, drawn=False)
            live.prompt_text = prompt.text
        if not self._has_room(live):
            live.forget_undrawn()
            live.stop = "max_tokens"

    def _compare(self, group: Sequence[LiveRollout]) -> None:
        """Add the environment's `group_rewards` to the rollouts of a group; if it dies, they all fail."""
        alive = [live for live in group if live.failure is None]
        if not alive:
            return
        remote = self.pool.open()
        try:
            values = remote.compare([live.compared() for live in alive])
        except EnvironmentDiedError as error:
            for live in alive:
                live.failure = f"environment on {live.row}: {error}"
            return
        finally:
            remote.close()
        for live, value in zip(alive, values, strict=True):
            if value is not None:
                live.reward = (live.reward or 0.0) + value
                live.parts["group"] = value

    def _finish(self, requests: Sequence[GroupRequest], lives: Sequence[LiveRollout]) -> PendingConversations:
        remaining = iter(lives)
        groups, results = [], []
        for request in requests:
            of_group = [next(remaining) for _ in range(request.num_samples)]
            groups.append(Group(request.prompt.row, tuple(live.rollout() for live in of_group)))
            results += [self._own_result(live) for live in of_group]
        recipe = self.plan.recipe
        named = [spec for spec in recipe.rewards if spec.use == ENVIRONMENT_REWARD]
        own = named[0] if named else RewardSpec(use=ENVIRONMENT_REWARD)
        judged = [live.judged() for live in lives]
        scoring = self.rewards.submit(judged, [len(group.rollouts) for group in groups])
        return PendingConversations(tuple(groups), tuple(results), (own, *recipe.reward_functions), scoring)

    def _own_result(self, live: LiveRollout) -> CallResult:
        """The environment's reward. A rollout that ended before it gave one earned 0, else it would be left out."""
        is_cut = self.settings.environment is not None and live.stop not in ("done", "environment_died")
        reward = 0.0 if live.reward is None and is_cut else live.reward
        return CallResult(reward, live.parts, failure=live.failure)


def rollout_seed(params: SamplingParams, row: int, sample: int) -> int:
    """The seed of a rollout's environment.

    >>> class Params: seed, step = 0, 3
    >>> rollout_seed(Params, 7, 0) != rollout_seed(Params, 7, 1)
    True

    Args:
        params: with the run's seed and the step.
        row: index of the row.
        sample: index of the rollout among those of its row and step.
    """
    text = f"environment:{params.seed}:{params.step}:{row}:{sample}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())
