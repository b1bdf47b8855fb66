"""Prove a refactor: the same trainings by two checkouts must leave the same metrics and weights.

Both checkouts run with this one's virtual environment, one process of each at a time, on one thread. Compared are every
record of metrics.jsonl (without `time` and `perf/`) and every safetensors file of the run, byte for byte.

    quickstarts       both, on the real model, 6 steps
    recipes           every shipped recipe on a tiny model, 2 steps
    ranks             SFT and RFT on two gloo ranks; LoRA and full parameters with a sharded base
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import transformers
import yaml
from tiny import tiny_model_dir

HERE: Final = Path(__file__).resolve().parent.parent
TORCHRUN: Final = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
TINY: Final = [
    "model.revision=null", "model.compute_dtype=float32", "model.gradient_checkpointing=false", "shape=cpu", "steps=2",
    "epochs=null", "optimizer.warmup_steps=0", "rows_per_step=2", "eval_interval=0", "data.eval_rows=2",
    "data.max_seq_tokens=4096", "data.overlong=truncate",
]  # fmt: skip
"""What is replaced in a shipped recipe so that it runs on a tiny model in seconds."""
TINY_RFT: Final = [
    "data.overlong=error", "rollout.sampler=local", "rollout.group_size=2", "rollout.eval_samples=1",
    "rollout.max_completion_tokens=8", "rollout.refill=false", "algorithm.overlong=keep",
    "algorithm.minibatches_per_step=1", "reward_limits.max_failed_frac=1.0",
]  # fmt: skip
GSM8K: Final = [
    {"question": "Tom has 3 apples and buys 4. How many has he?", "answer": "He has 3 + 4 = 7.\n#### 7"},
    {"question": "Ann has 9 pens and loses 5. How many are left?", "answer": "9 - 5 = 4 are left.\n#### 4"},
    {"question": "Two boxes hold 6 eggs each. How many eggs?", "answer": "2 * 6 = 12 eggs.\n#### 12"},
]
"""Rows of this form for the recipes that read GSM8K from a hub."""
LIMIT: Final = {"max_params_b": 1, "max_seq_tokens": 4096, "basis": "estimated"}


@final
@dataclass(frozen=True)
class Case:
    """One training that both checkouts run."""

    name: str
    recipe: str
    overrides: tuple[str, ...]
    shape: str | None = None
    """A file; None is the recipe's own."""
    ranks: int = 1

    def argv(self) -> list[str]:
        """The command, relative to the working directory."""
        argv = [sys.executable, *(TORCHRUN if self.ranks == 2 else []), "-m", "trainer.worker", self.recipe]
        argv += ["--name", self.name, *(part for text in self.overrides for part in ("--set", text))]
        return argv + (["--shape", self.shape] if self.shape is not None else [])


def main() -> int:
    """Run all cases; returns 1 where a number differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="a checkout of the code before the change")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="cases whose name begins so")
    arguments = parser.parse_args()
    different = 0
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="same-numbers-") as directory:
        homes = {"old": Path(directory) / "old", "new": Path(directory) / "new"}
        for home, checkout in zip(homes.values(), (arguments.old, HERE), strict=True):
            _prepare(home, checkout)
        cases = [case for case in _cases() if not arguments.only or case.name.startswith(tuple(arguments.only))]
        for case in [case for case in cases if _is_new(case, arguments.old)]:
            print(f"{case.name}: not compared, the old checkout has no such recipe", flush=True)
        cases = [case for case in cases if not _is_new(case, arguments.old)]
        for case in cases:
            processes = {which: _start(case, home) for which, home in homes.items()}
            codes = {which: process.wait() for which, process in processes.items()}
            if any(codes.values()):
                different += 1
                failed = next(which for which, code in codes.items() if code)
                log = (homes[failed] / f"{case.name}.log").read_text().splitlines()[-15:]
                print(f"{case.name}: the {failed} checkout failed ({codes[failed]}):", *log, sep="\n  ")
                continue
            problems = _differences(homes["old"] / "runs" / case.name, homes["new"] / "runs" / case.name)
            different += bool(problems)
            print(f"{case.name}: {'equal' if not problems else '; '.join(problems)}", flush=True)
    print(f"{len(cases) - different} of {len(cases)} trainings are equal to the bit")
    return 1 if different else 0


def _is_new(case: Case, old: Path) -> bool:
    return case.recipe.startswith("recipes/") and not (old / case.recipe).is_file()


def _prepare(home: Path, checkout: Path) -> None:
    """A working directory whose code, recipes and rows are the checkout's; the tiny models are made by this one."""
    home.mkdir()
    for name in ("datasets", "configs", "recipes"):
        (home / name).symlink_to(checkout / name)
    (home / "trainer").symlink_to(checkout / "trainer")  # the working directory precedes the installed package
    (home / "models").symlink_to(HERE / "models")
    for arch in ("llama", "qwen3", "mixtral"):
        tiny_model_dir(home / "tiny" / arch, arch)
    _write_rows(home / "gsm8k.jsonl", GSM8K)
    _write_rows(home / "gsm8k_held_out.jsonl", GSM8K[:2])
    _write_rows(home / "chats.jsonl", [_chat(number) for number in range(24)])
    _write_rows(home / "chats_held_out.jsonl", [_chat(number) for number in range(100, 108)])
    _write_rows(home / "prompts.jsonl", [_prompt(number) for number in range(24)])
    _write_rows(home / "prompts_held_out.jsonl", [_prompt(number) for number in range(100, 108)])
    for name, sharding in (("two", "none"), ("sharded", "full")):
        shape = {
            "name": name, "device": "cpu", "device_name": "CPU", "gpus": 2, "gpu_memory_gib": 16, "sharding": sharding,
            "micro_batch_tokens": 256, "accelerate": "cpu", "limits": {"lora": LIMIT, "full": LIMIT},
        }  # fmt: skip
        (home / f"{name}.yaml").write_text(json.dumps(shape))
    for name, recipe in _RECIPES.items():
        (home / f"{name}.yaml").write_text(json.dumps(recipe))


def _chat(number: int) -> dict[str, Any]:
    question = f"what is the sum of {number} and {3 * number}?" + " please" * (number % 5)
    answer = f"the answer is {4 * number}." + " and 12 cats" * (number % 3)
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _prompt(number: int) -> dict[str, Any]:
    return {"messages": _chat(number)["messages"][:1]}


_COMMON: Final[dict[str, Any]] = {
    "model": {"path": "tiny/llama", "compute_dtype": "float32"}, "lora": {"rank": 4, "alpha": 8}, "rows_per_step": 6,
    "steps": 4, "optimizer": {"learning_rate": 1e-3, "schedule": "constant"}, "eval_interval": 2,
    "dcp_save_interval": 2, "shape": "cpu",
}  # fmt: skip
_RECIPES: Final[dict[str, dict[str, Any]]] = {
    "sft": _COMMON
    | {
        "name": "sft", "method": "sft",
        "data": {"train": "chats.jsonl", "eval": "chats_held_out.jsonl", "max_seq_tokens": 128},
    },
    "rft": _COMMON
    | {
        "name": "rft", "method": "rft", "algorithm": {"minibatches_per_step": 2},
        "data": {"train": "prompts.jsonl", "eval": "prompts_held_out.jsonl", "eval_rows": 6, "max_seq_tokens": 128},
        "rollout": {"group_size": 4, "max_completion_tokens": 10, "chunk_prompts": 1, "eval_samples": 2},
        "rewards": [{"use": "regex_match", "args": {"pattern": "[0-9]", "search": True}}],
    },
}  # fmt: skip


def _cases() -> list[Case]:
    cases = [
        Case("quickstart_sft", "recipes/sft_quickstart.yaml", ("steps=6", "data.eval_rows=8")),
        Case("quickstart_rft", "recipes/rft_quickstart.yaml", ("steps=6", "data.eval_rows=8")),
        Case("ranks_sft", "sft.yaml", (), "two.yaml", 2),
        Case("ranks_rft", "rft.yaml", (), "two.yaml", 2),
        *(Case(f"sharded_{arch}", "sft.yaml", (f"model.path=tiny/{arch}",), "sharded.yaml", 2) for arch in _SHARDED),
        Case("sharded_full", "sft.yaml", ("lora=null",), "sharded.yaml", 2),
        Case("full", "sft.yaml", ("lora=null",)),
        Case("dropout_dora", "sft.yaml", ("lora.dropout=0.1", "lora.dora=true")),
        *(Case(f"algorithm_{name}", "rft.yaml", (f"algorithm.name={name}",)) for name in _ALGORITHMS),
    ]
    return cases + [_tiny(path) for path in sorted((HERE / "recipes").glob("*.yaml"))]


_SHARDED: Final = ("llama", "qwen3", "mixtral")
_ALGORITHMS: Final = ("grpo", "gspo", "cispo", "dr_grpo")


def _tiny(path: Path) -> Case:
    """A shipped recipe on a tiny model of its architecture."""
    written = yaml.safe_load(path.read_text())
    overrides = [f"model.path=tiny/{'qwen3' if 'qwen3' in path.stem else 'llama'}", *TINY]
    overrides += TINY_RFT if written["method"] == "rft" else []
    if "gsm8k" in path.read_text():
        overrides += ["data.train.path=gsm8k.jsonl", "data.eval.path=gsm8k_held_out.jsonl"]
    if isinstance(written.get("lora"), dict) and written["lora"].get("warm_start"):
        overrides.append("lora.warm_start=null")
    if "sql_agent" in path.stem:  # the tiny model's own template shows no tools
        overrides.append("model.chat_template=hermes")
    return Case(f"recipe_{path.stem}", f"recipes/{path.name}", tuple(overrides))


def _start(case: Case, home: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(home), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    with (home / f"{case.name}.log").open("wb") as log:
        return subprocess.Popen(case.argv(), cwd=home, env=environment, stdout=log, stderr=subprocess.STDOUT)


def _differences(old: Path, new: Path) -> list[str]:
    """What differs between two runs, for people; empty where they are equal."""
    problems = []
    before, after = _metrics(old), _metrics(new)
    if len(before) != len(after):
        problems.append(f"{len(before)} records of metrics against {len(after)}")
    for ours, theirs in zip(after, before, strict=False):
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                problems.append(f"step {theirs['step']}: {name} {theirs.get(name)} -> {ours.get(name)}")
    if _weights(old) != _weights(new):
        problems.append("weights differ")
    return problems[:6]


def _metrics(run: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "time" and not k.startswith("perf/")} for record in records]


def _weights(run: Path) -> dict[str, str]:
    """Digest of every file of trained weights; there must be one."""
    files = sorted(run.glob("adapter*/*.safetensors")) + sorted(run.glob("model*/*.safetensors"))
    assert files, f"{run}: no weights"
    return {str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
