#!/usr/bin/env python
"""Write docs/{recipe,shape}.schema.json and docs/{recipe,shape}.md from the config classes.

python scripts/make_schemas.py            write them
python scripts/make_schemas.py --check    exit 1 where a file is not what the classes say
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

from trainer.config.recipe import Recipe
from trainer.config.shape import TrainingShape

ROOT: Final = Path(__file__).resolve().parent.parent
PAGES: Final[Mapping[str, type[BaseModel]]] = {"recipe": Recipe, "shape": TrainingShape}
DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
INTROS: Final = {
    "recipe": """\
A recipe says what to train, on which rows and how; not on which hardware. `trainer check RECIPE` validates it and shows
every value with its origin. Any field can be set from the command line: `--set optimizer.learning_rate=1e-4`.

The first line of each recipe gives editors this schema, with completion and help:
`# yaml-language-server: $schema=../docs/recipe.schema.json`""",
    "shape": """\
A training shape says how many of which device there are, and the largest job known to fit on them. Shapes live in
configs/shapes/; of two of the same name the one in the working directory wins. `trainer shapes` lists them.""",
}


def schema(name: str) -> str:
    """The JSON Schema of a page's class, with the field docstrings as descriptions."""
    document = PAGES[name].model_json_schema()
    return json.dumps({"$schema": DIALECT, **document}, indent=2, ensure_ascii=False) + "\n"


def page(name: str) -> str:
    """The reference page: every section and field."""
    document = PAGES[name].model_json_schema()
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
        described = document if section is PAGES[name] else document["$defs"][section.__name__]
        heading = ", ".join(f"`{path}`" for path in found if path) or "Top level"
        lines += ["", f"## {heading}", "", *_doc(section)]
        lines += ["", "| field | type | default | meaning |", "|---|---|---|---|"]
        for field, info in section.model_fields.items():
            meaning = " ".join((info.description or "").split()).replace("<", "&lt;")
            cells = (f"`{field}`", type_text(described["properties"][field], document), default_text(info), meaning)
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def sections(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """A section and all those within it, with their dotted names."""
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
    return next((found for each in getattr(annotation, "__args__", ()) if (found := _section_in(each))), None)


def _doc(section: type[BaseModel]) -> list[str]:
    return (inspect.getdoc(section) or "").splitlines()


def default_text(info: FieldInfo) -> str:
    """A default for people."""
    if info.is_required():
        return "*required*"
    default = info.get_default(call_default_factory=True)
    return "its defaults" if isinstance(default, BaseModel) else f"`{json.dumps(default)}`"


def type_text(described: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    """A JSON Schema type for people.

    >>> type_text({"type": "integer", "exclusiveMinimum": 0}, {})
    'integer > 0'
    """
    if "$ref" in described:
        return "section"
    if "anyOf" in described:
        kinds = [type_text(each, document) for each in described["anyOf"]]
        return " or ".join(dict.fromkeys(kinds))
    if "const" in described or "enum" in described:
        return ", ".join(f"`{each}`" for each in described.get("enum", [described.get("const")]))
    kind = str(described.get("type", "anything"))
    if kind == "array":
        return f"list of {type_text(described['items'], document)}"
    bounds = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    ranges = [f"{sign} {described[name]:g}" for name, sign in bounds.items() if name in described]
    return " ".join([{"object": "mapping", "string": "text"}.get(kind, kind), ", ".join(ranges)]).strip()


def files() -> dict[Path, str]:
    """Every generated file and what it should hold."""
    made = {ROOT / "docs" / f"{name}.schema.json": schema(name) for name in PAGES}
    return made | {ROOT / "docs" / f"{name}.md": page(name) for name in PAGES}


def main() -> int:
    """Write, or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    is_check = parser.parse_args().check
    drifted = [path for path, text in files().items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in drifted:
        if is_check:
            print(
                f"{path.relative_to(ROOT)}: not what the config classes say; run scripts/make_schemas.py",
                file=sys.stderr,
            )
        else:
            path.write_text(files()[path], encoding="utf-8")
            print(path.relative_to(ROOT))
    return 1 if is_check and drifted else 0


if __name__ == "__main__":
    sys.exit(main())
