"""Rows of JSON by schema: a sentence, the keys to use, a JSON Schema and the expected object."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from datasets_random import Draws

EXAMPLE: Final = (
    {"role": "system", "content": "Answer with one JSON object."},
    {"role": "user", "content": "Tom owns 3 cats.\nKeys: owner (string), cats (integer)."},
    {"role": "assistant", "content": '{"owner": "Tom", "cats": 3}'},
)
"""Start of every prompt: without it 1% of completions satisfy the schema, too few to learn from."""
ROWS_PER_FAMILY: Final = {"train": 20, "heldout": 15}

Draw = str | tuple[int, int] | list[str]
"""How a value is drawn: the name of a list in `POOLS`, the bounds of a whole number, or the values of an enum."""

POOLS: Final[Mapping[str, Mapping[str, list[str]]]] = {
    "train": {
        "person": ["Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Ivan", "Julia", "Karl", "Laura"],
        "city": ["Paris", "London", "Berlin", "Rome", "Madrid", "Oslo", "Vienna", "Prague", "Lisbon", "Dublin"],
        "thing": ["lamp", "chair", "desk", "mug", "book", "shirt", "clock", "phone", "bottle", "bag"],
        "day": ["Monday", "Tuesday", "Wednesday", "Thursday"],
    },
    "heldout": {
        "person": ["Omar", "Priya", "Yuki", "Lucas", "Sofia", "Peter", "Helen", "Mark", "Diana", "Leo"],
        "city": ["Athens", "Warsaw", "Boston", "Chicago", "Denver", "Seattle", "Toronto", "Sydney"],
        "thing": ["tent", "pillow", "spoon", "camera", "basket", "umbrella", "ladder", "mirror"],
        "day": ["Friday", "Saturday", "Sunday"],
    },
}

FAMILIES: Final[Mapping[str, list[tuple[str, Mapping[str, Draw]]]]] = {
    "train": [
        ("{name} is {age} years old and lives in {city}.", {"name": "person", "age": (18, 80), "city": "city"}),
        ("The {item} costs {price} euros.", {"item": "thing", "price": (5, 300)}),
        (
            "In {city} it is {weather} with {degrees} degrees.",
            {"city": "city", "degrees": (1, 35), "weather": ["sunny", "rainy", "cloudy"]},
        ),
        ("{guest} comes on {day} with {friends} friends.", {"guest": "person", "day": "day", "friends": (2, 9)}),
        (
            "{owner} has a {color} {item}.",
            {"owner": "person", "item": "thing", "color": ["red", "blue", "green", "black"]},
        ),
        ("The bus to {city} leaves on {day} at {hour}.", {"city": "city", "day": "day", "hour": (5, 22)}),
    ],
    "heldout": [
        (
            "{student} got {points} points in {subject}.",
            {"student": "person", "points": (10, 99), "subject": ["math", "music", "history"]},
        ),
        ("{count} people in {city} bought a {item}.", {"city": "city", "count": (20, 900), "item": "thing"}),
        (
            "{player} plays {sport} every {day}.",
            {"player": "person", "day": "day", "sport": ["tennis", "football", "chess"]},
        ),
        (
            "The shop in {city} opens at {open} and closes at {close}.",
            {"city": "city", "open": (6, 10), "close": (16, 22)},
        ),
    ],
}


def make_json_rows(split: str, draws: Draws) -> list[dict[str, Any]]:
    """Return the rows of one split; splits share no family, name or object."""
    rows = []
    for number, (sentence, fields) in enumerate(FAMILIES[split], 1):
        texts: set[str] = set()
        while len(texts) < ROWS_PER_FAMILY[split]:
            answer = {key: draw_field(how, split, draws) for key, how in fields.items()}
            text = sentence.format(**answer)
            if text in texts:
                continue
            texts.add(text)
            keys = ", ".join(f"{key} ({describe(how)})" for key, how in fields.items())
            rows.append(
                {
                    "messages": [
                        *EXAMPLE,
                        {"role": "user", "content": f"{text}\nKeys: {keys}."},
                    ],
                    "schema": write_schema(fields),
                    "answer": json.dumps(answer),
                    "family": f"json-{split}-{number:02d}",
                }
            )
    return draws.shuffled(rows)


def draw_field(how: Draw, split: str, draws: Draws) -> str | int:
    """Return one value."""
    if isinstance(how, tuple):
        return draws.between(*how)
    return draws.pick(POOLS[split][how] if isinstance(how, str) else how)


def describe(how: Draw) -> str:
    """Return the type of a value as written in the prompt."""
    if isinstance(how, list):
        return "one of " + " ".join(how)
    return "integer" if isinstance(how, tuple) else "string"


def write_schema(fields: Mapping[str, Draw]) -> dict[str, Any]:
    """Return the JSON Schema of an object with these fields and no other."""
    properties: dict[str, Any] = {}
    for key, how in fields.items():
        properties[key] = {"type": "integer"} if isinstance(how, tuple) else {"type": "string"}
        if isinstance(how, list):
            properties[key]["enum"] = how
    return {"type": "object", "properties": properties, "required": list(fields), "additionalProperties": False}
