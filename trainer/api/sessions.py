"""Sessions of clients, and what an account may use: saved states, and adapters that it asks for."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from trainer.api.protocol import Refused, split_path
from trainer.api.slots import Base
from trainer.api.store import SessionState, Store
from trainer.checkpoints.saved_state import StateSettings, state_problem
from trainer.config.recipe import LoraSettings
from trainer.errors import CheckpointError, TrainerError


@final
class Sessions:
    """The sessions of a server."""

    def __init__(self, store: Store) -> None:
        """Load those that there were; their leases begin now."""
        self.store = store
        self.by_name = store.load_sessions()

    def open(self, owner: str, about: Mapping[str, Any]) -> SessionState:
        """A new session."""
        session = SessionState(secrets.token_hex(8), owner, dict(about), {}, seen=time.monotonic())
        self.store.save_session(session)
        self.by_name[session.name] = session
        return session

    def get(self, owner: str, name: str) -> SessionState:
        """A session of an owner, which is now seen.

        Raises:
            Refused: there is none, or it has ended.
        """
        session = self.by_name.get(name)
        if session is None or session.owner != owner:
            raise Refused(404, f"no session {name!r}")
        if session.is_finished:
            raise Refused(410, f"session {name} has finished")
        session.seen = time.monotonic()
        return session

    def finish(self, owner: str, name: str) -> None:
        """End a session: its models are saved and their slots freed."""
        found = self.by_name.get(name)
        if found is not None and found.owner == owner and found.is_finished:
            return  # repeated, after a lost answer
        session = self.get(owner, name)
        session.is_finished = True
        self.store.save_session(session)

    def find_state(self, owner: str, path: str, folders: tuple[str, ...]) -> Path:
        """Directory of a saved state of an owner.

        Raises:
            Refused: there is none.
        """
        model, folder, name = split_path(path)
        directory = self.store.root / "models" / model.replace(":", ".") / folder / name
        if folder not in folders or not directory.is_dir() or self.store.owner_of(model) != owner:
            raise Refused(404, f"there is no state {path}")
        return directory

    def adapter_of(
        self, owner: str, base: Base, max_rank: int, lora: Mapping[str, Any], begin: Mapping[str, Any] | None
    ) -> LoraSettings:
        """Settings of the adapter that a client asks for: as a saved state has them, or of its own.

        Args:
            owner: account.
            base: where the adapter will be.
            max_rank: the highest rank that is accepted.
            lora: as the protocol has it: rank, and which parts of the model.
            begin: path of a state; None begins anew.

        Raises:
            Refused: there is no such state, or no such adapter can be.
        """
        if begin is not None:
            directory = self.find_state(owner, str(begin["path"]), ("weights",))
            try:
                return settings_of_state(directory)
            except TrainerError as error:
                raise Refused(400, str(error)) from None
        rank = lora.get("rank", 32)
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= max_rank:
            raise Refused(400, f"lora_config.rank {rank!r}: this server takes 1 to {max_rank}")
        parts = [part for part in ("attn", "mlp") if lora.get(f"train_{part}", True)]
        if not parts:
            raise Refused(400, "lora_config: only the LM head is left to train, which has no adapter on this server")
        if len(parts) == 2:
            return LoraSettings(rank=rank)
        names = base.layer_names(parts[0])
        if not names:
            raise Refused(400, f"lora_config: the layers of this model do not say which are {parts[0]}; train both")
        return LoraSettings(rank=rank, target_modules=names)


def settings_of_state(directory: Path) -> LoraSettings:
    """Adapter settings of a saved state.

    Raises:
        CheckpointError: it is damaged, or no state.
    """
    problem = state_problem(directory)
    if problem is not None:
        raise CheckpointError(problem)
    return StateSettings.read(directory).lora
