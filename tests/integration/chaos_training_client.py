"""A training loop on the unmodified tinker client that survives being killed: run it again and it goes on.

    python chaos_training_client.py URL BASE_MODEL STEPS DIRECTORY

DIRECTORY has data.json, a list of the rows of each step; losses.jsonl and states.jsonl grow there.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")
os.environ["TINKER_TELEMETRY"] = "0"

import tinker  # noqa: E402
from tinker import types  # noqa: E402

SAVE_EVERY = 2
url, base, steps, directory = sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
data = json.loads((directory / "data.json").read_text())


def append(name: str, document: dict[str, Any]) -> None:
    with (directory / name).open("a", encoding="utf-8") as file:
        file.write(json.dumps(document) + "\n")
        file.flush()
        os.fsync(file.fileno())


def last_state() -> dict[str, Any] | None:
    file = directory / "states.jsonl"
    lines = [line for line in file.read_text().splitlines() if line.endswith("}")] if file.is_file() else []
    return json.loads(lines[-1]) if lines else None


service = tinker.ServiceClient(base_url=url, api_key="tml-none")
state = last_state()
if state is None:
    model, begin = service.create_lora_training_client(base_model=base, rank=4, seed=1).result(), 0
else:
    model = service.create_training_client_from_state_with_optimizer(state["path"]).result()
    begin = int(state["step"])
for step in range(begin, steps):
    if step % SAVE_EVERY == 0 and step > begin:
        path = model.save_state(f"step-{step}").result().path
        append("states.jsonl", {"step": step, "path": path})
    rows = [
        types.Datum(model_input=types.ModelInput.from_ints(row["tokens"]), loss_fn_inputs=row["inputs"])
        for row in data[step % len(data)]
    ]
    passed = model.forward_backward(rows, "cross_entropy")
    updated = model.optim_step(types.AdamParams(learning_rate=1e-2, beta1=0.9, beta2=0.95, eps=1e-8))
    loss, number = passed.result().metrics["loss:sum"], updated.result().metrics["updates"]
    append("losses.jsonl", {"step": step, "loss": loss, "updates": number, "pid": os.getpid()})
append("losses.jsonl", {"step": steps, "loss": 0.0, "updates": steps, "pid": os.getpid()})
