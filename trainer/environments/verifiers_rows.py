"""Write the rows of a taskset: `INTERPRETER -m trainer.environments.verifiers_rows TASKSET > rows.jsonl`.

One line for each task, with its number and a hash by which a run notices that the taskset has changed.
"""

from __future__ import annotations

import argparse
import json
import sys

from trainer.environments.verifiers_adapter import load_tasks
from trainer.errors import RewardError


def main() -> int:
    """Print the rows; 2 if the taskset cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("taskset")
    parser.add_argument("--config", type=json.loads, default={}, help="fields of the taskset's configuration, as JSON")
    arguments = parser.parse_args()
    sys.path.insert(0, "")
    try:
        _, tasks = load_tasks(arguments.taskset, arguments.config, 1)
    except RewardError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    for number, task in enumerate(tasks):
        sys.stdout.write(json.dumps({"task": number, "hash": task.hash}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
