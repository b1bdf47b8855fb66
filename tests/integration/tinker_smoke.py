"""Every endpoint, by the unmodified tinker client; run by an interpreter that has it. Prints one JSON document.

python tinker_smoke.py URL BASE_MODEL DATA.json
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["TINKER_TELEMETRY"] = "1"  # its requests are part of what must work
warnings.simplefilter("ignore")

import tinker  # noqa: E402
from tinker import types  # noqa: E402

url, base, data_file = sys.argv[1:]
steps = json.loads(Path(data_file).read_text(encoding="utf-8"))
said: dict[str, Any] = {"version": version("tinker")}


def datum(row: dict[str, Any]) -> types.Datum:
    return types.Datum(model_input=types.ModelInput.from_ints(row["tokens"]), loss_fn_inputs=row["inputs"])


def refusal(future: Any) -> str:
    try:
        future.result()
    except tinker.TinkerError as error:
        return str(error)
    return "not refused"


service = tinker.ServiceClient(base_url=url, api_key="tml-none", user_metadata={"who": "smoke"})
rest = tinker.RestClient(base_url=url, api_key="tml-none")
said["models"] = [each.model_name for each in rest.get_server_capabilities().result().supported_models]
model = service.create_lora_training_client(base_model=base, rank=4, seed=1).result()
said["info"] = model.get_info().model_dump()
adam = types.AdamParams(learning_rate=1e-2, beta1=0.9, beta2=0.95, eps=1e-8)
losses, tokenizer = [], model.get_tokenizer()
for rows in steps:
    passed, updated = model.forward_backward([datum(row) for row in rows], "cross_entropy"), model.optim_step(adam)
    losses.append(passed.result().metrics["loss:sum"])
    said["update"] = updated.result().metrics
said["losses"] = losses
path = model.save_state("smoke", user_metadata={"a": "b"}).result().path
rows = [datum(row) for row in steps[0]]
said["forward"] = model.forward(rows, "cross_entropy").result().metrics["loss:sum"]
resumed = service.create_training_client_from_state_with_optimizer(path).result()
said["resumed"] = resumed.forward(rows, "cross_entropy").result().metrics["loss:sum"]
fresh = service.create_training_client_from_state(path).result()
said["fresh"] = fresh.forward(rows, "cross_entropy").result().metrics["loss:sum"]
model.load_state(path).result()
said["policy"] = {}
for loss in ("importance_sampling", "ppo", "cispo", "gspo"):
    policy = []
    for row in steps[0]:
        count = len(row["tokens"])
        inputs = {
            "target_tokens": row["inputs"]["target_tokens"],
            "logprobs": [-5.0] * count,
            "advantages": [0.1] * count,
            **({"sequence_ratio_mask": [1.0] * count} if loss == "gspo" else {}),
        }
        policy.append(datum({"tokens": row["tokens"], "inputs": inputs}))
    said["policy"][loss] = model.forward_backward(policy, loss).result().metrics
said["unknown"] = refusal(model.forward_backward(rows, "dro"))
said["after"] = refusal(model.optim_step(adam))
sampler = model.save_weights_and_get_sampling_client().result()
prompt, params = types.ModelInput.from_ints(steps[0][0]["tokens"]), types.SamplingParams(max_tokens=4, stop=[])
drawn = sampler.sample(prompt, 2, params, topk_sample_logprobs=2).result()
said["drawn"] = [[len(each.tokens), len(each.logprobs), each.stop_reason] for each in drawn.sequences]
said["prompt"] = sampler.compute_logprobs(prompt).result()
named = model.save_weights_for_sampler("named").result().path
for each in (service.create_sampling_client(model_path=named), service.create_sampling_client(base_model=base)):
    assert len(each.result().sample(prompt, 1, params).result().sequences[0].tokens) == 4
said["listed"] = sorted(each.checkpoint_id for each in rest.list_checkpoints(model.model_id).result().checkpoints)
said["weights"] = rest.get_weights_info_by_tinker_path(path).result().model_dump()
said["run"] = rest.get_training_run(model.model_id).result().lora_rank
said["runs"] = len(rest.list_training_runs().result().training_runs)
session = service.holder.get_session_id()
said["session"] = rest.get_session(session).result().training_run_ids
rest.delete_checkpoint_from_tinker_path(named).result()
said["left"] = sorted(each.checkpoint_id for each in rest.list_checkpoints(model.model_id).result().checkpoints)
try:
    import torch
except ImportError:
    said["custom"] = None
else:

    def custom(_data: Any, logprobs: Any) -> tuple[Any, dict[str, float]]:
        return -torch.cat(logprobs).sum(), {"mine": 1.0}

    said["custom"] = fresh.forward_backward_custom(rows, custom).result().metrics
service.close("success").result()
print(json.dumps(said))
