"""Exports on a hub of models and data sets, for those who ask for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from tokenclean.data.exports import CARD


def check_push(repository: str) -> None:
    """Refuse a push that cannot work, before anything is written.

    Raises:
        ValueError: if the name is none, or the environment forbids the network.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import validate_repo_id

    owner, _, name = repository.partition("/")
    try:
        if not owner or not name:
            raise ValueError("give owner/name")
        validate_repo_id(repository)
    except ValueError as error:
        raise ValueError(f"--push_to_hub: {repository!r} is no repository; {error}") from None
    if constants.HF_HUB_OFFLINE:
        raise ValueError(
            "--push_to_hub: HF_HUB_OFFLINE is set, so nothing may leave this machine; unset it, or "
            "leave --push_to_hub out"
        )


def push(folder: Path, repository: str, kind: Literal["dataset", "model"], private: bool) -> str:
    """Upload a finished export as it lies on disk; credentials are those of `huggingface_hub`.

    Args:
        folder: the export; other files that have come to lie there stay where they are.
        repository: ``owner/name``; made if it is not there.
        kind: of the repository.
        private: of a repository that is made; one that exists stays as it is.

    Returns:
        Where it went.

    Raises:
        ValueError: if the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    listed = json.loads((folder / CARD).read_text(encoding="utf-8"))["files"]
    api = HfApi()
    try:
        api.create_repo(repository, repo_type=kind, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=str(folder),
            repo_type=kind,
            allow_patterns=[*listed, CARD],
            commit_message="Export of tokenclean",
        )
    except Exception as error:
        # Without a network its client raises errors of its own, which are no OSError.
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"--push_to_hub: {repository} did not take it ({why}); the export is in {folder}"
        ) from error
    return f"{repository} ({kind})"
