"""The rollout/ metrics that only conversations have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from trainer.distributed.world import World
from trainer.types import Conversation, Rollout


def conversation_metrics(rollouts: Sequence[Rollout], world: World) -> dict[str, float]:
    """Turns, sequences and tool calls per rollout, why rollouts ended, and how calls were; empty without conversations.

    Args:
        rollouts: of this rank.
        world: the ranks that sum; all of them have conversations, or none.
    """
    conversations = [each.conversation for each in rollouts if each.conversation is not None]
    if not conversations:
        return {}
    total = world.sum_by_name(_counts(conversations))
    num = total.pop("rollouts")
    return {f"rollout/{name}": value / num for name, value in sorted(total.items())}


def _counts(conversations: Sequence[Conversation]) -> dict[str, float]:
    counts: Counter[str] = Counter()
    for each in conversations:
        counts["rollouts"] += 1
        counts["turns"] += len(each.turns)
        counts["sequences"] += 1 + len(each.later)
        counts[f"stop/{each.stop}"] += 1
        for turn in each.turns:
            for call in turn.calls:
                counts[f"tool_calls/{call.status}"] += 1
    return {name: float(value) for name, value in counts.items()}
