"""Grammars of structured output: what llguidance guarantees; anything else is refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any, Final

from trainer.serve.api_errors import ApiError
from trainer.serve.requests import ChatRequest

UNSUPPORTED: Final = frozenset(
    {
        *("unevaluatedProperties", "unevaluatedItems", "if", "then", "else", "uniqueItems", "not"),
        *("dependentRequired", "dependentSchemas", "propertyNames", "contains", "minContains", "maxContains"),
        *("$dynamicRef", "$recursiveRef", "contentEncoding", "contentMediaType", "contentSchema"),
        "x-guidance",
    }
)
"""Keywords of JSON Schema that cannot be guaranteed token by token."""
PLACES: Final = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Keywords whose value maps names, which are no keywords, to schemas."""
DATA: Final = ("enum", "const", "default", "examples")
"""Keywords whose value is data."""
FORM: Final[Any] = {"whitespace_pattern": "[ \\n\\t]{0,16}"}
"""White space between tokens of JSON is bounded: a model may otherwise write nothing else until max_tokens."""
ANY_OBJECT: Final = {"type": "object"}


def grammar_of(request: ChatRequest) -> str | None:
    """The grammar of `response_format`; None for plain text.

    Raises:
        ApiError: the schema has a keyword that cannot be guaranteed, or llguidance is not installed.
    """
    wanted = request.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return json_grammar(ANY_OBJECT)
    if wanted.json_schema is None or not wanted.json_schema.schema_:
        raise ApiError(400, "type json_schema needs json_schema.schema", param="response_format")
    return json_grammar(wanted.json_schema.schema_)


def json_grammar(schema: Mapping[str, Any], param: str = "response_format") -> str:
    """The grammar of all texts that are valid under a schema.

    Args:
        schema: JSON Schema.
        param: the field of the request, for messages.

    Raises:
        ApiError: a keyword cannot be guaranteed, or llguidance is not installed.
    """
    if find_spec("llguidance") is None:
        raise ApiError(400, "structured output needs llguidance: pip install 'tunesmith[serve]'", param=param)
    from llguidance import LLMatcher

    for keyword, place in _keywords(schema, "#"):
        if keyword in UNSUPPORTED:
            raise ApiError(400, f"the keyword `{keyword}` at {place} cannot be guaranteed", param=param)
    try:
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=FORM)
    except ValueError as error:
        raise ApiError(400, f"schema: {error}", param=param) from None
    problem = LLMatcher.validate_grammar(grammar)
    if problem:
        raise ApiError(400, f"schema: {problem}", param=param)
    return str(grammar)


def _keywords(schema: Any, place: str) -> Iterator[tuple[str, str]]:
    """Each keyword of a schema with its place, schemas inside of it included."""
    if isinstance(schema, list):
        for index, each in enumerate(schema):
            yield from _keywords(each, f"{place}/{index}")
    if not isinstance(schema, Mapping):
        return
    for keyword, value in schema.items():
        yield keyword, place
        inside = f"{place}/{keyword}"
        if keyword in DATA:
            continue
        if keyword in PLACES and isinstance(value, Mapping):
            for name, each in value.items():
                yield from _keywords(each, f"{inside}/{name}")
        else:
            yield from _keywords(value, inside)
