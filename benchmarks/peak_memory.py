"""Peak resident memory of two SFT steps in a fresh process, ours or TRL's, on the same rows.

python benchmarks/peak_memory.py ours|trl
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile

from sft_vs_trl import SETTINGS, Ours, Trl

STEPS = 2


def main(side: str) -> None:
    """Print GiB as JSON; TRL uses as many rows at once as our pack."""
    before = _peak_gib()
    if side == "ours":
        Ours(STEPS).run()
    else:
        name = "TRL padded, 16 rows"
        with tempfile.TemporaryDirectory() as folder:
            Trl(name, STEPS, folder, **SETTINGS[name]).run()
    print(json.dumps({"side": side, "libraries_gib": before, "peak_gib": _peak_gib()}))


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main(sys.argv[1])
