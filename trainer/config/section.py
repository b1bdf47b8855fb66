"""The base of every recipe and shape section."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Frozen, typed and closed: an unknown field is a mistake, a string is never taken for a number.

    The docstring under each field is its description in the JSON Schema, in editors and in the reference page.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)
