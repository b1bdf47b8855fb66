"""Examples and exit codes under `--help` of each command, and shell completion."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Final

from trainer.errors import LaunchError

EXAMPLES: Final[Mapping[str, tuple[str, ...]]] = {
    "init": (
        "trainer init                                     five questions",
        "trainer init --data chats.jsonl --yes            defaults for everything else",
        "trainer init --quickstart                        recipes, rows and a real small model",
    ),
    "import-config": (
        "trainer import-config axolotl.yml --out my.yaml",
        "trainer import-config trl.yaml --from trl --gpus 8",
    ),
    "check": (
        "trainer check my.yaml",
        "trainer check my.yaml --data --find refund       which tokens are trained",
        "trainer check my.yaml --set lora.rank=64 --shape h100x8",
    ),
    "train": (
        "trainer train my.yaml                            again, to resume",
        "trainer train my.yaml --set optimizer.learning_rate=1e-4 --name lower_rate",
    ),
    "shapes": ("trainer shapes my.yaml", "trainer shapes --print h100x8"),
    "verify-resume": ("trainer verify-resume my.yaml --kills 3 --steps 8",),
    "status": ("trainer status my_run --follow",),
    "rollouts": ("trainer rollouts my_run --step 10 --full",),
    "runs": ("trainer runs --json", "trainer runs --prometheus > /var/lib/node_exporter/trainer.prom"),
    "diff": ("trainer diff my_run other_run",),
    "logs": ("trainer logs my_run --follow", "trainer logs my_run --attempt 2 --lines 50"),
    "delete": ("trainer delete my_run --yes",),
    "sync": ("trainer sync my_run",),
    "export": (
        "trainer export my_run --merge",
        "trainer export my_run --merge --gguf q8_0 --ollama",
        "trainer export states/sft --merge --out merged      a saved state of the training API",
        "trainer export my_run --checkpoint 40 --push me/my-model",
    ),
    "chat": (
        "trainer chat my_run --against base",
        "trainer chat my_run --checkpoint 40 --temperature 0.7",
    ),
    "generate": (
        "trainer generate my_run prompts.jsonl --out answers.jsonl --samples 4 --temperature 1",
        "trainer generate my_run prompts.txt --text       as the tokens come",
    ),
    "eval": (
        "trainer eval my_run                              held-out rows, against the base",
        "trainer eval my_run --checkpoint 40 --against my_run",
        "trainer eval my_run --tasks my_task.yaml,arc_easy --rows 200",
    ),
    "serve": (
        "trainer serve my_run                             OpenAI's API on 127.0.0.1:8000",
        "trainer serve my_run --adapter b=other_run       several adapters of one base",
        "trainer serve my_run --engine vllm               vLLM behind the same API, for GPUs",
        "trainer serve models/base --training             tinker clients train on it (docs/training_api.md)",
    ),
    "batch": ("trainer batch create requests.jsonl --model my_run --out answers.jsonl",),
    "deploy": (
        "trainer deploy create orders --model my_run --enable-addons --max-replica-count 3",
        "trainer deploy update orders --model my_run_2    without a failed request",
        "trainer deploy list",
    ),
    "account": ("trainer account create team-a", "trainer account list --json"),
    "keys": (
        "trainer keys create team-a --scope inference --expires 90d",
        "trainer keys rotate 1f2e3d4c5b6a7980 --grace 1h",
    ),
    "quota": (
        "trainer quota set team-a requests_per_minute=60 credit=+10",
        "trainer quota set team-a tokens_per_minute=20000 --model my_run",
        "trainer quota get team-a",
    ),
    "usage": ("trainer usage --by account,model,addon,day", "trainer usage team-a --since 2026-11-01 --json"),
    "audit": ("trainer audit list --last 20", "trainer audit verify", "trainer audit export --out audit.jsonl"),
    "report": (
        "trainer report my_run                            one HTML page",
        "trainer report my_run other_run --out both.html",
        "trainer report my_run --serve                    a live page on this machine",
    ),
    "submit": ("trainer submit my.yaml --launcher slurm --partition gpu --time 4:00:00",),
    "jobs": ("trainer jobs --json",),
    "cancel": ("trainer cancel my_run",),
    "reconnect": ("trainer reconnect my_run --timeout 1200",),
    "doctor": ("trainer doctor --json",),
    "docs": ("trainer docs", "trainer docs data | less"),
    "completion": (
        "trainer completion bash > ~/.local/share/bash-completion/completions/trainer",
        "trainer completion zsh > ~/.zfunc/_trainer",
    ),
}
"""By command; a second column, after two spaces, says what an example does."""
EXIT_CODES: Final = """\
exit codes:
  0   finished
  2   you must change something; the message says what
  75  preempted: run the same command again
  1   anything else"""
SHELLS: Final = ("bash", "zsh", "tcsh")


def add_help(choices: Mapping[str, argparse.ArgumentParser]) -> None:
    """Put examples and exit codes under the help of each command.

    Args:
        choices: the parser of each command.
    """
    for name, parser in choices.items():
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        examples = EXAMPLES.get(name, ())
        lines = ["examples:", *(f"  {example}" for example in examples), ""] if examples else []
        parser.epilog = "\n".join([*lines, EXIT_CODES])


def print_completion(parser: argparse.ArgumentParser, shell: str) -> int:
    """Print the completion script of a shell.

    Raises:
        LaunchError: the package shtab is missing.
    """
    try:
        import shtab
    except ImportError:
        raise LaunchError("trainer completion needs the package shtab: pip install shtab") from None
    sys.stdout.write(shtab.complete(parser, shell=shell) + "\n")
    return 0
