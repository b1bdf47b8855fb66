"""Opens what draws a run's groups: single completions, or conversations with an environment or tools."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from trainer.config.rft_sections import VerifiersEnvironment
from trainer.data.chat import ChatEncoder
from trainer.data.next_prompt import PromptWriter
from trainer.environments.mcp_tools import McpSettings
from trainer.environments.pool import EnvironmentPool, EnvironmentSettings
from trainer.environments.tool_calls import same_turn
from trainer.errors import DataError
from trainer.planning.plan import RFTPlan
from trainer.rewards.runner import RewardRunner
from trainer.sampling.sampler import Sampler, SamplingParams
from trainer.training.attempt import Attempt
from trainer.training.conversations import ConversationSampler
from trainer.training.group_sampler import Groups, GroupSampler, Prompt
from trainer.training.live_rollout import CONVERSATION
from trainer.training.tool_template import refuse_template_without_tools
from trainer.types import Row


def open_groups(
    stack: ExitStack,
    plan: RFTPlan,
    encoder: ChatEncoder,
    sampler: Sampler,
    params: SamplingParams,
    rewards: RewardRunner,
    attempt: Attempt,
) -> Groups:
    """What draws and scores groups, as the recipe's `rollout` section says.

    Args:
        stack: closes environments at the end of the run.
        plan: of the run.
        encoder: has the chat template.
        sampler: draws completions.
        params: of training.
        rewards: started.
        attempt: has the ranks, the flag that stops the run, and `say`.

    Raises:
        RewardError: environment or tools cannot be loaded.
        ModelError: the chat template shows no tools.
    """
    settings = plan.recipe.rollout
    if not settings.has_turns:
        return GroupSampler(sampler, rewards, params, attempt.world, attempt.stop)
    pool = stack.enter_context(EnvironmentPool(environment_settings(plan), attempt.say))
    assert encoder.template is not None, "recipes with prompts have `format: chat`"
    if pool.schemas:
        refuse_template_without_tools(encoder.template, plan.recipe.data.chat_template_kwargs)
    writer = PromptWriter(
        encoder.tokenizer, encoder.template, encoder.stop_ids, plan.recipe.data.chat_template_kwargs, same_turn
    )
    return ConversationSampler(sampler, rewards, params, attempt.world, attempt.stop, pool, writer, plan)


def environment_settings(plan: RFTPlan) -> EnvironmentSettings:
    """What the plan's environments load, and their limits."""
    settings = plan.recipe.rollout
    limits = settings.environment_limits
    named: str | dict[str, Any] | None
    python = None
    if isinstance(settings.environment, VerifiersEnvironment):
        taskset = settings.environment
        python = shutil.which(taskset.python) or taskset.python
        named = {"verifiers": taskset.verifiers, "config": taskset.config, "max_turns": settings.max_turns}
    else:
        named = settings.environment
    return EnvironmentSettings(
        environment=named,
        python=python,
        tools=settings.functions,
        servers=tuple(McpSettings(each.command, tuple(each.only), each.env) for each in settings.servers),
        errors=settings.tool_errors.model_dump(),
        base_dir=Path(plan.recipe_dir),
        timeout_s=limits.timeout_s,
        memory_limit_gib=limits.memory_limit_gib,
        num_workers=limits.num_workers,
        deterministic=settings.deterministic,
    )


def make_prompt(row: Row, plan: RFTPlan, encoder: ChatEncoder) -> Prompt | None:
    """The prompt of a row; with an environment or tools it is written when the rollout begins.

    Returns:
        None for a row that is too long where data.overlong is drop.

    Raises:
        DataError: the row is no prompt.
    """
    settings = plan.recipe.rollout
    if settings.has_turns and CONVERSATION in row:
        raise DataError(f"{row}: the field `{CONVERSATION}` is where rewards find a rollout's messages; rename it")
    if settings.environment is not None:
        return Prompt(row, ())
    ids = encoder.kept_prompt(row, settings.max_completion_tokens)
    return Prompt(row, ids, encoder.prefilled(ids)) if ids is not None else None
