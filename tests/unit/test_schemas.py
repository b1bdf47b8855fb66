"""The JSON Schemas and reference pages: as the classes say, and used by every YAML file that ships."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from trainer.config.document import read_document

ROOT = Path(__file__).resolve().parents[2]
FILES = [*sorted((ROOT / "recipes").glob("*.yaml")), *sorted((ROOT / "configs" / "shapes").glob("*.yaml"))]
NAMES = [str(path.relative_to(ROOT)) for path in FILES]


def schema(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "docs" / f"{name}.schema.json").read_text(encoding="utf-8"))


def test_schemas_and_pages_are_what_the_classes_say():
    argv = [sys.executable, "scripts/make_schemas.py", "--check"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_there_are_recipes_and_shapes_to_check():
    assert len(NAMES) >= 12


@pytest.mark.parametrize("name", NAMES)
def test_a_file_names_its_schema_and_keeps_it(name):
    path = ROOT / name
    first = path.read_text(encoding="utf-8").splitlines()[0]
    match = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", first)
    assert match is not None, "the first line names the schema"
    target = (path.parent / match[1]).resolve()
    kind = "recipe" if name.startswith("recipes/") else "shape"
    assert target == ROOT / "docs" / f"{kind}.schema.json"
    jsonschema.validate(read_document(path).data, json.loads(target.read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", ["recipe", "shape"])
def test_a_schema_is_valid_and_says_what_every_field_means(name):
    document = schema(name)
    jsonschema.Draft202012Validator.check_schema(document)
    sections = {name: document} | document["$defs"]
    silent = [
        f"{section}.{field}"
        for section, described in sections.items()
        for field, about in described["properties"].items()
        if not about.get("description")
    ]
    assert silent == []


@pytest.mark.parametrize(
    "change",
    [
        {"stpes": 3},  # unknown
        {"rows_per_step": 0},  # out of range
        {"method": "sfr"},  # not one of them
        {"optimizer": {"learning_rate": "fast"}},  # not a number
        {"lora": {"target_modules": []}},  # an empty list
    ],
)
def test_the_schema_refuses_what_the_classes_refuse(change):
    good = {"name": "a", "method": "sft", "model": {"path": "m"}, "data": {"train": "t.jsonl"}, "steps": 1}
    jsonschema.validate(good, schema("recipe"))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(good | change, schema("recipe"))


@pytest.mark.parametrize("field", ["algorithm", "rollout", "rewards", "reward_limits"])
def test_the_schema_and_page_say_which_fields_are_rft_only(field):
    rewards = [{"use": "last_number"}]
    rft = {"name": "a", "method": "rft", "model": {"path": "m"}, "data": {"train": "t"}, "steps": 1, "rewards": rewards}
    value = rewards if field == "rewards" else {}
    jsonschema.validate(rft | {field: value}, schema("recipe"))
    sft = {name: each for name, each in rft.items() if name != "rewards"} | {"method": "sft"}
    jsonschema.validate(sft, schema("recipe"))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(sft | {field: value}, schema("recipe"))
    page = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert re.search(rf"^\| `{field}` \|.*\| rft only", page, re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "row"), [("recipe", "`rank` | integer > 0 | `16`"), ("shape", "`gpus` | integer >= 0")]
)
def test_a_reference_page_lists_fields_with_type_and_default(name, row):
    page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    assert f"| {row}" in page
