#!/usr/bin/env python
"""Write docs/{recipe,shape}.schema.json, docs/{recipe,shape}.md and docs/migration.md from the config classes.

python scripts/make_schemas.py            write them
python scripts/make_schemas.py --check    exit 1 if a file does not match the classes
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from trainer.config.foreign_names import FIELDS, NO_PREFERENCES, NOT_NEEDED, OTHER_METHODS, TOOLS
from trainer.config.recipe import RFT_FIELDS, RecipeBase, RFTRecipe
from trainer.config.shape import TrainingShape

ROOT: Final = Path(__file__).resolve().parent.parent
PAGES: Final[Mapping[str, type[BaseModel]]] = {"recipe": RFTRecipe, "shape": TrainingShape}
"""An rft recipe has all fields of an sft recipe and more, so its page and schema describe both."""
TITLES: Final = {"recipe": "Recipe", "shape": "TrainingShape"}
ABOUT: Final = {
    "recipe": "One training run. Fields marked `rft only` are refused with `method: sft`.",
    "shape": inspect.getdoc(TrainingShape) or "",
}
DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
INTROS: Final = {
    "recipe": """\
A recipe specifies what to train, on which rows and how; hardware is specified by a [shape](shape.md).
`trainer check RECIPE` validates a recipe and shows every value with its origin. Any field can be set on the command
line: `--set optimizer.learning_rate=1e-4`.

The first line of a recipe tells editors which schema to use for completion and help:
`# yaml-language-server: $schema=../docs/recipe.schema.json`""",
    "shape": """\
A training shape specifies the number and kind of devices, and the largest jobs that fit on them. Shapes are files in
configs/shapes/; of two with the same name, the one in the working directory is used. Further shapes are made by rule
from the GPUs in configs/devices/, such as `rtx4090x2` ([machine.md](machine.md)). `trainer shapes` lists them all;
`trainer shapes --print NAME` prints one, to copy and change it.""",
}


MIGRATION: Final = """\
`trainer import-config` translates a configuration and names every field that it could not translate:

    trainer import-config axolotl.yml --out my.yaml
    trainer import-config trl.yaml --gpus 8 --out my.yaml     # what it was written for: the global batch counts GPUs
    trainer check my.yaml --data                              # compare the tokens that are trained

What is left to you stands in the recipe as comments (`# decide: ...`). Rows need no conversion where their form is
[recognised](data.md). A recipe that uses a name of another tool gets the remedy, with its line.

What differs in meaning: the batch is global and independent of the number of GPUs; rows are packed, so there is no
micro-batch size; a row that is too long stops the run unless `data.overlong` says otherwise; prompts are never
trained; every run can be resumed without a setting."""


def schema(name: str) -> str:
    """The JSON Schema of a page, with the field docstrings as descriptions."""
    return json.dumps({"$schema": DIALECT, **described(name)}, indent=2, ensure_ascii=False) + "\n"


def described(name: str) -> dict[str, Any]:
    """The JSON Schema of a page as a document."""
    document = PAGES[name].model_json_schema() | {"title": TITLES[name], "description": ABOUT[name]}
    if name == "recipe":
        document["properties"]["method"] = RecipeBase.model_json_schema()["properties"]["method"]
        document["if"] = {"properties": {"method": {"const": "sft"}}}
        document["then"] = {"properties": dict.fromkeys(sorted(RFT_FIELDS), False)}
        has_environment = {"required": ["rollout"], "properties": {"rollout": {"required": ["environment"]}}}
        document["else"] = {"anyOf": [{"required": ["rewards"]}, has_environment]}
    return document


def page(name: str) -> str:
    """The reference page: every section and field."""
    document = described(name)
    lines = [
        f"# {name.capitalize()} reference",
        "",
        "<!-- Made by scripts/make_schemas.py; do not edit. -->",
        "",
        INTROS[name],
    ]
    paths: dict[type[BaseModel], list[str]] = {}
    for path, section in sections(PAGES[name]):
        paths.setdefault(section, []).append(path)
    for section, found in paths.items():
        schema_of = document if section is PAGES[name] else document["$defs"][section.__name__]
        heading = ", ".join(f"`{path}`" for path in found if path) or "Top level"
        about = ABOUT[name].splitlines() if section is PAGES[name] else _doc(section)
        lines += ["", f"## {heading}", "", *about]
        lines += ["", "| field | type | default | meaning |", "|---|---|---|---|"]
        for field, info in section.model_fields.items():
            about_field = schema_of["properties"][field]
            meaning = " ".join(about_field["description"].split()).replace("<", "&lt;")
            cells = (f"`{field}`", type_text(about_field, document), default_text(info), meaning)
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def sections(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """A section and its subsections, with their dotted names."""
    yield path, model
    for name, info in model.model_fields.items():
        inside = _section_in(info.annotation)
        inside = None if inside is model else inside  # a list of sources holds sources again
        if inside is not None:
            is_list = getattr(info.annotation, "__origin__", None) is list
            yield from sections(inside, f"{path}.{name}".lstrip(".") + ("[]" if is_list else ""))


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((inner for each in getattr(annotation, "__args__", ()) if (inner := _section_in(each))), None)


def _doc(section: type[BaseModel]) -> list[str]:
    return (inspect.getdoc(section) or "").splitlines()


def default_text(info: FieldInfo) -> str:
    """A field's default as text."""
    if info.is_required():
        return "*required*"
    default = info.get_default(call_default_factory=True)
    return "its defaults" if isinstance(default, BaseModel) else f"`{json.dumps(default)}`"


def type_text(field: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    """A JSON Schema type for people.

    >>> type_text({"type": "integer", "exclusiveMinimum": 0}, {})
    'integer > 0'
    """
    if "$ref" in field:
        return "section"
    if "anyOf" in field:
        kinds = [type_text(each, document) for each in field["anyOf"]]
        return " or ".join(dict.fromkeys(kinds))
    if "const" in field or "enum" in field:
        return ", ".join(f"`{each}`" for each in field.get("enum", [field.get("const")]))
    kind = str(field.get("type", "anything"))
    if kind == "array":
        return f"list of {type_text(field['items'], document)}"
    bounds = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    ranges = [f"{sign} {field[name]:g}" for name, sign in bounds.items() if name in field]
    return " ".join([{"object": "mapping", "string": "text"}.get(kind, kind), ", ".join(ranges)]).strip()


def files() -> dict[Path, str]:
    """Every generated file with its expected text."""
    made = {ROOT / "docs" / f"{name}.schema.json": schema(name) for name in PAGES}
    made |= {ROOT / "docs" / f"{name}.md": page(name) for name in PAGES}
    return made | {ROOT / "docs" / "migration.md": migration()}


def migration() -> str:
    """The page for users of other tools: the table by which `trainer import-config` translates."""
    lines = [
        "# Coming from Axolotl, LLaMA-Factory or TRL",
        "",
        "<!-- Made by scripts/make_schemas.py; do not edit. -->",
        "",
    ]
    lines += [
        MIGRATION,
        "",
        "## Fields",
        "",
        "| recipe | Axolotl | LLaMA-Factory | TRL | note |",
        "|---|---|---|---|---|",
    ]
    for each in FIELDS:
        cells = [", ".join(f"`{name}`" for name in each.names(tool)) for tool in TOOLS]
        lines.append(f"| `{each.ours}` | {' | '.join(cells)} | {each.note.replace('|', '/')} |")
    lines += ["", "## Fields that are not needed", "", "| field | why |", "|---|---|"]
    by_reason: dict[str, list[str]] = {}
    for name, reason in NOT_NEEDED.items():
        by_reason.setdefault(reason, []).append(name)
    lines += [f"| {', '.join(f'`{name}`' for name in names)} | {reason} |" for reason, names in by_reason.items()]
    lines += ["", "## Methods", "", f"{NO_PREFERENCES[0].upper()}{NO_PREFERENCES[1:]}.", ""]
    lines += ["| theirs | here |", "|---|---|"]
    lines += [f"| `{name}` | {remedy} |" for name, remedy in OTHER_METHODS.items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the files, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    is_check = parser.parse_args().check
    stale = [path for path, text in files().items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if is_check:
            print(
                f"{path.relative_to(ROOT)}: differs from the config classes; run scripts/make_schemas.py",
                file=sys.stderr,
            )
        else:
            path.write_text(files()[path], encoding="utf-8")
            print(path.relative_to(ROOT))
    return 1 if is_check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
