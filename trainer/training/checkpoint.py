"""Checkpoints: written atomically, hashed, adapter-only, rotating.

Always holds: a folder named step-XXXXXXXX is complete. It is written under another name, synced to disk and then
renamed. A reader checks every hash first and takes the newest complete checkpoint. A checkpoint has what trains, the
optimizer's state and a few numbers. It never has the frozen backbone or a pickle.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate.utils import gather_object

from trainer.config.schema import as_dict
from trainer.errors import UserError
from trainer.files import UNFINISHED, replace_folder
from trainer.model.adapter import adapter_config_json, adapter_tensors, load_adapter_tensors
from trainer.training.records import Run
from trainer.training.state import TrainState, state_from_json

FORMAT = 1


class DamagedCheckpoint(Exception):
    """A checkpoint differs from what was written; the message names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint; tensors on the CPU."""

    step: int
    adapter: dict[str, torch.Tensor]
    """adapter and head at this step, under PEFT's names"""
    best_adapter: dict[str, torch.Tensor] | None
    """adapter and head at the best evaluation so far"""
    optimizer: dict[str, torch.Tensor]
    """optimizer state as "parameter name/state name" """
    state: dict[str, Any]
    """trainer_state.json: `TrainState`, fp16 scaler, fingerprints, backbone"""
    adapter_config: str
    """adapter_config.json"""


def save_checkpoint(run: Run, state: TrainState, best: dict[str, torch.Tensor] | None) -> None:
    """Writes a checkpoint from the main process; an error there stops every rank."""
    learner, failure = run.learner, ""
    run.watch.position = f"the checkpoint of step {state.step}"
    if learner.accelerator.is_main_process:
        scaler = learner.accelerator.scaler
        checkpoint = Checkpoint(
            step=state.step,
            adapter=adapter_tensors(learner.model),
            best_adapter=best,
            optimizer=optimizer_tensors(learner.optimizer.optimizer, list(learner.parameters)),
            state={
                "train": dataclasses.asdict(state),
                "scaler": scaler.state_dict() if scaler is not None else None,
                "fingerprints": run.inputs.fingerprints,
                "backbone": dataclasses.asdict(run.inputs.backbone.identity),
                "budgets": [run.plan.max_tokens, run.eval_max_tokens],
                "config": as_dict(run.config),
            },
            adapter_config=adapter_config_json(learner.model.peft_config["default"]),
        )
        try:
            write_checkpoint(run.folder / "checkpoints", checkpoint, run.config.checkpoint.keep_last)
        except OSError as error:
            failure = str(error)
    failures = [text for text in gather_object([failure]) if text]
    if failures:
        raise UserError(failures[0])


def restore(run: Run, checkpoint: Checkpoint) -> TrainState:
    """Loads a checkpoint into model, optimizer and scaler, and returns its state; refuses one of another run."""
    learner, values, fingerprints = run.learner, checkpoint.state, run.inputs.fingerprints
    for name in dict.fromkeys([*fingerprints, *values["fingerprints"]]):
        recorded = values["fingerprints"].get(name)
        if recorded != fingerprints.get(name):
            hint = " (texts, labels, or tokens of another tokenizer)" if name.endswith(" split") else ""
            hint = " (dropout masks of another version; finish it with that version)" if name == "draw format" else hint
            raise UserError(
                f"{run.folder} was started with another {name}{hint}; restore that, or start a new run: --run.name NAME"
            )
    try:
        state = state_from_json(values["train"])
        load_optimizer_tensors(learner.optimizer.optimizer, list(learner.parameters), checkpoint.optimizer)
    except (DamagedCheckpoint, UserError) as error:
        raise UserError(f"{run.folder}: the checkpoint of step {checkpoint.step} does not fit: {error}") from None
    load_adapter_tensors(learner.model, checkpoint.adapter, str(run.folder))
    if learner.accelerator.scaler is not None and values["scaler"] is not None:
        learner.accelerator.scaler.load_state_dict(values["scaler"])
    if values["budgets"] != [run.plan.max_tokens, run.eval_max_tokens]:  # the user has changed them
        state = dataclasses.replace(state, max_tokens=None)
    return dataclasses.replace(state, resumed_from=(*state.resumed_from, state.step))


def write_checkpoint(folder: Path, checkpoint: Checkpoint, keep_last: int) -> Path:
    """Writes `folder`/step-XXXXXXXX and removes all but the newest `keep_last` up to this step.

    It removes later steps too: they were damaged, or this run would have resumed there.

    Raises:
        OSError: the disk is full or not writable; earlier checkpoints are still complete.
    """
    files = {
        "adapter_model.safetensors": safetensors.torch.save(checkpoint.adapter, {"format": "pt"}),
        "adapter_config.json": checkpoint.adapter_config.encode(),
        "optimizer.safetensors": safetensors.torch.save(checkpoint.optimizer, {"format": "pt"}),
        "trainer_state.json": _json(checkpoint.state),
    }
    if checkpoint.best_adapter is not None:
        files["best_adapter.safetensors"] = safetensors.torch.save(checkpoint.best_adapter, {"format": "pt"})
    manifest = {
        "format": FORMAT,
        "step": checkpoint.step,
        "files": {name: {"bytes": len(data), "sha256": _sha256(data)} for name, data in files.items()},
    }
    target = folder / f"step-{checkpoint.step:08d}"
    replace_folder(target, files | {"manifest.json": _json(manifest)})
    kept = [path for path in _numbered(folder) if path <= target][-keep_last:]
    for path in set(_numbered(folder)) - set(kept):
        _remove_folder(path)
    return target


def load_newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest complete checkpoint, and a line about each damaged one that was skipped.

    Raises:
        UserError: a checkpoint cannot be read, or is of a newer version. It may be whole, so none before it is taken.
    """
    damage: list[str] = []
    for path in reversed(_numbered(folder)):
        try:
            return read_checkpoint(path), damage
        except DamagedCheckpoint as error:
            damage.append(f"checkpoint {path.name} is damaged ({error}); it is skipped")
    return None, [*damage, "no whole checkpoint is left; starting from the beginning"] if damage else []


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads one checkpoint after a check of its hashes."""
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        if manifest["format"] > FORMAT:
            raise UserError(f"{path} is of a newer version (format {manifest['format']}); continue with that version")
        contents = {name: _verified(path / name, entry) for name, entry in manifest["files"].items()}
        if manifest["step"] != int(path.name.removeprefix("step-")):
            raise DamagedCheckpoint("manifest.json is of another step")
        best = contents.get("best_adapter.safetensors")
        return Checkpoint(
            step=manifest["step"],
            adapter=safetensors.torch.load(contents["adapter_model.safetensors"]),
            best_adapter=safetensors.torch.load(best) if best is not None else None,
            optimizer=safetensors.torch.load(contents["optimizer.safetensors"]),
            state=json.loads(contents["trainer_state.json"]),
            adapter_config=contents["adapter_config.json"].decode(),
        )
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise DamagedCheckpoint(f"manifest.json: {type(error).__name__} {error}") from None
    except OSError as error:  # a network file system that is away, or another user's files
        raise UserError(
            f"{error}; make it readable, or remove {path} to continue from the checkpoint before it"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError) as error:
        raise DamagedCheckpoint(f"manifest.json: {type(error).__name__} {error}") from None


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, torch.Tensor]:
    """The optimizer's state as tensors on the CPU, named "parameter name/state name"."""
    state = optimizer.state_dict()["state"]
    return {
        f"{names[index]}/{key}": torch.as_tensor(value).detach().to("cpu", copy=True).contiguous()
        for index, values in state.items()
        for key, value in values.items()
        if value is not None
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: list[str], tensors: dict[str, torch.Tensor]
) -> None:
    """Loads what `optimizer_tensors` returned; the optimizer keeps its own hyperparameters."""
    index = {name: i for i, name in enumerate(names)}
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, entry = key.rpartition("/")
        if name not in index:
            raise DamagedCheckpoint(f"optimizer state of unknown parameter {name}")
        state.setdefault(index[name], {})[entry] = tensor
    if state and len(state) < len(names):  # sgd has no state
        raise DamagedCheckpoint(f"{len(names) - len(state)} trained parameters have no optimizer state")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _numbered(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    return sorted(folder.glob(f"step-{8 * '[0-9]'}"))


def _remove_folder(path: Path) -> None:
    """Removes a folder; a process that is killed meanwhile leaves no part of it under its name."""
    retired = path.with_name(f"{UNFINISHED}old-{path.name}")
    path.rename(retired)
    shutil.rmtree(retired, ignore_errors=True)


def _verified(path: Path, entry: dict[str, Any]) -> bytes:
    if not path.is_file():
        raise DamagedCheckpoint(f"{path.name} is missing")
    data = path.read_bytes()
    if _sha256(data) != entry["sha256"]:
        raise DamagedCheckpoint(f"{path.name} was altered: its SHA-256 is another")
    return data


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
