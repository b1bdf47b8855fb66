"""Base class of all recipe and shape sections."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen, strictly typed section: unknown fields are errors, and strings are not converted to numbers.

    The docstring below each field is its description in the JSON Schema, in editors and on the reference page.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)
