"""Reward structured output: JSON that keeps a schema."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import jsonschema

from trainer.rewards.contract import Score
from trainer.types import Row

MAX_ATTEMPTS: Final = 64
"""Opening braces at which an object is tried; text of nothing but braces must not take for ever."""


def json_schema(
    completion: str,
    row: Row,
    *,
    schema: Mapping[str, Any] | None = None,
    field: str = "schema",
    expected_field: str | None = None,
) -> Score:
    """1.0 if the first JSON object in the completion keeps the schema, else 0.0.

    >>> schema = {"type": "object", "required": ["age"], "properties": {"age": {"type": "integer"}}}
    >>> json_schema('Here: {"age": 7}', {"schema": schema}).value
    1.0
    >>> json_schema('{"age": "seven"}', {"schema": schema}).value
    0.0

    With `expected_field` the schema is worth one half and the fields equal to the expected object's the other half:

    >>> row = {"schema": schema, "object": {"age": 7, "name": "Ann"}}
    >>> json_schema('{"age": 7, "name": "Bob"}', row, expected_field="object").value
    0.75

    Nothing is gained by equal fields in an object that breaks the schema, nor is anything taken off for text around it.

    Args:
        completion: what the model wrote.
        row: holds the schema, as an object or as JSON text.
        schema: one schema for all rows, in place of the row's.
        field: the row's field with the schema.
        expected_field: the row's field with the expected object.
    """
    found = first_object(completion)
    rule = row[field] if schema is None else schema
    if isinstance(rule, str):
        rule = json.loads(rule)
    validator = jsonschema.validators.validator_for(rule, default=jsonschema.Draft202012Validator)
    validator.check_schema(dict(rule))
    is_valid = found is not None and validator(rule).is_valid(found)
    if expected_field is None:
        return Score(float(is_valid))
    expected = row[expected_field]
    if isinstance(expected, str):
        expected = json.loads(expected)
    if not isinstance(expected, Mapping) or not expected:
        raise ValueError(f"{row}: {expected_field} must be an object with fields, not {expected!r}")
    equal = 0.0
    if found is not None:
        equal = sum(name in found and _is_equal(found[name], value) for name, value in expected.items()) / len(expected)
    return Score((1.0 + equal) / 2 if is_valid else 0.0, {"valid": float(is_valid), "equal": equal})


def first_object(text: str) -> dict[str, Any] | None:
    """Return the first JSON object in a text.

    >>> first_object('no { here, but {"a": {"b": 1}} and {"c": 2}')
    {'a': {'b': 1}}
    """
    decoder = json.JSONDecoder()
    start = -1
    for _ in range(MAX_ATTEMPTS):
        start = text.find("{", start + 1)
        if start < 0:
            return None
        try:
            found, _ = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):  # also a number of more digits than Python converts
            continue
        if isinstance(found, dict):
            return found
    return None


def _is_equal(found: object, expected: object) -> bool:
    """Compare as JSON: 1 equals 1.0, but true is not 1."""
    if isinstance(found, bool) or isinstance(expected, bool):
        return found is expected
    if isinstance(found, list) and isinstance(expected, list):
        return len(found) == len(expected) and all(map(_is_equal, found, expected))
    if isinstance(found, dict) and isinstance(expected, dict):
        return found.keys() == expected.keys() and all(_is_equal(found[key], expected[key]) for key in found)
    return found == expected
