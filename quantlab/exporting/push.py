"""``quantlab push RUN_ID REPO``: what was exported of a run, to a repository of a Hub, by ``huggingface_hub``."""

from __future__ import annotations

import os
from pathlib import Path

from quantlab.errors import ConfigError, ModelError, first_line
from quantlab.exporting.folder import read_manifest
from quantlab.models.exported import check_digests, other_files
from quantlab.progress import say
from quantlab.vocabulary.amounts import some_of


def push(folder: Path, repo: str, key: str = "push") -> str:
    """Upload the export in ``folder`` to the model repository ``repo`` (owner/name), made where it is not there.

    The Hub is that of ``HF_ENDPOINT``, the user is who ``huggingface_hub`` knows (``hf auth login``, ``HF_TOKEN``).
    Returns the address of the commit.

    Raises:
        ConfigError: no export there, or no name of a repository.
        ModelError: a file is not as it was exported, the Hub does not answer, or does not take it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    read_manifest(key, folder)
    check_digests(key, folder)
    others, missing = other_files(folder)
    if missing:
        raise ModelError(f"{key}: {some_of(missing, 4)} of the export in {folder} is not there; export the run again")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(
            f"{key}: {repo[:100]} is no name of a repository ({str(error)[:200]}); write owner/name"
        ) from error
    if repo.count("/") != 1:
        raise ConfigError(f"{key}: {repo[:100]} is no name of a repository; write owner/name")
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
    if others:
        say(f"{key}: {some_of(others, 4)} in {folder} is not of the export, and is uploaded, too", "warning")
    try:
        api.create_repo(repo, repo_type="model", exist_ok=True)
        done = api.upload_folder(
            repo_id=repo, folder_path=folder, repo_type="model", commit_message="Exported by quantlab"
        )
    except Exception as error:
        if not isinstance(error, (HfHubHTTPError, OSError)) and not type(error).__module__.startswith("httpx"):
            raise  # no matter of the Hub or the network
        raise ModelError(
            f"{key}: {api.endpoint} does not take {repo} ({type(error).__name__}: {first_line(error)}); "
            "check the name, the network and who you are there (hf auth login)"
        ) from error
    return str(done.commit_url)
