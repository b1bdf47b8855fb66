"""The learner: forward_backward accumulates sums, optim_step makes one update over all ranks.

Loss terms are per token and unreduced; their sums are divided by the denominator of the whole step over all ranks, so
the split into micro-batches, packs and ranks changes gradients only by rounding. Gradient sums and optimizer state are
float32. Where the model computes in bfloat16, its trained parameters are a rounded copy of float32 masters.

All ranks get the same sums and decide alike: an update whose loss or gradient is not finite is skipped by all ranks,
and an update that one rank abandons is abandoned by all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, final

import torch

from trainer.algorithms import LossTerms
from trainer.distributed.sharding import is_sharded, local_of, placed_like, whole_of
from trainer.distributed.world import World
from trainer.errors import PreemptedError
from trainer.model.adapters import RUN_ADAPTER
from trainer.model.batch import Batch
from trainer.model.policy import Policy, Scores
from trainer.training.measured import Measured, PackSums
from trainer.training.schedule import AdamParams

Loss = Callable[[Scores, Batch], LossTerms]
"""From the scores of a pack to unreduced terms."""
MASTER_PREFIX: Final = "masters/"
"""Of the names of float32 masters in a checkpoint."""


@final
@dataclass(frozen=True)
class PackResult:
    """What `forward_backward` returns for a pack of N trained tokens."""

    logprobs: torch.Tensor
    """[N] under the policy, detached."""
    measured: PackSums | None
    """None for a dummy batch."""

    @property
    def sums(self) -> Mapping[str, float]:
        """Sums over the pack's trained tokens; empty for a dummy batch.

        They are `loss`, each metric of the loss, `entropy` if asked for, and `tokens`, which is N. Reading them waits
        for a GPU.
        """
        return {} if self.measured is None else self.measured.read()


@final
@dataclass(frozen=True)
class Update:
    """What `optim_step` returns."""

    metrics: dict[str, float]
    """`loss`, `grad_norm` (before clipping), `learning_rate`, `tokens`, and the mean of each metric over tokens. Of a
    skipped update: `learning_rate`, `tokens`, and `skipped`, which is 1."""
    skipped_rows: tuple[str, ...] = ()
    """File and line of the rows behind a skipped update."""


@final
class Learner:
    """Owns the float32 masters of one adapter (or of the full model), their gradients and the optimizer."""

    def __init__(
        self,
        policy: Policy,
        world: World,
        is_urgent: Callable[[], bool] = lambda: False,
        *,
        adapter: str = RUN_ADAPTER,
    ) -> None:
        """Take over the trained parameters.

        Args:
            policy: the model.
            world: the ranks.
            is_urgent: checked before each micro-batch; once it is true, the update is abandoned.
            adapter: the adapter to train; with full parameters there is none.
        """
        self.policy = policy
        self.world = world
        self._is_urgent = is_urgent
        self.parameters = policy.trained_parameters(adapter)
        self.is_sharded = any(is_sharded(parameter) for parameter in self.parameters.values())
        parts = {name: local_of(parameter.detach()) for name, parameter in self.parameters.items()}
        self.masters = {
            name: (part if self.is_sharded else self.parameters[name]) if part.dtype == torch.float32 else part.float()
            for name, part in parts.items()
        }
        """By parameter name; where the base is sharded with full parameters, this rank's part of each."""
        sizes = [part.numel() for part in parts.values()]
        self._gradient = torch.zeros(sum(sizes), device=world.device)
        for (name, parameter), view in zip(self.parameters.items(), self._gradient.split(sizes), strict=True):
            shaped = view.view_as(parts[name])
            self.masters[name].grad = shaped
            if self.is_sharded:  # FSDP adds its sums over ranks into it
                parameter.grad = placed_like(shaped, parameter)
            else:
                is_master = parameter is self.masters[name]
                parameter.register_post_accumulate_grad_hook(_accumulate_into(shaped, is_master=is_master))
        decayed = [master for master in self.masters.values() if master.ndim >= 2]
        plain = [master for master in self.masters.values() if master.ndim < 2]
        groups = [{"params": decayed, "is_decayed": True}, {"params": plain, "is_decayed": False}]
        self.optimizer = torch.optim.AdamW([group for group in groups if group["params"]], fused=True)
        self._updates = 0
        self._sums: dict[str, float] = {}
        self._measured = Measured()
        self._rows: set[str] = set()
        self._is_abandoned = False

    @property
    def updates(self) -> int:
        """Updates made since the run began, without skipped ones."""
        return self._updates

    def restore(self, *, updates: int) -> None:
        """Continue from a checkpoint, after its tensors were read into `state_tensors`.

        Args:
            updates: made until the checkpoint.
        """
        self._updates = updates
        self.refresh()

    def forward_backward(
        self, batch: Batch, loss: Loss, *, temperature: float = 1.0, with_entropy: bool = False
    ) -> PackResult | None:
        """Add the gradient and the metric sums of a pack to those of the update.

        Args:
            batch: the pack; its loss terms are summed, not averaged.
            loss: from scores to terms.
            temperature: of the scored distribution.
            with_entropy: whether to measure the policy's entropy.

        Returns:
            The pack's own logprobs and sums; None once the update is abandoned.
        """
        if self.must_abandon():
            return None
        with torch.set_grad_enabled(not batch.is_forward_only):
            scores = self.policy(batch, temperature=temperature, with_entropy=with_entropy)
            if batch.is_dummy:
                (scores.logprobs.sum() * 0.0).backward()
                return PackResult(scores.logprobs.detach(), None)
            terms = loss(scores, batch)
            total = terms.loss.sum()
            if not batch.is_forward_only:
                total.backward()
        measured = {"loss": total.detach(), **{name: values.sum() for name, values in terms.metrics.items()}}
        if with_entropy:
            measured["entropy"] = scores.entropy.sum()
        self._rows |= set(batch.sources)
        return PackResult(scores.logprobs.detach(), self._measured.add(batch, measured, terms.loss))

    def add_sums(self, sums: Mapping[str, float]) -> None:
        """Add the metric sums of a pack whose backward pass ran elsewhere: one that this learner shares with others.

        Args:
            sums: `loss` and `tokens` among them.
        """
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def accumulate(
        self, batches: Iterable[Batch], loss: Loss, *, temperature: float = 1.0, with_entropy: bool = False
    ) -> list[PackResult]:
        """`forward_backward` of each pack, in training mode; stops early once the update is abandoned.

        Args:
            batches: packs.
            loss: from scores to terms.
            temperature: of the scored distribution.
            with_entropy: whether to measure the policy's entropy.
        """
        results = []
        self.policy.train()
        for batch in batches:
            result = self.forward_backward(batch, loss, temperature=temperature, with_entropy=with_entropy)
            if result is None:
                break
            results.append(result)
        self.policy.eval()
        return results

    def learn(self, batches: Iterable[Batch], loss: Loss, adam: AdamParams, *, denominator: float) -> Update:
        """One update from packs: `accumulate`, then `optim_step`.

        Args:
            batches: packs.
            loss: from scores to terms.
            adam: parameters of the update.
            denominator: this rank's part of the divisor of the summed loss.
        """
        self.accumulate(batches, loss)
        return self.optim_step(adam, denominator)

    def must_abandon(self) -> bool:
        """Whether this rank abandons the update; `optim_step` tells the other ranks."""
        self._is_abandoned = self._is_abandoned or self._is_urgent()
        return self._is_abandoned

    def optim_step(self, adam: AdamParams, denominator: float) -> Update:
        """Make one update from the sums of all ranks, and clear them.

        Where loss or gradient is not finite on any rank, nothing is updated, on all ranks.

        Args:
            adam: parameters of the update.
            denominator: this rank's part of the divisor of the summed loss.

        Raises:
            PreemptedError: a rank abandoned the update; nothing was updated.
        """
        divisor, abandoned = self.world.sum_of([denominator, float(self._is_abandoned)])
        if abandoned:
            self.discard()
            raise PreemptedError("the grace period is nearly over: the step begun is abandoned")
        if not self.is_sharded:
            self.world.sum_in_place(self._gradient)
        self._gradient.div_(divisor)
        norm = self._measured.read(torch.linalg.vector_norm(self._gradient))  # the only wait for a GPU in an update
        self.add_sums(self._measured.totals())
        totals = self.world.sum_by_name({"loss": 0.0, "tokens": 0.0, **self._sums})
        loss, tokens = totals.pop("loss") / divisor, totals.pop("tokens")
        if self.is_sharded:
            norm = math.sqrt(self.world.sum_of([norm * norm])[0] / self.world.copies)
        if not (math.isfinite(norm) and math.isfinite(loss)):
            metrics = {"learning_rate": adam.learning_rate, "tokens": tokens, "skipped": 1.0}
            rows = self._offending_rows()
            self.discard()
            return Update(metrics, rows)
        if adam.max_grad_norm is not None and norm > adam.max_grad_norm:
            self._gradient.mul_(adam.max_grad_norm / norm)
        self._step(adam)
        self.discard()
        self.refresh()
        self._updates += 1
        means = {name: total / tokens for name, total in totals.items()}
        return Update({"loss": loss, "grad_norm": norm, "learning_rate": adam.learning_rate, "tokens": tokens, **means})

    def _step(self, adam: AdamParams) -> None:
        for group in self.optimizer.param_groups:
            group["lr"], group["betas"], group["eps"] = adam.learning_rate, (adam.beta1, adam.beta2), adam.epsilon
            group["weight_decay"] = adam.weight_decay if group["is_decayed"] else 0.0
        self.optimizer.step()

    def _offending_rows(self) -> tuple[str, ...]:
        """The rows of all ranks whose loss is not finite; all rows of the update where there are none."""
        of_ranks = self.world.gather((sorted(self._measured.bad_sources()), sorted(self._rows)))
        bad = {row for bad_rows, _ in of_ranks for row in bad_rows}
        return tuple(sorted(bad or {row for _, rows in of_ranks for row in rows}))

    def discard(self) -> None:
        """Clear the sums and gradients accumulated since the last update."""
        self._gradient.zero_()
        self._sums = {}
        self._measured.clear()
        self._rows, self._is_abandoned = set(), False

    def refresh(self) -> None:
        """Round the masters into the model, after an update or a load."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if parameter.dtype != self.masters[name].dtype:
                    parameter.copy_(self.masters[name])

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """The state of masters and optimizer, as tensors that a load may write into."""
        tensors = {}
        for name, master in self.masters.items():
            state = self.optimizer.state[master]
            if not state:  # AdamW creates it at the first update
                state["step"] = torch.zeros((), device=master.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
            tensors[MASTER_PREFIX + name] = placed_like(master.detach(), self.parameters[name])
            for key, value in state.items():
                is_part = value.shape == master.shape and key != "step"
                tensors[f"optimizer/{name}/{key}"] = placed_like(value, self.parameters[name]) if is_part else value
        return tensors

    def whole_masters(self) -> dict[str, torch.Tensor]:
        """The unsharded masters on the CPU of the main rank; empty on other ranks. Every rank calls it."""
        masters = {}
        for name, master in self.masters.items():
            whole = whole_of(placed_like(master.detach(), self.parameters[name]))
            if self.world.is_main:
                masters[name] = whole.cpu()
        return masters


def _accumulate_into(view: torch.Tensor, *, is_master: bool) -> Callable[[torch.Tensor], None]:
    """A hook that adds a parameter's new gradient to its float32 sum, and frees it."""

    def hook(parameter: torch.Tensor) -> None:
        if is_master:  # autograd already added into the view
            return
        assert parameter.grad is not None
        view.add_(parameter.grad)
        parameter.grad = None

    return hook
