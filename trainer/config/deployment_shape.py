"""Deployment shapes: what one replica of a deployment runs on, and its limits."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Final, Literal

from pydantic import PositiveInt, model_validator

from trainer.config.document import read_document
from trainer.config.load import config_dirs
from trainer.config.section import Section
from trainer.config.validate import validate
from trainer.errors import RecipeError, ShapeError

QUANTIZED: Final = ("fp8", "fp4")


class ReplicaLimits(Section):
    """Limits of one replica."""

    kv_cache_tokens: PositiveInt
    """Tokens of the cache of keys and values."""
    max_rows: PositiveInt
    """Sequences continued in one step."""
    max_queue: PositiveInt
    """Sequences in flight in the whole deployment; further requests get 429."""


class DeploymentShape(Section):
    """Device, precision, engine and limits of one replica."""

    name: str
    """Name used with `--deployment-shape`."""
    device: Literal["cpu", "cuda"]
    """Device type as torch names it."""
    device_name: str
    """Device name, as in the price table: `CPU`, `H100-80G`."""
    devices: PositiveInt = 1
    """Devices of one replica."""
    precision: Literal["auto", "bfloat16", "float32", "fp8", "fp4"] = "auto"
    """Of the weights; `auto` is that of the run or the model."""
    engine: Literal["embedded", "vllm"] = "embedded"
    """What continues token sequences."""
    addons: bool = True
    """Whether adapters can be loaded; never with fp8 or fp4."""
    limits: ReplicaLimits

    def need_addons(self) -> None:
        """Check that adapters can be loaded.

        Raises:
            ShapeError: they cannot.
        """
        if not self.addons:
            raise ShapeError(f"deployment shape {self.name} has precision {self.precision} and takes no addons")

    def need_local(self) -> None:
        """Check that the backend `local` can start it.

        Raises:
            ShapeError: it cannot.
        """
        if self.engine != "embedded" or self.device != "cpu":
            raise ShapeError(
                f"deployment shape {self.name}: the local backend starts the embedded engine on CPUs; it does not "
                f"start {self.engine} on {self.device}"
            )

    @model_validator(mode="after")
    def _quantized_without_addons(self) -> DeploymentShape:
        if self.addons and self.precision in QUANTIZED:
            raise ValueError(f"precision {self.precision} cannot have addons: set addons to false")
        return self


def find_deployment_shape(name: str) -> DeploymentShape:
    """The shape of a name: a file of configs/deployments, those of the working directory first.

    Raises:
        ShapeError: there is none; names those that there are.
        RecipeError: its file has mistakes, each with file and line.
    """
    files: dict[str, Path] = {}
    for directory in config_dirs("deployments"):
        for file in sorted(directory.glob("*.yaml")):
            files.setdefault(file.stem, file)
    if name not in files:
        near = difflib.get_close_matches(name, files, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"there are {', '.join(sorted(files))}"
        raise ShapeError(f"no deployment shape `{name}`; {hint}")
    document = read_document(files[name])
    shape, wrong = validate(DeploymentShape, document.data)
    mistakes = document.mistakes + [f"{document.where(path)}: {text}" for path, text in wrong.items()]
    if mistakes or shape is None:
        raise RecipeError(mistakes)
    return shape
