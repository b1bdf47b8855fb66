"""Grammars of structured output: what llguidance guarantees; anything else is refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Final

from trainer.serve.api_errors import ApiError
from trainer.serve.reasoning import Reasoning, Stage
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
CALL_TAGS: Final = ("<tool_call>", "</tool_call>")
BACKSLASH: Final = "\\"
ANY_OBJECT: Final = {"type": "object"}


def schema_of(request: ChatRequest) -> Mapping[str, Any] | None:
    """The schema of `response_format`; None for plain text.

    Raises:
        ApiError: the schema has a keyword that cannot be guaranteed, or llguidance is not installed.
    """
    wanted = request.response_format
    if wanted is None or wanted.type == "text":
        return None
    schema: Mapping[str, Any] = ANY_OBJECT
    if wanted.type == "json_schema":
        if wanted.json_schema is None or not wanted.json_schema.schema_:
            raise ApiError(400, "type json_schema needs json_schema.schema", param="response_format")
        schema = wanted.json_schema.schema_
    json_grammar(schema)
    return schema


def schema_rules(schema: Mapping[str, Any]) -> list[str]:
    """The rule `answer` of texts that are valid under a schema that `json_grammar` accepts."""
    return [f"answer: %json {json.dumps({**schema, 'x-guidance': FORM})}"]


def lark(rules: Sequence[str], added: Mapping[str, int], reasoning: Reasoning | None = None) -> str:
    """A grammar of llguidance: an answer, behind reasoning where the model gives some.

    Args:
        rules: `answer` and what it uses; PLAIN is text without the tags of reasoning and of calls.
        added: tokens that were added to the vocabulary; they are no text for llguidance, special or not.
        reasoning: how the answer may show it; None: not at all.
    """
    lines, tags = ["%llguidance {}"], list(CALL_TAGS)
    if reasoning is None or reasoning.stage is Stage.IS_CLOSED:
        lines.append("start: answer")
    else:
        form, tags = reasoning.form, [*tags, *reasoning.form.tags]
        lines.append(ending("thought", "TEXT", form.close, added))
        behind = 'thought "\\n"? "\\n"? answer'
        is_open = reasoning.stage is Stage.IS_OPEN
        lines.append(f"start: {behind}" if is_open else f'start: answer | "\\n"? {literal(form.open, added)} {behind}')
    excluded = "".join(f" & ~/(.|\\n)*{re.escape(tag).replace('/', BACKSLASH + '/')}(.|\\n)*/" for tag in tags)
    return "\n".join([*lines, "TEXT: /(.|\\n)*/", f"PLAIN: TEXT{excluded}", *rules])


def ending(name: str, text: str, tag: str, added: Mapping[str, int]) -> str:
    """A rule of a text that ends with a tag.

    Args:
        name: of the rule.
        text: a terminal.
        tag: what ends it.
        added: tokens that were added to the vocabulary.
    """
    return f"{name}{'' if tag in added else '[lazy]'}: {text} {literal(tag, added)}"


def literal(text: str, added: Mapping[str, int]) -> str:
    """A text as a grammar names it, where it may begin with an added token."""
    tag = next((each for each in added if text.startswith(each)), None)
    if tag is None:
        return json.dumps(text)
    rest = text.removeprefix(tag)
    return f"<[{added[tag]}]>" + (f" {json.dumps(rest)}" if rest else "")


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

    try:
        for keyword, place, around in _keywords(schema, "#"):
            if keyword in UNSUPPORTED or (keyword == "minProperties" and _counts_names(around)):
                raise ApiError(400, f"the keyword `{keyword}` at {place} cannot be guaranteed", param=param)
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=FORM)
    except RecursionError:
        raise ApiError(400, "schema: too deep", param=param) from None
    except ValueError as error:
        raise ApiError(400, f"schema: {error}", param=param) from None
    problem = LLMatcher.validate_grammar(grammar)
    if problem:
        raise ApiError(400, f"schema: {problem}", param=param)
    return str(grammar)


def _counts_names(schema: Mapping[str, Any]) -> bool:
    """Whether `minProperties` asks for more than the required names: a text may repeat the same name."""
    least, required = schema["minProperties"], schema.get("required", ())
    return isinstance(least, int) and least > max(1, len(required) if isinstance(required, list) else 0)


def _keywords(schema: Any, place: str) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Each keyword of a schema with its place and the schema around it, schemas inside of it included."""
    if isinstance(schema, list):
        for index, each in enumerate(schema):
            yield from _keywords(each, f"{place}/{index}")
    if not isinstance(schema, Mapping):
        return
    for keyword, value in schema.items():
        yield keyword, place, schema
        inside = f"{place}/{keyword}"
        if keyword in DATA:
            continue
        if keyword in PLACES and isinstance(value, Mapping):
            for name, each in value.items():
                yield from _keywords(each, f"{inside}/{name}")
        else:
            yield from _keywords(value, inside)
