"""The optimizers of the float32 masters: AdamW, with its moments in float32 or in 8 bits; for the learner only.

In 8 bits (arXiv:2110.02861) each block of 256 values has a scale of its own. bitsandbytes keeps the moments of small
parameters in float32.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, Final, final

import torch

from trainer.config.recipe import OptimizerName
from trainer.config.unsupported import EIGHT_BIT_MISSING, EIGHT_BIT_SHARDED
from trainer.errors import ModelError
from trainer.training.schedule import AdamParams

_CONSTANTS: Final = ("qmap1", "qmap2")
"""Entries of bitsandbytes' state that are the same in every run: the values that 8 bits stand for."""


class MasterOptimizer(ABC):
    """Updates masters from their gradients."""

    def __init__(self, made: torch.optim.Optimizer) -> None:
        """Keep torch's optimizer; see `make_optimizer`."""
        self.made = made

    def step(self, adam: AdamParams) -> None:
        """Make one update.

        Args:
            adam: its parameters.
        """
        for group in self.made.param_groups:
            group["lr"], group["betas"], group["eps"] = adam.learning_rate, (adam.beta1, adam.beta2), adam.epsilon
            group["weight_decay"] = adam.weight_decay if group["is_decayed"] else 0.0
        self.made.step()

    @abstractmethod
    def state_of(self, master: torch.Tensor) -> dict[str, torch.Tensor]:
        """The state of a master that a checkpoint holds, as tensors that a load may write into.

        Args:
            master: its state is created if it has none yet.
        """

    def restore(self, updates: int) -> None:
        """Continue after a load into the tensors of `state_of`.

        Args:
            updates: made before.
        """
        del updates

    def clear(self) -> None:
        """Begin as if no update had been made."""
        self.made.state.clear()


@final
class AdamW(MasterOptimizer):
    """Moments in float32."""

    def state_of(self, master: torch.Tensor) -> dict[str, torch.Tensor]:
        """`step`, `exp_avg` and `exp_avg_sq`."""
        state: dict[str, torch.Tensor] = self.made.state[master]
        if not state:  # torch creates it at the first update
            state["step"] = torch.zeros((), device=master.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
        return state


@final
class AdamW8bit(MasterOptimizer):
    """Moments in 8 bits, and a float32 scale for each block."""

    def state_of(self, master: torch.Tensor) -> dict[str, torch.Tensor]:
        """`state1` and `state2`, and `absmax1` and `absmax2` where these are in 8 bits; the count of updates is not."""
        made: Any = self.made
        if not made.initialized:
            made.check_overrides()
            made.to_gpu()
            made.initialized = True
        if not made.state[master]:
            group, number, index = next(
                (group, number, index)
                for number, group in enumerate(made.param_groups)
                for index, member in enumerate(group["params"])
                if member is master
            )
            made.init_state(group, master, number, index)
        state = made.state[master]
        return {name: each for name, each in state.items() if torch.is_tensor(each) and name not in _CONSTANTS}

    def restore(self, updates: int) -> None:
        """Set the count of updates, from which the moments' bias is corrected."""
        for state in self.made.state.values():
            state["step"] = updates


def make_optimizer(masters: Iterable[torch.Tensor], name: OptimizerName, *, is_sharded: bool) -> MasterOptimizer:
    """The optimizer of the masters; weights of matrices are decayed, others are not.

    Args:
        masters: float32, with gradients.
        name: the recipe's.
        is_sharded: whether each rank has a part of each.

    Raises:
        ModelError: bitsandbytes is missing, or the masters are sharded, which it does not support.
    """
    parameters = list(masters)
    decayed = [master for master in parameters if master.ndim >= 2]
    plain = [master for master in parameters if master.ndim < 2]
    groups = [{"params": decayed, "is_decayed": True}, {"params": plain, "is_decayed": False}]
    groups = [group for group in groups if group["params"]]
    if name == "adamw":
        return AdamW(torch.optim.AdamW(groups, fused=True))
    if is_sharded:
        raise ModelError(f"the shape {EIGHT_BIT_SHARDED}")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(EIGHT_BIT_MISSING)
    from bitsandbytes.optim import AdamW8bit as Made

    return AdamW8bit(Made(groups))
