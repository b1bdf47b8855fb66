"""Training shapes: a named hardware layout and what is known to fit on it."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from trainer.config.section import Section


class ShapeLimit(Section):
    """The largest job known, or thought, to fit."""

    max_params_b: PositiveFloat
    """Base parameters in billions."""
    max_seq_tokens: PositiveInt
    """Longest sequence in tokens."""
    basis: Literal["measured", "estimated"]
    """Whether the two limits above were run or computed."""


class ShapeLimits(Section):
    """Limits by kind of training."""

    lora: ShapeLimit
    """With low-rank adapters on a frozen base."""
    full: ShapeLimit | None = None
    """With every parameter trained; null: full-parameter training does not fit."""


class ShapeRate(Section):
    """How fast a device of the shape trains, for the time estimate of `check`."""

    tflops: PositiveFloat
    """Model FLOP/s (10**12, recomputation not counted) that training reaches per device."""
    basis: Literal["measured", "estimated"]
    """Whether the rate was run or computed."""


class TrainingShape(Section):
    """How many of which device, and the largest job known to fit on them."""

    name: str
    """What recipes and `--shape` call it."""
    device: Literal["cpu", "cuda"]
    """What torch calls the devices."""
    device_name: str
    """For people, for example `H100-80G`."""
    nodes: PositiveInt = 1
    """Machines in all."""
    gpus: NonNegativeInt
    """Number of devices in all; 0 trains on the CPU."""
    gpu_memory_gib: PositiveFloat
    """Memory of each device (2**30 bytes); of the host when gpus is 0."""
    micro_batch_tokens: PositiveInt
    """Tokens of one forward-backward pass per device; more are accumulated."""
    sharding: Literal["none", "full"] = "none"
    """`full` shards the base model's parameters over all ranks (FSDP2)."""
    vllm_gpus: NonNegativeInt = 0
    """Devices that vLLM has for itself, the last ones of the machine; training ranks have the others."""
    limits: ShapeLimits
    """The largest jobs for LoRA and for full-parameter training."""
    rate: ShapeRate | None = None
    """null: no time estimate is given."""
    accelerate: str
    """Launcher configuration in configs/accelerate/."""

    @property
    def num_ranks(self) -> int:
        """Training processes over all nodes."""
        return max(1, self.gpus - self.vllm_gpus)

    @property
    def ranks_per_node(self) -> int:
        """Processes on each node."""
        return max(1, self.num_ranks // self.nodes)
