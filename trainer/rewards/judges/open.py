"""Makes the judges of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from trainer.errors import RewardError
from trainer.rewards.judges.protocol import Judge, Surroundings


@final
@dataclass(frozen=True)
class Judging:
    """What judges have of the run."""

    cache: Path | None = None
    """Where `cache: true` keeps answers; None keeps them in memory."""
    around: Surroundings = field(default_factory=Surroundings)

    def open(self, name: str, use: str, args: Mapping[str, Any], base_dir: Path) -> Judge:
        """The judge that a recipe names.

        Args:
            name: of the reward.
            use: `llm_judge` or `http_reward`.
            args: of the recipe.
            base_dir: the recipe's directory.

        Raises:
            RewardError: the arguments are wrong, or the environment variable of the key is not set.
        """
        # imported here, since httpx, pydantic and jsonschema would slow every reward worker down
        from trainer.config.judge_settings import HTTPRewardSettings, LLMJudgeSettings, judge_findings, judge_settings
        from trainer.rewards.judges.cache import AnswerCache
        from trainer.rewards.judges.http_reward import HTTPReward
        from trainer.rewards.judges.llm_judge import LLMJudge

        problems = [finding for finding in judge_findings(use, args, base_dir) if finding.is_error]
        if problems:
            text = "\n".join(f"args.{'.'.join(map(str, each.path))}: {each.text}" for each in problems)
            raise RewardError(f"reward {name}: {text}")
        settings, _ = judge_settings(use, args)
        if isinstance(settings, HTTPRewardSettings):
            return HTTPReward(name, settings, self.around)
        assert isinstance(settings, LLMJudgeSettings)
        rubric = settings.rubric
        if settings.rubric_file is not None:
            rubric = (base_dir / settings.rubric_file).read_text(encoding="utf-8")
        assert rubric is not None, "judge_findings refuses a judge without rubric"
        directory = Path(settings.cache) if isinstance(settings.cache, str) else self.cache if settings.cache else None
        return LLMJudge(name, settings, rubric, AnswerCache(directory), self.around)
