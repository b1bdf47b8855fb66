"""Plans of recipes that are written in a test, without a recipe file."""

from __future__ import annotations

from typing import Any

from trainer.config.document import Document
from trainer.config.load import LoadedRecipe
from trainer.config.recipe import RFTRecipe
from trainer.planning.plan import RFTPlan, make_plan


def rft_plan(recipe: RFTRecipe, **changes: Any) -> RFTPlan:
    """Return the plan of a run of 10 steps on one CPU; `changes` replace its fields, for example `shape`."""
    ten_steps = recipe.model_copy(update={"steps": 10, "epochs": None})  # there are no rows to count
    plan = make_plan(LoadedRecipe(ten_steps, Document("recipe.yaml", {}, {}), ()), "cpu")
    assert isinstance(plan, RFTPlan)
    return plan.model_copy(update={"recipe": recipe, **changes})
