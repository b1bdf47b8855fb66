"""Training shapes: named hardware layouts, with the largest jobs that fit."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from trainer.config.section import Section


class ShapeLimit(Section):
    """Bounds that no recipe passes, each alone; whether a recipe fits is decided by its own memory estimate."""

    max_params_b: PositiveFloat
    """Parameters of the base model in billions, with short rows and gradient checkpointing."""
    max_seq_tokens: PositiveInt
    """Maximum sequence length in tokens, with a small model and gradient checkpointing."""
    basis: Literal["measured", "estimated"]
    """Whether these two limits were measured in runs or estimated."""


class ShapeLimits(Section):
    """Limits for LoRA and for full-parameter training."""

    lora: ShapeLimit
    """Limit with low-rank adapters on a frozen base model."""
    full: ShapeLimit | None = None
    """Limit with every parameter trained; null if full-parameter training is not supported."""


class ShapeRate(Section):
    """Training speed of one device, used by `check` to estimate device-hours."""

    tflops: PositiveFloat
    """Model TFLOP/s per device during training; recomputed activations are not counted."""
    basis: Literal["measured", "estimated"]
    """Whether the rate was measured in runs or estimated."""


class TrainingShape(Section):
    """Number and kind of devices, and the largest jobs that fit on them."""

    name: str
    """Name used in recipes and with `--shape`."""
    device: Literal["cpu", "cuda"]
    """Device type as torch names it."""
    device_name: str
    """Device name for display, for example `H100-80G`."""
    nodes: PositiveInt = 1
    """Number of machines."""
    gpus: NonNegativeInt
    """Total number of devices; 0 trains on the CPU."""
    gpu_memory_gib: PositiveFloat
    """Memory per device in GiB (2**30 bytes); of the host if `gpus` is 0."""
    micro_batch_tokens: PositiveInt
    """Maximum tokens per device in one forward-backward pass; gradients are accumulated over several passes."""
    sharding: Literal["none", "full", "node"] = "none"
    """`full` shards the parameters of the base model over all ranks (FSDP2); `node` over the ranks of each machine,
    every machine holding a copy (HSDP): parameters are then gathered inside a machine only."""
    context_parallel: PositiveInt = 1
    """Neighbouring ranks that compute each pack together, every rank a slice of its tokens (sft only): for rows that do
    not fit on one device. Their keys and values are gathered in every layer."""
    vllm_gpus: NonNegativeInt = 0
    """Devices reserved for vLLM: the last ones of the machine. Training ranks use the others."""
    vllm_python: str | None = None
    """Interpreter of the environment in which vLLM is installed on these machines."""
    limits: ShapeLimits
    """The largest jobs for LoRA and for full-parameter training."""
    rate: ShapeRate | None = None
    """Training speed; without it no device-hours are estimated."""
    idle_spin: NonNegativeInt | None = None
    """How long idle CPU threads spin before they sleep (`GOMP_SPINCOUNT`); null chooses by load and cgroup quota."""
    accelerate: str
    """Name of the `accelerate` configuration in configs/accelerate/."""

    @model_validator(mode="after")
    def _groups_are_whole(self) -> Self:
        """Every rank belongs to a group of `context_parallel` ranks.

        Raises:
            ValueError: Some would not.
        """
        if self.num_ranks % self.context_parallel:
            raise ValueError(
                f"context_parallel: {self.context_parallel} does not divide the {self.num_ranks} training ranks of the "
                "shape"
            )
        return self

    @property
    def num_ranks(self) -> int:
        """Number of training processes over all nodes."""
        return max(1, self.gpus - self.vllm_gpus)

    @property
    def num_shards(self) -> int:
        """Number of ranks that hold one copy of the base model together; 1 if each holds all of it."""
        return {"none": 1, "full": self.num_ranks, "node": self.ranks_per_node}[self.sharding]

    @property
    def ranks_per_node(self) -> int:
        """Number of training processes on each node."""
        return max(1, self.num_ranks // self.nodes)

    @property
    def num_shares(self) -> int:
        """Number of parts that the rows of a step are dealt into: the groups of ranks that compute packs together."""
        return self.num_ranks // self.context_parallel

    @property
    def pack_tokens(self) -> int:
        """Maximum tokens of a pack of several sequences, over all ranks that compute it together."""
        return self.micro_batch_tokens * self.context_parallel
