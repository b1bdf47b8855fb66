"""Write the software bill of materials of this environment (CycloneDX 1.6): `python scripts/sbom.py FILE`."""

from __future__ import annotations

import json
import re
import sys
import uuid
from datetime import UTC, datetime
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path
from typing import Any, Final

ROOT_NAME: Final = "tunesmith"


def bill(root: str = ROOT_NAME) -> dict[str, Any]:
    """The document: every distribution that is installed, and what depends on what.

    Args:
        root: the distribution that the bill is of.
    """
    found = {canonical(each.metadata["Name"]): each for each in distributions() if each.metadata["Name"]}
    main = found.pop(canonical(root), None) or distribution(root)
    known = {**found, canonical(root): main}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid4()}",
        "version": 1,
        "metadata": {
            "timestamp": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "component": component(main, "application"),
        },
        "components": [component(found[name], "library") for name in sorted(found)],
        "dependencies": [
            {
                "ref": purl(known[name]),
                "dependsOn": sorted(purl(known[each]) for each in needs(known[name]) & known.keys()),
            }
            for name in sorted(known)
        ],
    }


def component(each: Distribution, kind: str) -> dict[str, Any]:
    """One entry."""
    entry: dict[str, Any] = {
        "type": kind,
        "bom-ref": purl(each),
        "name": each.metadata["Name"],
        "version": each.version,
        "purl": purl(each),
    }
    words = each.metadata.get("License-Expression") or each.metadata.get("License")
    if words and len(words) < 100:
        is_expression = each.metadata.get("License-Expression") is not None
        entry["licenses"] = [{"expression": words} if is_expression else {"license": {"name": words}}]
    return entry


def needs(each: Distribution) -> set[str]:
    """Names of the distributions that it requires, those of extras included."""
    return {canonical(re.split(r"[ ;<>=!~\[(]", line, maxsplit=1)[0]) for line in each.requires or ()}


def purl(each: Distribution) -> str:
    """Its package URL."""
    return f"pkg:pypi/{canonical(each.metadata['Name'])}@{each.version}"


def canonical(name: str) -> str:
    """A name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> int:
    """Write it."""
    if len(sys.argv) != 2:
        print("usage: python scripts/sbom.py FILE")
        return 2
    target = Path(sys.argv[1])
    target.parent.mkdir(parents=True, exist_ok=True)
    document = bill()
    target.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"{target}: {len(document['components'])} components")
    return 0


if __name__ == "__main__":
    sys.exit(main())
