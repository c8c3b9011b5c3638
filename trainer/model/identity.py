"""Which backbone a run uses: the hub's commit, and hashes of the files that decide what the backbone computes.

Always holds: copies of one backbone have equal hashes, wherever they lie. A change that alters a result alters a hash.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download

from trainer.config.schema import ModelConfig
from trainer.errors import UserError


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

    @property
    def fingerprint(self) -> str:
        """A hash over all files."""
        return hashlib.sha256(b"".join(bytes.fromhex(digest) for digest in self.files.values())).hexdigest()

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


def download(name: str, commit: str, weights: str) -> Path:
    """The folder of a hub model in the cache, with the files that `hash_files` reads."""
    patterns = ["config.json", "adapter_config.json", f"{weights.partition('.')[0]}*.safetensors*"]
    return Path(snapshot_download(name, revision=commit, allow_patterns=patterns))


def hash_files(folder: Path, weights: str) -> dict[str, str]:
    """SHA-256 of each file that decides what the backbone computes, by name, config.json first.

    Those are config.json and the weights that transformers reads: one file, or an index and its shards.
    """
    if (folder / "adapter_config.json").is_file():
        raise ValueError("transformers would add the adapter beside them (adapter_config.json) to the weights")
    names = [weights]
    if not (folder / weights).is_file():
        weights = f"{weights}.index.json"
    if weights.endswith(".index.json") and (folder / weights).is_file():
        names = sorted(set(json.loads((folder / weights).read_bytes())["weight_map"].values()))
    missing = [name for name in ("config.json", *names) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{missing[0]} is missing, not cached, or not reachable; pickled weights are not read")
    return {name: _sha256(folder / name) for name in ("config.json", *names)}


def _sha256(file: Path) -> str:
    blob = file.resolve()
    if blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name):
        return blob.name  # the hub's cache names large files by their SHA-256
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
