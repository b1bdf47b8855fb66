"""The bill of materials names every distribution of the environment and resolves its references."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "sbom.py"
LIST = "from importlib.metadata import distributions; print(*(each.metadata['Name'] for each in distributions()))"


def test_the_bill_of_materials_is_complete_and_consistent(tmp_path: Path) -> None:
    target = tmp_path / "build" / "sbom.json"
    subprocess.run([sys.executable, str(SCRIPT), str(target)], check=True)
    bill = json.loads(target.read_text())
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    names = {re.sub(r"[-_.]+", "-", each["name"]).lower() for each in bill["components"]}
    # in a process of its own, as the script: some packages put what they bring on the path when they are imported
    listed = subprocess.run([sys.executable, "-c", LIST], capture_output=True, text=True, check=True).stdout.split()
    assert names == {re.sub(r"[-_.]+", "-", name).lower() for name in listed} - {"tunesmith"}
    refs = {each["bom-ref"] for each in bill["components"]} | {bill["metadata"]["component"]["bom-ref"]}
    assert len(refs) == len(bill["components"]) + 1
    assert {each["ref"] for each in bill["dependencies"]} == refs
    assert {ref for each in bill["dependencies"] for ref in each["dependsOn"]} <= refs
    sqlalchemy = next(each for each in bill["dependencies"] if each["ref"].startswith("pkg:pypi/alembic@"))
    assert any(ref.startswith("pkg:pypi/sqlalchemy@") for ref in sqlalchemy["dependsOn"])
