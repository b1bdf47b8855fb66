"""`python -m trainer.api`: load the base model and do the requests of a gateway."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import threading
from pathlib import Path

import torch

from trainer.api.executor import Executor
from trainer.api.limits import Limits
from trainer.api.server import Server
from trainer.api.slots import Base
from trainer.api.store import Store
from trainer.config.recipe import ModelSettings
from trainer.data.chat import load_tokenizer
from trainer.data.stop_tokens import stop_token_ids
from trainer.errors import TrainerError
from trainer.files import make_directory
from trainer.model.quiet import quiet_transformers
from trainer.run.lock import hold
from trainer.run.surroundings import end_with_parent

SWITCH_S = 5e-4
"""How long the computing thread may keep the interpreter while the socket has something to do."""


def main(argv: list[str] | None = None) -> int:
    """Serve until the process that started this one closes standard input, or until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m trainer.api", description=__doc__)
    parser.add_argument("--model", required=True, help="model settings as JSON")
    parser.add_argument("--socket", required=True, type=Path)
    parser.add_argument("--directory", required=True, type=Path, help="of sessions, models and states")
    parser.add_argument("--micro-batch-tokens", type=int, default=4096)
    parser.add_argument("--slots", type=int, default=Limits.slots)
    parser.add_argument("--lease-s", type=float, default=Limits.lease_s)
    parser.add_argument("--max-rank", type=int, default=Limits.max_rank)
    parser.add_argument("--checkpoint-s", type=float, default=Limits.checkpoint_s)
    arguments = parser.parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    quiet_transformers()
    sys.setswitchinterval(SWITCH_S)
    threading.Thread(target=end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the gateway, which ends this process
    directory: Path = arguments.directory
    try:
        make_directory(directory)
        refusal = f"{directory}: another server uses it; choose another --training-dir"
        with hold(directory / "lock", refusal, directory / "alive.json"):
            asyncio.run(_serve(arguments))
    except TrainerError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    os._exit(0)


async def _serve(arguments: argparse.Namespace) -> None:
    settings = ModelSettings.model_validate_json(arguments.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = Base(settings, device, micro_batch_tokens=arguments.micro_batch_tokens)
    limits = Limits(arguments.slots, arguments.lease_s, arguments.max_rank, arguments.checkpoint_s)
    executor = Executor(base, Store(arguments.directory), limits)
    tokenizer = load_tokenizer(settings)
    hello = {
        "hello": "trainer.api",
        "window": base.window,
        "vocab": base.vocab,
        "dtype": str(base.policy.compute_dtype).removeprefix("torch."),
        "arch": base.policy.config.get("model_type"),
        "stop_ids": sorted(stop_token_ids(tokenizer, settings.path)),
    }
    server = Server(executor, arguments.socket, hello)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, server.stop)
    await server.serve()


if __name__ == "__main__":
    sys.exit(main())
