"""Reads the trained weights of a checkpoint, without the state of the optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException

from trainer.checkpoints.reader import SafeReader
from trainer.errors import CheckpointError
from trainer.training.learner import MASTER_PREFIX


def read_masters(directory: Path, parameters: Mapping[str, torch.Tensor]) -> None:
    """Read the float32 masters of a checkpoint into tensors, by the names of the parameters.

    Args:
        directory: the checkpoint; its files were verified.
        parameters: unsharded tensors, which are overwritten.

    Raises:
        CheckpointError: it cannot be read, or has other parameters.
    """
    masters = {MASTER_PREFIX + name: parameter.detach() for name, parameter in parameters.items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # DCP warns when there is a single process
            state_dict_loader.load(masters, storage_reader=SafeReader(directory), no_dist=True)
    except (Exception, CheckpointException) as error:  # DCP wraps whatever happened
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        first = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        raise CheckpointError(f"{directory}: cannot be read: {first}") from error
