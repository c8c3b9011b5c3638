"""Which backbone a run uses: the hub's commit, and hashes of the files that decide what the backbone computes.

Always holds: copies of one backbone have equal hashes, wherever they lie. A change that alters a result alters a hash.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError

from trainer.config.schema import ModelConfig
from trainer.errors import UserError, one_line


@dataclass(frozen=True)
class Identity:
    """A backbone as checkpoints, adapter and summary record it."""

    name: str
    """model.name: hub id, local folder, or package:NAME/dir"""
    revision: str | None
    """model.revision as the user gave it"""
    commit: str | None
    """the hub's commit; None for a local folder"""
    files: dict[str, str]
    """SHA-256 of config.json and of each weights file; equal for every copy of the backbone"""

    def __str__(self) -> str:
        return f"{self.name} at commit {self.commit}" if self.commit else self.name


def read_identity(path: Path) -> Identity:
    """Reads an identity from JSON.

    Raises:
        OSError, ValueError, TypeError: the file is missing or damaged.
    """
    return Identity(**json.loads(path.read_bytes()))


def check_same_backbone(recorded: Identity, found: Identity, run: Path, hint: str = "") -> None:
    """Refuses a backbone whose files are not those that the run was trained on; names and places may differ.

    The message names both backbones, the first file that differs, and the fix; `hint` adds another fix.
    """
    differing = [name for name in recorded.files | found.files if recorded.files.get(name) != found.files.get(name)]
    if not differing:
        return
    was, now = (identity.files.get(differing[0], "none")[:12] for identity in (recorded, found))
    hub = f"--model.name {recorded.name} --model.revision {recorded.commit}, or " if recorded.commit else ""
    raise UserError(
        f"{run} was trained on another backbone: SHA-256 of {differing[0]} was {was} ({recorded}), is {now} ({found})\n"
        f"Use the same files: {hub}--model.name FOLDER of an unchanged copy{hint}"
    )


def resolve_commit(config: ModelConfig, recorded: Identity | None) -> str:
    """The commit of a hub model. The same request gets the recorded commit, wherever a branch points now."""
    commit = None
    if recorded is not None and (config.name, config.revision) == (recorded.name, recorded.revision):
        commit = recorded.commit
    return commit or Path(hf_hub_download(config.name, "config.json", revision=config.revision)).parent.name


def hash_files(path: str, commit: str | None, weights: str) -> dict[str, str]:
    """SHA-256 of each file that decides what the backbone computes, by name, config.json first.

    Args:
        path: local folder, or hub id.
        commit: of a hub model, whose missing files are downloaded; None for a local folder.
        weights: name of the weights file.
    """

    def find(name: str) -> Path | None:
        if commit is None:
            return file if (file := Path(path) / name).is_file() else None
        cached = try_to_load_from_cache(path, name, revision=commit)
        if cached is not None:  # a path, or a mark that this commit has no such file
            return Path(cached) if isinstance(cached, str) else None
        try:
            return Path(hf_hub_download(path, name, revision=commit))
        except EntryNotFoundError:
            return None

    try:
        return {name: _sha256(file) for name, file in _find_files(find, weights).items()}
    except Exception as error:  # huggingface_hub raises many kinds
        raise UserError(f"model.name: the files of {path} cannot be read: {one_line(error)}") from None


def _find_files(find: Callable[[str], Path | None], weights: str) -> dict[str, Path]:
    """config.json and the weights files that transformers reads: one file, or an index and its shards."""
    if find("adapter_config.json") is not None:
        raise ValueError("transformers would add the adapter beside them (adapter_config.json) to the weights")
    names = [weights]
    if find(weights) is None:
        weights = f"{weights}.index.json"
    if weights.endswith(".index.json") and (index := find(weights)) is not None:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    files = {}
    for name in ("config.json", *names):
        file = find(name)
        if file is None:
            raise FileNotFoundError(f"{name} is missing, not cached, or not reachable; pickled weights are not read")
        files[name] = file
    return files


def _sha256(file: Path) -> str:
    blob = file.resolve()
    if blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name):
        return blob.name  # the hub's cache names large files by their SHA-256
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
