"""The directory of a training server: sessions, and of each model its settings, requests, results and states. No torch.

lock
sessions/<session>.json             owner, metadata, samplers
models/<model>/model.json           owner, session, adapter, seed, what it began from
    requests.log, results.log       see `journal`
    checkpoints/<seq>/              states that the server continues from by itself
    weights/<name>/                 states that the client saved
    sampler_weights/<name>/         adapters to sample from
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from trainer.api.journal import Journal, Record
from trainer.api.protocol import Refused, ResultKind
from trainer.checkpoints.saved_state import FOLDERS, NAME, SCHEME
from trainer.files import make_directory, write_atomically

KEPT_RESULTS: Final = 512
"""Results of a model that are kept when its file is cleaned up."""
RESULTS_LIMIT: Final = 1 << 25
"""Bytes of a file of results above which it is cleaned up."""
USER_FILE: Final = "saved.json"
"""In a saved state's place: what the client said about it. Beside the state, not in it: a state does not change."""


@final
class ModelStore:
    """What is on disk of one model."""

    def __init__(self, root: Path, settings: Mapping[str, Any]) -> None:
        """Open the files of a model.

        Args:
            root: its directory.
            settings: of model.json.
        """
        self.root, self.settings = root, dict(settings)
        self.requests, self.results = Journal(root / "requests.log"), Journal(root / "results.log")
        self._results = {int(record.head["seq"]): record for record in self.results.records}
        self._lock = threading.Lock()

    @property
    def num_answered(self) -> int:
        """Number of the first request without a result: results are stored in order."""
        return max(self._results, default=-1) + 1

    def release(self) -> None:
        """Close the files until they are used again: there may be many models that nobody uses."""
        self.requests.close()
        self.results.close()

    @property
    def checkpoints(self) -> Path:
        """Directory of the states that the server continues from."""
        return self.root / "checkpoints"

    def request(self, seq: int) -> Record | None:
        """The request of a number; of a repeated one the first."""
        return next((record for record in self.requests.records if record.head["seq"] == seq), None)

    def result(self, seq: int) -> tuple[ResultKind, bytes] | None:
        """Kind and body of a result; None where there is none."""
        with self._lock:
            record = self._results.get(seq)
            return None if record is None else (record.head["kind"], self.results.body(record))

    def keep_result(self, seq: int, kind: ResultKind, body: bytes) -> None:
        """Store a result; the first one of a request stays."""
        with self._lock:
            if seq not in self._results:
                self._results[seq] = self.results.append({"seq": seq, "kind": kind}, body)

    def forget(self, before: int) -> None:
        """Drop requests that no checkpoint needs, and old results where there are many.

        Args:
            before: number of the first request that is kept.
        """
        self.results.sync()
        self.requests.drop(lambda record: int(record.head["seq"]) >= before)
        with self._lock:
            if self.results.num_bytes > RESULTS_LIMIT:
                oldest = max(self._results, default=0) - KEPT_RESULTS
                self.results.drop(lambda record: int(record.head["seq"]) > oldest or record.head["seq"] == 0)
                self._results = {int(record.head["seq"]): record for record in self.results.records}

    def state(self, folder: str, name: str) -> Path:
        """Directory of a saved state."""
        return self.root / folder / name

    def free_name(self, folder: str, name: str | None, *, overwrite: bool) -> str:
        """A name for a new state.

        Args:
            folder: one of `FOLDERS`.
            name: what the client asked for; None: a number.
            overwrite: whether there may be one of this name.

        Raises:
            Refused: the name is not usable, or taken.
        """
        if name is None:
            taken = len(list((self.root / folder).glob("*"))) if (self.root / folder).is_dir() else 0
            return f"{taken + 1:06d}"
        if not NAME.fullmatch(name):
            raise Refused(400, f"the name {name!r} is not made of letters, digits, dots, dashes and underscores")
        if self.state(folder, name).exists() and not overwrite:
            raise Refused(400, f"there is a state {name!r} already; choose another name, or set overwrite")
        return name

    def note_state(self, folder: str, name: str, note: Mapping[str, Any]) -> str:
        """Keep what a client said about a state; returns the state's path in the protocol."""
        write_atomically(self.root / folder / f".{name}.{USER_FILE}", json.dumps({**note, "time": time.time()}))
        return f"{SCHEME}{self.settings['model']}/{folder}/{name}"

    def delete_state(self, folder: str, name: str) -> None:
        """Delete a saved state.

        Raises:
            Refused: there is none.
        """
        directory = self.state(folder, name)
        if not directory.is_dir():
            raise Refused(404, f"model {self.settings['model']} has no {folder}/{name}")
        shutil.rmtree(directory)
        (self.root / folder / f".{name}.{USER_FILE}").unlink(missing_ok=True)

    def states(self) -> Iterator[dict[str, Any]]:
        """Saved states as the protocol lists them, the newest first."""
        found = []
        for folder in FOLDERS:
            for note_file in (self.root / folder).glob(f".*.{USER_FILE}"):
                name = note_file.name[1 : -len(USER_FILE) - 1]
                directory, note = self.state(folder, name), json.loads(note_file.read_bytes())
                if directory.is_dir():
                    found.append(
                        {
                            "checkpoint_id": f"{folder}/{name}",
                            "checkpoint_type": "training" if folder == FOLDERS[0] else "sampler",
                            "time": note["time"],
                            "tinker_path": f"{SCHEME}{self.settings['model']}/{folder}/{name}",
                            "size_bytes": sum(file.stat().st_size for file in directory.iterdir()),
                            "public": False,
                            "user_metadata": note.get("user_metadata"),
                            "expires_at": note.get("expires_at"),
                        }
                    )
        yield from sorted(found, key=lambda each: -float(each["time"]))


@final
@dataclass
class SessionState:
    """A session of a client."""

    name: str
    owner: str
    about: dict[str, Any]
    samplers: dict[str, str | None]
    """Path of the adapter of each sampling session; None samples from the base."""
    is_finished: bool = False
    seen: float = 0.0
    """When the client was last heard of, by `time.monotonic`."""


@final
class Store:
    """The directory of a server."""

    def __init__(self, root: Path) -> None:
        """Open it; it is made where it is missing."""
        self.root = root
        make_directory(root / "sessions")
        make_directory(root / "models")

    def load_sessions(self) -> dict[str, SessionState]:
        """All sessions; their leases begin now."""
        sessions = {}
        for file in sorted((self.root / "sessions").glob("*.json")):
            raw = json.loads(file.read_bytes())
            name = str(raw["name"])
            sessions[name] = SessionState(
                name, raw["owner"], raw["about"], raw["samplers"], raw["is_finished"], time.monotonic()
            )
        return sessions

    def save_session(self, session: SessionState) -> None:
        """Write a session."""
        document = {name: value for name, value in vars(session).items() if name != "seen"}
        write_atomically(self.root / "sessions" / f"{session.name}.json", json.dumps(document, indent=1))

    def owner_of(self, model: str) -> str | None:
        """Owner of a model, whose session may be that of another server; None where there is no such model."""
        file = self.root / "models" / model.replace(":", ".") / "model.json"
        try:
            return str(json.loads(file.read_bytes())["owner"])
        except (OSError, ValueError, KeyError):
            return None

    def load_models(self) -> dict[str, ModelStore]:
        """All models."""
        stores = {}
        for file in sorted((self.root / "models").glob("*/model.json")):
            settings = json.loads(file.read_bytes())
            stores[str(settings["model"])] = ModelStore(file.parent, settings)
        return stores

    def create_model(self, model: str, settings: Mapping[str, Any]) -> ModelStore:
        """Make the directory of a model."""
        root = self.root / "models" / model.replace(":", ".")
        make_directory(root)
        document = {"model": model, **settings}
        write_atomically(root / "model.json", json.dumps(document, indent=1))
        return ModelStore(root, document)
