"""Plays an environment with policies that need no model: gold answers, garbage, silence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, final

from trainer.environments.pool import EnvironmentDiedError, EnvironmentPool
from trainer.environments.tool_calls import parse_turn
from trainer.errors import RewardError
from trainer.rewards.dry_run import gold_answer
from trainer.types import Row

GARBAGE: Final = "zq 17 } <tool_call>{'name': 3}</tool_call>"
MAX_TURNS_SHOWN: Final = 3
NUM_ROWS: Final = 8
Messages = Sequence[Mapping[str, Any]]


@final
@dataclass(frozen=True)
class Played:
    """One policy's rollouts."""

    policy: str
    rewards: tuple[float, ...]
    """Of the rollouts to which the environment gave one."""
    stops: Mapping[str, int]
    failures: tuple[str, ...]
    num_turns: int

    def line(self) -> str:
        """For `trainer check --rewards`."""
        mean = f"mean reward {sum(self.rewards) / len(self.rewards):.3f}" if self.rewards else "no reward"
        ends = ", ".join(f"{name} {count}" for name, count in sorted(self.stops.items()))
        return f"  {self.policy:8} {mean}, {self.num_turns} turns, ended: {ends}"


def play_trials(
    pool: EnvironmentPool,
    rows: Sequence[Row],
    prompts: Callable[[Row], Messages],
    *,
    max_turns: int,
    has_rewards: bool,
) -> list[str]:
    """Play the first rows with each policy; returns lines to print.

    Args:
        pool: started.
        rows: of the training data.
        prompts: the row's own messages, used where there is no environment.
        max_turns: of a rollout.
        has_rewards: whether the recipe has an environment, whose rewards are compared.

    Raises:
        RewardError: the environment died on every row, or gold answers earn less than garbage.
    """
    tried = list(rows[:NUM_ROWS])
    policies: dict[str, Callable[[Row], str | None]] = {
        "gold": gold_answer,
        "garbage": lambda _row: GARBAGE,
        "silent": lambda _row: "",
    }
    played = []
    for name, answer in policies.items():
        answers = [(row, text) for row in tried if (text := answer(row)) is not None]
        if answers:
            played.append(_play(pool, name, answers, prompts, max_turns))
    lines = ["environment and tools, played on the first rows:", *(each.line() for each in played)]
    lines += [f"    {failure.splitlines()[-1]}" for each in played for failure in each.failures[:MAX_TURNS_SHOWN]]
    if not any(each.policy == "gold" for each in played):
        lines.append("  no row has a gold answer (a field such as `answer`), so only garbage and silence were tried")
    if all(len(each.failures) == sum(each.stops.values()) for each in played):
        raise RewardError("the environment died in every rollout. The first:\n" + played[0].failures[0])
    if has_rewards:
        _refuse_inverted({each.policy: each.rewards for each in played})
    return lines


def _refuse_inverted(rewards: Mapping[str, Sequence[float]]) -> None:
    gold, garbage = rewards.get("gold"), rewards.get("garbage")
    if gold and garbage and sum(gold) / len(gold) < sum(garbage) / len(garbage):
        raise RewardError("environment: gold answers earn less than garbage; correct the environment or the rows")


def _play(
    pool: EnvironmentPool,
    name: str,
    answers: Sequence[tuple[Row, str]],
    prompts: Callable[[Row], Messages],
    max_turns: int,
) -> Played:
    results = pool.map(lambda pair: _rollout(pool, pair[0], pair[1], prompts(pair[0]), max_turns), answers)
    return Played(
        name,
        tuple(reward for reward, *_ in results if reward is not None),
        Counter(stop for _, stop, _, _ in results),
        tuple(failure for _, _, failure, _ in results if failure is not None),
        sum(turns for *_, turns in results),
    )


def _rollout(
    pool: EnvironmentPool, row: Row, text: str, messages: Messages, max_turns: int
) -> tuple[float | None, str, str | None, int]:
    """Reward, stop, failure and number of turns of a rollout whose every turn is `text`."""
    remote = pool.open()
    reward: float | None = None
    parsed = parse_turn(text)
    number = 0
    try:
        remote.reset(row, messages, seed=row.index)
        for number in range(max_turns):
            turn = {"number": number, "text": text, "message": parsed.message, "finish": "stop"}
            observed = remote.step(turn | {"calls": [asdict(call) for call in parsed.calls]})
            if observed["reward"] is not None:
                reward = (reward or 0.0) + observed["reward"]
            if observed["done"]:
                return reward, "done", None, number + 1
    except EnvironmentDiedError as error:
        return None, "environment_died", f"{row}: {error}", number
    finally:
        remote.close()
    return reward, "max_turns", None, max_turns
