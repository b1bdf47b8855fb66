"""A model of a client in the executor: its slot, its requests in order, and what each of them does."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, final

from trainer.api.protocol import Refused, ResultKind, split_path
from trainer.api.requests import Request, adam_of, answer, failure
from trainer.api.slots import Base, MicroBatch, Passed, Slot, joined
from trainer.api.states import (
    Snapshot,
    load_state,
    newest_state,
    save_snapshot,
    save_state,
    state_counter,
)
from trainer.api.store import ModelStore, SessionState, Store
from trainer.api.wire import read_pass, write_pass
from trainer.config.recipe import LoraSettings
from trainer.errors import CheckpointError, NumericalError, TrainerError, UserError

KEPT_CHECKPOINTS: Final = 2


@final
@dataclass
class Pass:
    """A forward or forward_backward request in progress."""

    request: Request
    backward: bool
    left: list[tuple[tuple[int, ...], MicroBatch]]
    done: list[tuple[tuple[int, ...], Passed]] = field(default_factory=list)


@final
class Tenant:
    """One model. Used by the executor's thread alone, but for `pending` and `store`, under the executor's lock."""

    def __init__(self, base: Base, store: Store, files: ModelStore, session: SessionState) -> None:
        """Begin parked: without a slot, with the requests that the journal has."""
        self.base, self.store, self.files, self.session = base, store, files, session
        self.name: str = files.settings["model"]
        self.slot: Slot | None = None
        self.work: Pass | None = None
        self.pending: dict[int, Request] = {}
        self.next_seq = files.num_answered
        self.is_created = files.result(0) is not None
        self.alone_until = -1
        """After a pass with others failed at this request: up to it, passes run alone, to find which one fails."""
        self.last_used = time.monotonic()
        self.cost_s = 0.0
        """Of requests since the last checkpoint: what a crash would cost."""
        self._failed_seq: int | None = None
        self._has_gradient = False
        self._saved_updates = -1
        self._checkpoint: Future[int] | None = None
        self.is_broken = (files.result(0) or ("",))[0] == "error"
        if files.result(0) is None:
            self.pending[0] = Request(0, "create", b"")
        for record in files.requests.records:
            seq = int(record.head["seq"])
            if files.result(seq) is None:
                self.pending.setdefault(seq, Request(seq, record.head["kind"], files.requests.body(record)))

    @property
    def has_work(self) -> bool:
        """Whether the next request in the order is here, or one is in progress."""
        return not self.is_broken and (self.work is not None or self.next_seq in self.pending)

    @property
    def is_alone(self) -> bool:
        """Whether its passes run without other models."""
        return self.next_seq <= self.alone_until

    def owner_may(self, owner: str) -> bool:
        """Whether an account may use this model."""
        return owner == self.session.owner

    # ---- slot

    def revive(self) -> None:
        """Take a slot, load the newest checkpoint, and queue what came after it.

        Raises:
            TrainerError: the adapter cannot be made, or what the model began from cannot be read.
        """
        settings = self.files.settings
        lora = LoraSettings.model_validate(settings["lora"])
        slot = self.base.open(lora, int(settings["seed"]))
        try:
            newest = newest_state(self.files.checkpoints)
            if newest is not None:
                counters = load_state(slot, newest, optimizer=True).counters
                seq = int(counters["seq"])
            else:
                if settings["begin"] is not None:
                    directory = self.saved(settings["begin"]["path"])
                    load_state(slot, directory, optimizer=bool(settings["begin"]["optimizer"]))
                save_snapshot(Snapshot.of(slot, adapter=False, counters={"seq": 0}), self.files.checkpoints / _step(0))
                seq = 0
        except BaseException:
            self.base.close(slot)
            raise
        self.slot, self.next_seq, self.cost_s = slot, seq + 1, 0.0
        self._has_gradient, self._failed_seq, self._saved_updates = False, None, slot.learner.updates
        self.pending.pop(0, None)
        for record in self.files.requests.records:
            number = int(record.head["seq"])
            if number > seq and number not in self.pending:
                self.pending[number] = Request(number, record.head["kind"], self.files.requests.body(record))

    def park(self) -> None:
        """Free the slot; what the journal has after the newest checkpoint is done again later."""
        if self._checkpoint is not None:
            self._checkpoint.exception()
            self._checkpoint = None
        if self.work is not None:
            self.pending[self.work.request.seq] = self.work.request
        if self.slot is not None:
            self.base.close(self.slot)
        self.slot, self.work = None, None
        self.files.release()

    def save_and_park(self) -> None:
        """Save the state as one that the client finds in its list, then free the slot."""
        slot = self.slot
        assert slot is not None
        if slot.learner.updates != self._saved_updates and not self._has_gradient:
            name = f"lease-{self.next_seq - 1:06d}"
            save_state(slot, self.files.state("weights", name), counters={"seq": self.next_seq - 1})
            self.files.note_state("weights", name, {"user_metadata": {"saved": "when the lease of the session ended"}})
            self._write_checkpoint()
        self.park()

    def saved(self, path: str, folders: tuple[str, ...] = ("weights",)) -> Path:
        """Directory of a saved state of this owner.

        Raises:
            CheckpointError: there is none.
        """
        model, folder, name = split_path(path)
        directory = self.store.root / "models" / model.replace(":", ".") / folder / name
        owners = self.store.owner_of(model)
        if folder not in folders or not directory.is_dir() or owners != self.session.owner:
            raise CheckpointError(f"there is no state {path} to continue from")
        return directory

    # ---- requests

    def create(self) -> tuple[ResultKind, bytes]:
        """Do request 0: take a slot, and load what the model begins from."""
        try:
            self.revive()
        except Refused as error:
            self.is_broken = True
            return failure(error.message)
        except TrainerError as error:
            self.is_broken = True
            return failure(str(error))
        finally:
            self.is_created = True
        begin = self.files.settings["begin"]
        if begin is None:
            return answer({"type": "create_model", "model_id": self.name})
        return answer({"type": "load_weights", "model_id": self.name, "path": begin["path"]})

    def begin(self, request: Request) -> tuple[ResultKind, bytes] | None:
        """Do a request, or begin a pass; None: the result comes later, or is there already."""
        self.last_used = time.monotonic()
        known = self.files.result(request.seq)
        slot = self.slot
        assert slot is not None
        if known is not None and (known[0] == "error" or request.kind not in {"pass", "optim"}):
            if request.kind == "optim":  # it cleared the gradient
                slot.learner.discard()
                self._has_gradient, self._failed_seq = False, None
            elif known[0] == "error" and request.kind == "pass":
                self._failed_seq = request.seq
            return None  # it had no effect on the weights, or its effect is on disk
        try:
            if request.kind == "pass":
                self._begin_pass(slot, request, is_known=known is not None)
                return None
            does = {"optim": self._optim, "save": self._save, "save_sampler": self._save_sampler, "load": self._load}
            return does[request.kind](slot, request)
        except Refused as error:
            return failure(error.message)
        except (UserError, CheckpointError, NumericalError) as error:
            if request.kind == "pass":
                self._failed_seq = request.seq
            return failure(str(error))

    def _begin_pass(self, slot: Slot, request: Request, *, is_known: bool) -> None:
        message = read_pass(request.body)
        if is_known and not message.backward:
            return
        left = slot.micro_batches(message.data, message.loss, message.config)
        self.work = Pass(request, message.backward, left)
        self._has_gradient |= message.backward

    def finish_pass(self) -> tuple[int, tuple[ResultKind, bytes]]:
        """Number and result of the pass whose micro-batches are all done."""
        work = self.work
        assert work is not None
        assert not work.left
        self.work = None
        result = joined(work.done)
        outputs = {"logprobs": result.logprobs, "elementwise_loss": result.losses}
        return work.request.seq, ("pass", write_pass(outputs, result.metrics))

    def _optim(self, slot: Slot, request: Request) -> tuple[ResultKind, bytes]:
        failed, self._failed_seq, self._has_gradient = self._failed_seq, None, False
        try:
            if failed is not None:
                raise UserError(f"request {failed}, a forward_backward of this update, failed")
            metrics = slot.optim_step(adam_of(request.parameters()))
        except TrainerError as error:
            slot.learner.discard()
            raise UserError(f"{error}: nothing was updated, and the gradient is cleared") from None
        return answer(
            {
                "metrics": {
                    "grad_norm": metrics["grad_norm"],
                    "loss:sum": metrics["loss"],
                    "updates": slot.learner.updates,
                }
            }
        )

    def _save(self, slot: Slot, request: Request) -> tuple[ResultKind, bytes]:
        return answer({"type": "save_weights", "path": self._saved_as(slot, request, "weights", optimizer=True)})

    def _save_sampler(self, slot: Slot, request: Request) -> tuple[ResultKind, bytes]:
        path = self._saved_as(slot, request, "sampler_weights", optimizer=False)
        number = request.parameters().get("sampling_session_seq_id")
        if request.parameters().get("path") is not None or number is None:
            return answer({"type": "save_weights_for_sampler", "path": path})
        name = f"{self.session.name}:sample:{number}"
        self.session.samplers[name] = path
        self.store.save_session(self.session)
        return answer({"type": "save_weights_for_sampler", "sampling_session_id": name})

    def _saved_as(self, slot: Slot, request: Request, folder: str, *, optimizer: bool) -> str:
        parameters = request.parameters()
        name = parameters.get("path")
        if name is None and parameters.get("sampling_session_seq_id") is not None:
            name = f"session-{parameters['sampling_session_seq_id']}"
        directory = None if name is None else self.files.state(folder, str(name))
        if directory is None or state_counter(directory, "seq") != request.seq:  # else a crash came before the result
            is_free = bool(parameters.get("overwrite"))
            name = self.files.free_name(folder, name, overwrite=is_free)
            save_state(slot, self.files.state(folder, name), optimizer=optimizer, counters={"seq": request.seq})
        ttl = parameters.get("ttl_seconds")
        note = {
            "user_metadata": parameters.get("user_metadata"),
            "expires_at": None if ttl is None else time.time() + float(ttl),
        }
        if folder == "weights" and not self._has_gradient:
            self._saved_updates = slot.learner.updates
        assert name is not None
        return self.files.note_state(folder, name, note)

    def _load(self, slot: Slot, request: Request) -> tuple[ResultKind, bytes]:
        parameters = request.parameters()
        load_state(slot, self.saved(parameters["path"]), optimizer=bool(parameters["optimizer"]))
        self._has_gradient, self._failed_seq = False, None
        self.next_seq = request.seq + 1
        self._write_checkpoint()  # the state may be gone when this is done again
        return answer({"type": "load_weights", "path": parameters["path"], "model_id": self.name})

    # ---- checkpoints

    def checkpoint_if_due(self, every_s: float, journal_bytes: int, writer: ThreadPoolExecutor) -> None:
        """Begin to write a checkpoint, where a crash would cost too much; the slot goes on meanwhile."""
        if self.slot is None or self._has_gradient:
            return
        if self._checkpoint is not None:
            if not self._checkpoint.done():
                return
            self.files.forget(self._checkpoint.result())
            self._checkpoint = None
        if self.cost_s < every_s and self.files.requests.num_bytes < journal_bytes:
            return
        snapshot = Snapshot.of(self.slot, adapter=False, counters={"seq": self.next_seq - 1})
        self.cost_s = 0.0
        self.files.results.sync()
        self._checkpoint = writer.submit(self._write, snapshot, self.next_seq - 1)

    def _write_checkpoint(self) -> None:
        assert self.slot is not None
        if self._checkpoint is not None:
            self._checkpoint.exception()
            self._checkpoint = None
        snapshot = Snapshot.of(self.slot, adapter=False, counters={"seq": self.next_seq - 1})
        self.files.results.sync()
        self.files.forget(self._write(snapshot, self.next_seq - 1))
        self.cost_s = 0.0

    def _write(self, snapshot: Snapshot, seq: int) -> int:
        """Write a checkpoint and delete old ones; returns the number of the first request that is still needed."""
        save_snapshot(snapshot, self.files.checkpoints / _step(seq))
        valid = sorted(each for each in self.files.checkpoints.iterdir() if each.name.startswith("request-"))
        for old in valid[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old)
        kept = valid[-KEPT_CHECKPOINTS:]
        return int(kept[0].name.removeprefix("request-").removesuffix(".broken")) + 1

    def info(self) -> dict[str, Any]:
        """What get_info says."""
        settings = self.files.settings
        return {
            "model_id": self.name,
            "lora_rank": settings["lora"]["rank"],
            "created": settings["time"],
            "user_metadata": settings.get("user_metadata"),
            "states": list(self.files.states()),
            "last_used_s": time.monotonic() - self.last_used,
        }


def _step(seq: int) -> str:
    return f"request-{seq:09d}"
