"""Write the JSONL files under datasets/, the same bytes every time.

`python scripts/make_datasets.py` rewrites them; `--check` changes nothing and exits 1 if a committed file differs.
"""

import json

from datasets_extract import make_extract_rows
from datasets_random import Draws
from pathlib import Path

DIR = Path(__file__).resolve().parent.parent / "datasets"
for split in ("train", "heldout"):
    rows = make_extract_rows(split, Draws(f"extract {split}"))
    (DIR / f"extract_{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
