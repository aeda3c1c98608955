"""Uploading a model directory to the Hugging Face Hub (optional extra)."""

from __future__ import annotations

from pathlib import Path

from coterie.core.errors import ConfigError
from coterie.hub.layout import verify


def push_to_hub(path: str | Path, repo_id: str, *, private: bool = True) -> str:
    """Verify every file, upload the directory, return its address.

    Uses the login of ``huggingface_hub``; ConfigError if that package is not installed.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise ConfigError(
            "push_to_hub: huggingface_hub is not installed; pip install 'coterie[hf]'"
        ) from None
    manifest = verify(path)
    api = HfApi()
    address = api.create_repo(repo_id, private=private, exist_ok=True)
    api.upload_folder(repo_id=repo_id, folder_path=str(manifest.path))
    return str(address)
