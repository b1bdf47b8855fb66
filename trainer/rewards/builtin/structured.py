"""Reward structured output: JSON that conforms to a schema."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final, NoReturn

import jsonschema
from jsonschema_specifications import REGISTRY
from referencing.exceptions import Unresolvable

from trainer.rewards.builtin.answers import after_thinking
from trainer.rewards.contract import Score
from trainer.types import Row, read_field

START: Final = {"object": re.compile(r'\{(?=\s*(?:["}]|\Z))'), "array": re.compile(r"\[")}
"""Where a document of each type may begin: a brace in prose is followed by no quotation mark."""
FENCED: Final = re.compile(r"\A\s*```[\w-]*[ \t]*\r?\n(.*?)\r?\n[ \t]*```\s*\Z", re.DOTALL)
CLOSING: Final = {"{": "}", "[": "]"}


def json_schema(
    completion: str,
    row: Row,
    *,
    schema: Mapping[str, Any] | None = None,
    field: str = "schema",
    expected_field: str | None = None,
) -> Score:
    """1.0 if the first JSON document in the completion conforms to the schema, else 0.0.

    >>> schema = {"type": "object", "required": ["age"], "properties": {"age": {"type": "integer"}}}
    >>> json_schema('Here: {"age": 7}', {"schema": schema}).value
    1.0
    >>> json_schema('{"age": "seven"}', {"schema": schema}).value
    0.0

    With `expected_field` the schema is worth one half and the fields equal to the expected object's the other half:

    >>> row = {"schema": schema, "object": {"age": 7, "name": "Ann"}}
    >>> json_schema('{"age": 7, "name": "Bob"}', row, expected_field="object").value
    0.75

    Equal fields in an object that violates the schema earn nothing, and text around the document costs nothing. The
    document is looked for behind the thinking; a document that is cut off or malformed is none, and nothing inside it
    counts. NaN and Infinity are not JSON. `$ref` resolves within the schema and to the JSON Schema drafts; nothing is
    fetched.

    Args:
        completion: what the model wrote.
        row: holds the schema, as an object or as JSON text.
        schema: one schema for all rows, in place of the row's.
        field: the row's field with the schema.
        expected_field: the row's field with the expected object.
    """
    rule = read_schema(row, field) if schema is None else schema
    validator = jsonschema.validators.validator_for(rule, default=jsonschema.Draft202012Validator)
    validator.check_schema(dict(rule))
    types = _types(rule)
    found, has_found = find_document(after_thinking(completion), types)
    try:
        is_valid = has_found and validator(rule, registry=REGISTRY).is_valid(found)
    except Unresolvable as error:
        raise ValueError(
            f"{row}: the schema refers to {error.ref!r}, which it does not hold; nothing is fetched"
        ) from None
    if expected_field is None:
        return Score(float(is_valid))
    expected = read_field(row, expected_field)
    if isinstance(expected, str):
        expected = json.loads(expected)
    if not isinstance(expected, Mapping) or not expected:
        raise ValueError(f"{row}: {expected_field} must be an object with fields, not {expected!r}")
    equal = 0.0
    if isinstance(found, dict):
        equal = sum(name in found and _is_equal(found[name], value) for name, value in expected.items()) / len(expected)
    return Score((1.0 + equal) / 2 if is_valid else 0.0, {"valid": float(is_valid), "equal": equal})


def read_schema(row: Row, field: str) -> Mapping[str, Any]:
    """Return the row's schema.

    Raises:
        ValueError: it is no JSON object; names the row.
    """
    found = read_field(row, field)
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except ValueError as error:
            raise ValueError(f"{row}: {field} is not JSON: {error}") from None
    if not isinstance(found, Mapping):
        raise ValueError(f"{row}: {field} must be a JSON Schema, not {found!r:.80}")
    return found


def check_row(row: Row, *, schema: Mapping[str, Any] | None = None, field: str = "schema", **_: Any) -> None:
    """Refuse a row without a usable schema.

    Raises:
        ValueError: names the row and what is wrong with its schema.
    """
    rule = read_schema(row, field) if schema is None else schema
    try:
        jsonschema.validators.validator_for(rule, default=jsonschema.Draft202012Validator).check_schema(dict(rule))
    except jsonschema.SchemaError as error:
        raise ValueError(f"{row}: {field} is not a JSON Schema: {error.message}") from None


def _types(rule: Mapping[str, Any]) -> frozenset[str]:
    """The types that a schema names at its top; all where it names none."""
    named = rule.get("type", ["object", "array", "string", "number", "integer", "boolean", "null"])
    return frozenset([named] if isinstance(named, str) else named)


def find_document(text: str, types: frozenset[str]) -> tuple[Any, bool]:
    """Return the first JSON document of one of these types, and whether there is one.

    >>> find_document('no { here, but {"a": {"b": 1}} and {"c": 2}', frozenset({"object"}))
    ({'a': {'b': 1}}, True)
    >>> find_document('{"a": {"b": 1}', frozenset({"object"})), find_document('"yes"', frozenset({"string"}))
    ((None, False), ('yes', True))

    A text that is one document as a whole, with or without a fence around it, is that document.

    Args:
        text: what the model wrote, without its thinking.
        types: names of JSON types.
    """
    fenced = FENCED.match(text)
    whole = (fenced[1] if fenced is not None else text).strip()
    if whole[:1] not in CLOSING or (whole[0] == "[") <= ("array" in types):
        try:
            return _decode(whole), True
        except (ValueError, RecursionError):
            pass
    position = 0
    while True:
        starts = [
            found.start() for kind, start in START.items() if kind in types and (found := start.search(text, position))
        ]
        if not starts:
            return None, False
        start = min(starts)
        end = _end_of(text, start)
        if end is None:  # cut off: nothing inside counts
            return None, False
        try:
            return _decode(text[start:end]), True
        except (ValueError, RecursionError):  # also a number of more digits than Python converts
            position = end


def _decode(text: str) -> Any:
    return json.loads(text, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _end_of(text: str, start: int) -> int | None:
    """Where the bracket at `start` is closed, strings aside; None where it is not."""
    depth = 0
    is_string = is_escaped = False
    for position in range(start, len(text)):
        character = text[position]
        if is_string:
            is_string = is_escaped or character != '"'
            is_escaped = character == "\\" and not is_escaped
        elif character == '"':
            is_string = True
        elif character in "{[":
            depth += 1
        elif character in "}]":
            depth -= 1
            if depth == 0:
                return position + 1
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
