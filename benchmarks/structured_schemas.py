"""Awkward JSON Schemas: recursion, alternatives, patterns, bounds, large ones; and some that nobody can guarantee."""

from __future__ import annotations

from typing import Any, Final


def record(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    """An object of exactly these properties."""
    closed = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return closed | more


SHORT: Final = {"type": "string", "maxLength": 4}
GUARANTEED: Final[dict[str, dict[str, Any]]] = {
    "recursive tree": {
        "$defs": {"t": record({"kids": {"type": "array", "maxItems": 1, "items": {"$ref": "#/$defs/t"}}})},
        "$ref": "#/$defs/t",
    },
    "mutual recursion": {
        "$defs": {
            "a": record({"b": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/b"}]}}),
            "b": record({"a": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/a"}]}}),
        },
        "$ref": "#/$defs/a",
    },
    "recursion through the root": record({"next": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}}),
    "linked list of a union": {
        "$defs": {"v": {"enum": [1, "x", None]}, "l": record({"v": {"$ref": "#/$defs/v"}, "n": {"enum": [None]}})},
        "type": "array",
        "items": {"$ref": "#/$defs/l"},
        "maxItems": 3,
    },
    "oneOf of constants": {"oneOf": [{"const": "a"}, {"const": 2}]},
    "oneOf by a discriminator": {
        "oneOf": [record({"kind": {"const": "card"}, "n": {"type": "integer"}}), record({"kind": {"const": "cash"}})]
    },
    "oneOf of types": {"oneOf": [{"type": "boolean"}, SHORT, {"type": "null"}]},
    "anyOf of objects": {"anyOf": [{"type": "null"}, record({"n": {"type": "integer"}}), record({"m": SHORT})]},
    "anyOf beside properties": record({"a": {"const": 1}}, anyOf=[{"required": ["a"]}]),
    "type list": {"type": ["integer", "null", "boolean"]},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    "pattern that is not anchored": {"type": "string", "pattern": "[0-9]{2}", "maxLength": 6},
    "pattern of alternatives": {"type": "string", "pattern": "^(red|gr[ae]y|#[0-9a-f]{6})$"},
    "pattern with escapes": {"type": "string", "pattern": '^\\d{1,3}\\.\\d{2} \\\\["€]$'},
    "pattern of unicode": {"type": "string", "pattern": "^[äöüß]{1,3}$"},
    "enum of all kinds": {"enum": [None, True, 1.5, "x", [1], {"a": 2}, '\u2028"\\', -0.0]},
    "large enum": {"enum": [f"value {k}" for k in range(500)]},
    "large object": record(
        {f"field_{k}": {"type": ["integer", "null"], "minimum": 0, "maximum": 9} for k in range(40)}
    ),
    "deep object": record({"a": record({"b": record({"c": record({"d": record({"e": {"const": [[]]}})})})})}),
    "range of numbers": {"type": "number", "minimum": -0.5, "exclusiveMaximum": 12},
    "range of integers": {"type": "integer", "exclusiveMinimum": -3, "maximum": 1007},
    "multiples": {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 700},
    "lengths in characters": {"type": "string", "minLength": 2, "maxLength": 4},
    "tuple": {"type": "array", "prefixItems": [{"type": "boolean"}, {"const": 7}], "minItems": 2, "items": False},
    "tuple with a tail": {"type": "array", "prefixItems": [SHORT], "items": {"const": 0}, "minItems": 2, "maxItems": 4},
    "array bounds": {"type": "array", "items": {"enum": [1, 2]}, "minItems": 3, "maxItems": 5},
    "date": {"type": "string", "format": "date"},
    "formats": record({"u": {"type": "string", "format": "uuid"}, "i": {"type": "string", "format": "ipv4"}}),
    "allOf of ranges": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 9}]},
    "allOf of objects": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer", "maximum": 5}}, "required": ["a"]},
            {"properties": {"a": {"minimum": 2}, "b": {"const": 1}}, "required": ["b"], "additionalProperties": False},
        ]
    },
    "optional": {
        "type": "object",
        "properties": {"a": {"const": 1}, "b": {"const": 2}, "c": {"const": 3}},
        "required": ["b"],
        "additionalProperties": False,
    },
    "map": {"type": "object", "additionalProperties": {"type": "boolean"}},
    "one to three names": {
        "type": "object",
        "patternProperties": {"^k[0-9]$": {"const": 1}},
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 3,
    },
    "map by pattern": {
        "type": "object",
        "patternProperties": {"^k[0-9]$": {"const": 1}},
        "additionalProperties": False,
    },
    "names that are keywords": record({"not": {"const": 1}, "$ref": SHORT, "enum": {"enum": ["if"]}}),
    "names that need escapes": record({'a"b': {"const": 1}, "ä\n": {"const": 2}, "": {"const": 3}}),
    "definitions of the old form": {
        "definitions": {"s": SHORT},
        "type": "array",
        "items": {"$ref": "#/definitions/s"},
        "maxItems": 2,
    },
}
REFUSED: Final[dict[str, dict[str, Any]]] = {
    "not": {"not": {"type": "string"}},
    "if": {"if": {"type": "string"}, "then": {"maxLength": 1}},
    "uniqueItems": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
    "contains": {"type": "array", "contains": {"const": 1}},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "propertyNames": {"type": "object", "propertyNames": {"maxLength": 2}},
    "unevaluatedProperties": {"type": "object", "properties": {"a": {}}, "unevaluatedProperties": False},
    "minProperties": {"type": "object", "minProperties": 2},
    "oneOf": {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    "look-around": {"type": "string", "pattern": "(?=a)b"},
}
"""By the word that the refusal has."""
