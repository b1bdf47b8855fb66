"""Two verbs that learn: forward_backward accumulates sums, optim_step makes one update over all ranks.

Terms are per token and unreduced; their sums are divided by the denominator of the whole step over all ranks. So
micro-batching, packing and ranks change no gradient beyond rounding. Trained parameters, gradient sums and optimizer
state are float32; where the model computes in bfloat16, its parameters are a rounded copy of the float32 masters.

All ranks see the sums, so they decide alike: an update whose loss or gradient is not finite is skipped by all, and a
step that one of them must abandon is abandoned by all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import final

import torch

from trainer.algorithms.terms import PolicyTerms
from trainer.config.recipe import OptimizerSettings
from trainer.distributed.sharding import is_sharded, local_of, placed_like, whole_of
from trainer.distributed.world import World
from trainer.errors import PreemptedError
from trainer.model.batch import Batch
from trainer.model.policy import Policy, Scores

Loss = Callable[[Scores, Batch], PolicyTerms]
"""From scores of a pack to unreduced terms."""


@final
class Learner:
    """Owns the float32 masters, their gradients and the optimizer."""

    def __init__(
        self,
        policy: Policy,
        settings: OptimizerSettings,
        world: World,
        is_urgent: Callable[[], bool] = lambda: False,
    ) -> None:
        """Take the policy's trained parameters over.

        Args:
            policy: what learns.
            settings: of AdamW.
            world: the ranks.
            is_urgent: asked before each micro-batch; once it is true, the update is abandoned.
        """
        self.policy = policy
        self.is_urgent = is_urgent
        self.settings = settings
        self.world = world
        self.parameters = policy.trained_parameters()
        self.is_sharded = any(is_sharded(parameter) for parameter in self.parameters.values())
        parts = {name: local_of(parameter.detach()) for name, parameter in self.parameters.items()}
        self.masters = {
            name: (part if self.is_sharded else self.parameters[name]) if part.dtype == torch.float32 else part.float()
            for name, part in parts.items()
        }
        """This rank's part of each where the base is sharded, and else the whole."""
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
        groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
            fused=True,
        )
        self.updates = 0
        self._skipped_rows: list[str] = []
        self._sums: dict[str, float] = {}
        self._rows: set[str] = set()
        self._bad_rows: set[str] = set()
        self._is_abandoned = False

    def forward_backward(
        self, batch: Batch, loss: Loss, *, temperature: float = 1.0, with_entropy: bool = False
    ) -> None:
        """Add a micro-batch's gradient and measurements to the sums.

        Args:
            batch: a pack; its loss terms are summed, not averaged.
            loss: from scores to terms.
            temperature: of the scored distribution.
            with_entropy: whether to measure the policy's entropy.
        """
        if self.must_abandon():
            return
        with torch.set_grad_enabled(not batch.is_still):
            scores = self.policy(batch, temperature=temperature, with_entropy=with_entropy)
            if batch.is_filler:
                (scores.logprobs.sum() * 0.0).backward()
                return
            terms = loss(scores, batch)
            total = terms.loss.sum()
            if not batch.is_still:
                total.backward()
        measured = {"loss": total.detach(), **{name: values.sum() for name, values in terms.metrics.items()}}
        if with_entropy:
            measured["entropy"] = scores.entropy.sum()
        stacked = torch.stack([value.double() for value in measured.values()]).tolist()
        for name, value in zip(measured, stacked, strict=True):
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._sums["tokens"] = self._sums.get("tokens", 0.0) + batch.num_trained
        self._rows |= set(batch.where)
        if not math.isfinite(stacked[0]):
            owners = batch.sequence_ids[~terms.loss.isfinite()].unique().tolist()
            self._bad_rows |= {batch.where[owner] for owner in owners}

    def take_skipped_rows(self) -> list[str]:
        """File and line of the rows of the updates skipped since the last call."""
        rows, self._skipped_rows = self._skipped_rows, []
        return rows

    def restore(self, *, updates: int) -> None:
        """Continue with this number of updates and the masters that were loaded into `state_tensors`."""
        self.updates = updates
        self.refresh()

    def must_abandon(self) -> bool:
        """Whether this rank goes no further with the update; the others learn of it in `optim_step`."""
        self._is_abandoned = self._is_abandoned or self.is_urgent()
        return self._is_abandoned

    def optim_step(self, learning_rate: float, denominator: float, names: tuple[str, ...]) -> dict[str, float]:
        """Make one update from the sums of all ranks, and forget them.

        Args:
            learning_rate: of this update.
            denominator: this rank's part of what the summed loss is divided by.
            names: the loss's metrics; ranks without a micro-batch do not know them.

        Returns:
            `loss`, `grad_norm` (before clipping), `learning_rate`, `tokens`, and the means of `names` over tokens.
            Where loss or gradient is not finite on any rank, nothing is updated, and it is `learning_rate`, `tokens`
            and `skipped` 1; `take_skipped_rows` names the rows.

        Raises:
            PreemptedError: a rank abandoned the update; nothing was updated.
        """
        keys = ("loss", "tokens", *names)
        sums = [self._sums.get(key, 0.0) for key in keys]
        *sums, whole, abandoned = self.world.sum_of([*sums, denominator, float(self._is_abandoned)])
        totals = dict(zip(keys, sums, strict=True))
        if abandoned:
            self._forget()
            raise PreemptedError("the grace period is nearly over: the step begun is abandoned")
        if not self.is_sharded:
            self.world.sum_in_place(self._gradient)
        self._gradient.div_(whole)
        norm = float(torch.linalg.vector_norm(self._gradient))
        if self.is_sharded:
            norm = math.sqrt(self.world.sum_of([norm * norm])[0])
        loss = totals["loss"] / whole
        if not (math.isfinite(norm) and math.isfinite(loss)):
            self._skip()
            return {"learning_rate": learning_rate, "tokens": totals["tokens"], "skipped": 1.0}
        limit = self.settings.max_grad_norm
        if limit is not None and norm > limit:
            self._gradient.mul_(limit / norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self._forget()
        self.refresh()
        self.updates += 1
        means = {name: totals[name] / totals["tokens"] for name in names}
        return {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": learning_rate,
            "tokens": totals["tokens"],
            **means,
        }

    def _skip(self) -> None:
        """Make no update, and remember whose fault it is: the rows with a loss that is not finite, else all."""
        of_ranks = self.world.gather((sorted(self._bad_rows), sorted(self._rows)))
        bad = {row for of_rank, _ in of_ranks for row in of_rank} or {row for _, of_rank in of_ranks for row in of_rank}
        self._skipped_rows += sorted(bad)
        self._forget()

    def _forget(self) -> None:
        self._gradient.zero_()
        self._sums = {}
        self._rows, self._bad_rows, self._is_abandoned = set(), set(), False

    def learn(
        self, batches: Iterable[Batch], loss: Loss, *, learning_rate: float, denominator: float
    ) -> dict[str, float]:
        """One update from micro-batches: the two verbs in a row."""
        self.policy.train()
        for batch in batches:
            self.forward_backward(batch, loss)
            if self._is_abandoned:
                break
        self.policy.eval()
        return self.optim_step(learning_rate, denominator, ())

    def mean_so_far(self, name: str) -> float:
        """A metric's mean over the tokens accumulated since the last update, over all ranks."""
        total, tokens = self.world.sum_of([self._sums.get(name, 0.0), self._sums.get("tokens", 0.0)])
        return total / tokens if tokens else 0.0

    def refresh(self) -> None:
        """Round the masters into the model, after an update or a load."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if parameter.dtype != self.masters[name].dtype:
                    parameter.copy_(self.masters[name])

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Everything that a resumed run needs, as tensors that a load may write into."""
        tensors = {}
        for name, master in self.masters.items():
            state = self.optimizer.state[master]
            if not state:  # before the first update AdamW has none
                state["step"] = torch.zeros((), device=master.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
            tensors[f"masters/{name}"] = placed_like(master.detach(), self.parameters[name])
            for key, value in state.items():
                is_part = value.shape == master.shape and key != "step"
                tensors[f"optimizer/{name}/{key}"] = placed_like(value, self.parameters[name]) if is_part else value
        return tensors

    def whole_masters(self) -> dict[str, torch.Tensor]:
        """The masters on the CPU, whole, on the main rank; empty on others. Every rank calls it."""
        found = {}
        for name, master in self.masters.items():
            whole = whole_of(placed_like(master.detach(), self.parameters[name]))
            if self.world.is_main:
                found[name] = whole.cpu()
        return found


def _accumulate_into(view: torch.Tensor, *, is_master: bool) -> Callable[[torch.Tensor], None]:
    """Move a parameter's fresh gradient into its float32 sum, and free it."""

    def hook(parameter: torch.Tensor) -> None:
        if is_master:  # autograd already added into the view
            return
        assert parameter.grad is not None
        view.add_(parameter.grad)
        parameter.grad = None

    return hook
