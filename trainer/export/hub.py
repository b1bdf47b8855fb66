"""Uploads an export to a model hub."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import httpx2
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

from trainer.errors import ModelError

_ERRORS: Final = (OSError, HFValidationError, httpx2.HTTPError)
"""What the hub's client raises; all of its own but the second are OSErrors, a failed connection is not."""


def refuse_unready(name: str) -> None:
    """Check, before an export takes its time, that it can be uploaded afterwards.

    Args:
        name: `owner/name` of the repository on the hub.

    Raises:
        ModelError: the name is none, there is no token, or the hub cannot be reached.
    """
    if name.count("/") != 1:
        raise ModelError(f"--push {name}: a repository is `owner/name`")
    try:
        HfApi().whoami()
    except _ERRORS as error:
        raise _refusal(name, error) from None


def push(directory: Path, name: str, *, is_public: bool) -> str:
    """Upload a directory as one commit; a repository that does not exist is created.

    Args:
        directory: the export.
        name: `owner/name` of the repository.
        is_public: whether a new repository is visible to everybody.

    Returns:
        The address of the commit.

    Raises:
        ModelError: the hub refused it or could not be reached; the export itself is complete.
    """
    api = HfApi()
    try:
        api.create_repo(name, private=not is_public, exist_ok=True)
        commit = api.upload_folder(repo_id=name, folder_path=directory, commit_message=f"Upload {directory.name}")
    except _ERRORS as error:
        raise _refusal(name, error, f"; {directory} is complete: `hf upload {name} {directory}` uploads it") from None
    return str(commit.commit_url)


def _refusal(name: str, error: Exception, rest: str = "") -> ModelError:
    if isinstance(error, OfflineModeIsEnabled):
        reason = "HF_HUB_OFFLINE is set; unset it to upload"
    elif isinstance(error, LocalTokenNotFoundError):
        reason = "no token of the hub: run `hf auth login`, or set HF_TOKEN to one that may write"
    elif isinstance(error, HfHubHTTPError) and error.response is not None and error.response.status_code in {401, 403}:
        reason = f"{constants.ENDPOINT} refuses the token: it needs the right to write to {name}"
    else:
        reason = f"{constants.ENDPOINT}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return ModelError(f"--push {name}: {reason}{rest}")
