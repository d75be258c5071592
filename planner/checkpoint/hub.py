"""Checkpoints of the Hugging Face hub: where they lie in the local cache, and (only when asked) fetching one.

The cache's layout is read with plain paths: `models--org--name/refs/main` names a folder under `snapshots/`.
Source: https://huggingface.co/docs/huggingface_hub/guides/manage-cache.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from planner.errors import CheckpointError, InputError, RunFailed

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
# what a plan and a run read; nothing that could hold code
FILES = ("*.json", "*.safetensors", "merges.txt", "LICENSE*", "README.md")


def is_hub_id(text: str) -> bool:
    """Whether `text` has the form `organisation/name`."""
    return _HUB_ID.fullmatch(text) is not None and ".." not in text


def cache_directory() -> Path:
    """The hub's cache folder: HF_HUB_CACHE, else HF_HOME/hub, else XDG_CACHE_HOME or ~/.cache with huggingface/hub."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(name):
            return Path(os.environ[name]).expanduser()
    if os.environ.get("HF_HOME"):
        return Path(os.environ["HF_HOME"]).expanduser() / "hub"
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "huggingface" / "hub"


def cached_snapshot(hub_id: str) -> Path:
    """The snapshot folder of `hub_id` in the local cache: that of its main branch, or the only one there is."""
    cache = cache_directory()
    repository = cache / ("models--" + hub_id.replace("/", "--"))
    reference = repository / "refs" / "main"
    try:
        if reference.is_file():
            revision = reference.read_text(encoding="utf-8").strip()
            if _REVISION.fullmatch(revision) and (repository / "snapshots" / revision).is_dir():
                return repository / "snapshots" / revision
        snapshots = sorted(path for path in (repository / "snapshots").glob("*") if path.is_dir())
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{repository}: cannot be read: {error}") from None
    if len(snapshots) == 1:
        return snapshots[0]
    raise CheckpointError(
        f"model: wanted {hub_id} in the local Hugging Face cache {cache}, found "
        + (f"{len(snapshots)} snapshots and no main among them" if snapshots else "none")
        + f"; fetch it with: execute --download --model {hub_id}, or give the folder of a checkpoint"
    )


def download(hub_id: str) -> Path:
    """The local folder of `hub_id`, fetched from the hub; needs the extra `hub`. Only `execute --download` calls it."""
    if not is_hub_id(hub_id):
        raise InputError(
            f"--download: wanted a hub id such as Qwen/Qwen2.5-VL-3B-Instruct, found {hub_id!r}"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise InputError(
            "--download: wanted the package huggingface_hub, found none; install it with: pip install 'stowplan[hub]'"
        ) from None
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(FILES)))
    except (
        Exception
    ) as error:  # the HTTP library's errors have no base of their own across versions
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise RunFailed(
            f"--download: {hub_id} could not be fetched: {reason}; what came is kept and the next try goes on from it"
        ) from error
