"""Starts the training API beside an engine; for `trainer serve --training` only."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, final

from trainer.errors import UserError

if TYPE_CHECKING:
    from trainer.control.meter import Meter
    from trainer.inference.source import ModelSource
    from trainer.serve.engine_process import SupervisedProcess
    from trainer.serve.gateway import Gateway
    from trainer.serve.training.executor_client import ExecutorClient
    from trainer.serve.training.front import TrainingFront
    from trainer.serve.training.guard import TrainingGuard


@final
@dataclass(frozen=True)
class Training:
    """The executor's process and what talks to it."""

    process: SupervisedProcess[ExecutorClient]
    front: TrainingFront


def refuse_training(arguments: argparse.Namespace) -> None:
    """Refuse what cannot work together with `--training`.

    Raises:
        UserError: says what, and the remedy.
    """
    if find_spec("google.protobuf") is None:
        raise UserError("--training needs protobuf: pip install 'tunesmith[training]'")
    if arguments.deployments:
        raise UserError("--training trains on one MODEL; it does not go with --deployments")
    if arguments.engine == "vllm":
        raise UserError(
            "--training samples from the embedded engine, which has the executor's adapters; leave --engine"
        )


def start_training(
    arguments: argparse.Namespace, gateway: Gateway, base: ModelSource, directory: Path, meter: Meter | None
) -> Training:
    """Begin to start the executor.

    Args:
        arguments: of the command line.
        gateway: samples for it.
        base: the model that is trained on.
        directory: for its socket; only the owner can read it.
        meter: of a server with accounts.
    """
    from trainer.serve.engine_process import SupervisedProcess
    from trainer.serve.training.executor_client import ExecutorClient
    from trainer.serve.training.front import TrainingFront
    from trainer.serve.training.guard import AccountGuard, KeyGuard

    model = base.model
    if arguments.training_dtype is not None:
        model = model.model_copy(update={"compute_dtype": arguments.training_dtype})
    words = ["--model", model.model_dump_json(), "--directory", arguments.training_dir]
    words += ["--slots", str(arguments.training_slots), "--lease-s", str(arguments.training_lease_s)]
    words += ["--max-rank", str(arguments.max_adapter_rank), "--checkpoint-s", str(arguments.training_checkpoint_s)]
    words += ["--micro-batch-tokens", str(arguments.micro_batch_tokens)]
    process = SupervisedProcess(words, directory / "executor.sock", ExecutorClient(), "trainer.api")
    process.launch()
    guard: TrainingGuard = KeyGuard(gateway.limits.api_key_digests)
    if meter is not None:
        guard = AccountGuard(meter, gateway.models.base.name)
    return Training(process, TrainingFront.of(gateway, process.client, guard, str(Path(model.path).resolve())))
