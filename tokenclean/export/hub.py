"""Exports on a hub of models and data sets, for those who ask for it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal


def check_push(repository: str) -> None:
    """Refuse a push that cannot work, before anything is written.

    Raises:
        ValueError: if the name is none, or the environment forbids the network.
    """
    from huggingface_hub import constants

    if repository.count("/") != 1 or not all(repository.split("/")):
        raise ValueError(f"--push_to_hub: {repository!r} is no repository; give owner/name")
    if constants.HF_HUB_OFFLINE:
        raise ValueError(
            "--push_to_hub: HF_HUB_OFFLINE is set, so nothing may leave this machine; unset it, or "
            "leave --push_to_hub out"
        )


def push(folder: Path, repository: str, kind: Literal["dataset", "model"], private: bool) -> str:
    """Upload a finished export as it lies on disk; credentials are those of `huggingface_hub`.

    Args:
        folder: the export.
        repository: ``owner/name``; made if it is not there.
        kind: of the repository.
        private: of a repository that is made; one that exists stays as it is.

    Returns:
        Where it went.

    Raises:
        ValueError: if the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = HfApi()
    try:
        api.create_repo(repository, repo_type=kind, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=str(folder),
            repo_type=kind,
            commit_message="Export of tokenclean",
        )
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        raise ValueError(
            f"--push_to_hub: {repository} did not take it ({error}); the export is in {folder}"
        ) from error
    return f"{repository} ({kind})"
