"""The commit and config.json of a hub model: from the local cache, or by two small requests."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from trainer.errors import ModelError

COMMIT: Final = re.compile(r"[0-9a-f]{40}")
TIMEOUT_S: Final = 5.0
"""How long the hub may take to answer."""
OFFLINE_VARIABLES: Final = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
TRUE_WORDS: Final = frozenset({"1", "on", "yes", "true"})


@final
@dataclass(frozen=True)
class HubModel:
    """A revision of a hub model. Without a network and a copy it is `HubModel(None, None, "HF_HUB_OFFLINE is set")`."""

    commit: str | None
    """What the revision is now: for a branch, the commit it points to; None if unknown."""
    config_file: Path | None
    """Its config.json in the local cache; None if it is not there."""
    problem: str | None = None
    """Why the hub was not asked, or did not answer."""


def read_config(file: Path) -> Mapping[str, Any]:
    """Return the content of a config.json.

    Raises:
        ModelError: It is not JSON, or no mapping.
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise ModelError(f"{file}: not JSON ({error}). Copy the model again.") from None
    if not isinstance(config, dict):
        raise ModelError(f"{file}: not a model configuration. Copy the model again.")
    return config


def cached_model(name: str, revision: str) -> HubModel:
    """Return what the local cache has of a revision; asks no server and does not import huggingface_hub.

    Args:
        name: `owner/name`.
        revision: A commit, branch or tag.
    """
    root = _cache_dir() / f"models--{name.replace('/', '--')}"
    reference = root / "refs" / revision
    commit = revision if COMMIT.fullmatch(revision) else None
    if commit is None and reference.is_file():
        commit = reference.read_text(encoding="utf-8").strip()
    file = root / "snapshots" / commit / "config.json" if commit else None
    return HubModel(commit, file if file is not None and file.is_file() else None)


def any_cached_config(name: str) -> Path | None:
    """Return the config.json of any cached revision, whose sizes are those of every other one."""
    files = sorted((_cache_dir() / f"models--{name.replace('/', '--')}").glob("snapshots/*/config.json"))
    return files[0] if files else None


def hub_model(name: str, revision: str) -> HubModel:
    """Return the commit of a revision and its config.json, from the cache or from the hub.

    Args:
        name: `owner/name`.
        revision: A commit, branch or tag.

    Raises:
        ModelError: The hub answers that it has no such model or revision, or does not give access to it.
    """
    cached = cached_model(name, revision)
    if cached.config_file is not None:
        return cached
    problem = _offline_problem()
    if problem is not None:
        return HubModel(cached.commit, None, problem)
    return _downloaded(name, revision, cached)


def _downloaded(name: str, revision: str, cached: HubModel) -> HubModel:
    """Ask once whether the hub can be reached, then download: a download repeats failing requests for 23 s."""
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_download, hf_hub_url  # takes 0.2 s

    about = f"{name} (revision {revision})"
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision), timeout=TIMEOUT_S)
        file = Path(hf_hub_download(name, "config.json", revision=revision, etag_timeout=TIMEOUT_S))
    except errors.GatedRepoError:
        raise ModelError(
            f"{about}: the hub gives no access. Accept the conditions on the model's page, and log in: `hf auth login`."
        ) from None
    except errors.RevisionNotFoundError:
        raise ModelError(f"{about}: the hub has no such revision. Correct `model.revision`.") from None
    except errors.RepositoryNotFoundError:
        raise ModelError(
            f"{about}: the hub has no such model, or it is private. Correct `model.path`, or log in: `hf auth login`."
        ) from None
    except errors.RemoteEntryNotFoundError:
        raise ModelError(f"{about}: has no config.json: not a model that transformers can load.") from None
    except Exception as error:  # its HTTP library raises errors of its own, which are no OSError
        reason = (str(error).splitlines() or [""])[0]
        return HubModel(cached.commit, None, f"the hub cannot be reached ({type(error).__name__}: {reason:.100})")
    return HubModel(file.parent.name, file)


def _offline_problem() -> str | None:
    """Return the variable that forbids requests, as text; None if they are allowed."""
    offline = [variable for variable in OFFLINE_VARIABLES if os.environ.get(variable, "").lower() in TRUE_WORDS]
    return f"{offline[0]} is set" if offline else None


def _cache_dir() -> Path:
    """Return the cache of huggingface_hub, which the same variables move."""
    if "HF_HUB_CACHE" in os.environ:
        return Path(os.environ["HF_HUB_CACHE"]).expanduser()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return Path(os.environ.get("HF_HOME") or cache / "huggingface").expanduser() / "hub"


@final
@dataclass(frozen=True)
class HubState:
    """Whether models can be downloaded, and what is in the cache."""

    endpoint: str
    has_token: bool
    cache: Path
    num_cached: int
    """Number of models in the cache."""
    problem: str | None
    """Why the hub cannot be used; None if it answers."""


def hub_state() -> HubState:
    """Ask the hub for its front page's header."""
    from huggingface_hub import constants, get_session, get_token

    problem = _offline_problem()
    if problem is None:
        try:
            get_session().head(constants.ENDPOINT, timeout=TIMEOUT_S)
        except Exception as error:  # its HTTP library raises errors of its own
            problem = f"{constants.ENDPOINT} cannot be reached ({type(error).__name__})"
    cached = len(list(_cache_dir().glob("models--*")))
    return HubState(constants.ENDPOINT, get_token() is not None, _cache_dir(), cached, problem)
