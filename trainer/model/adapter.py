"""The adapter: its tensors in a model, its folder on disk, the model that a folder makes, and its merge for export.

Always holds: an adapter is read strictly, so a missing or an unexpected tensor is an error. The folder is plain PEFT,
with tokenizer, labels, the backbone's identity and a model card beside it, and is put in place as a whole. A merged
model appears only after it, read back from disk, had the logits of backbone and adapter.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import safetensors.torch
import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from trainer.compat import adapter_state, trained_module
from trainer.config.schema import Config, ModelConfig, PeftConfig, TaskConfig
from trainer.errors import UserError, one_line, print_once
from trainer.files import UNFINISHED, publish, replace_folder, writing
from trainer.model.backbone import Backbone, Identity, check_same_backbone, find_backbone, load_weights
from trainer.model.build import build_without_weights, set_precision, widen_trained
from trainer.model.plain import is_plain, only_these_train
from trainer.model.tokenizer import save_tokenizer
from trainer.tasks import check_constants, make_task
from trainer.tasks.task import Constants, Task

IDENTITY, WEIGHTS, CONSTANTS = "backbone/identity.json", "adapter_model.safetensors", "task.json"
CONFIG = "adapter_config.json"
PROBES = (
    "The committee met on Tuesday and postponed its decision.",
    "A short one.",
    "Shares of the company fell by a tenth after the match was abandoned, scientists said, in heavy rain.",
)
TOLERANCE = 1e-4  # of logits in fp32: merging adds B A to W before the product with x instead of after it


def adapter_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    """Adapter and head under PEFT's own names, copied to the CPU."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in adapter_state(model).items()}


def load_adapter_tensors(model: Any, tensors: dict[str, torch.Tensor], source: str) -> None:
    """Puts tensors of adapter and head into the model; `source` says in messages where they are from."""
    _check_tensors(model, tensors, source)
    if is_plain(model):
        model.load(tensors)
    else:
        set_peft_model_state_dict(model, tensors)


def _check_tensors(model: PeftModel, tensors: dict[str, torch.Tensor], source: str) -> None:
    expected = adapter_state(model)
    for problem, names in (("lacks", {*expected} - {*tensors}), ("has an unexpected", {*tensors} - {*expected})):
        if names:
            raise UserError(f"{source}: the adapter {problem} tensor {min(names)} ({len(names)} in all)")
    for name, tensor in tensors.items():
        if tensor.shape != (shape := expected[name].shape):
            raise UserError(f"{source}: {name} has shape {list(tensor.shape)}, the model needs {list(shape)}")


def adapter_config_json(config: peft.PeftConfig) -> str:
    """adapter_config.json as PEFT writes it."""
    config = copy.deepcopy(config)
    config.inference_mode = True
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    return json.dumps(values, indent=2, sort_keys=True, default=str) + "\n"


@dataclasses.dataclass(frozen=True)
class SavedAdapter:
    """The adapter of a finished run, which another run starts from."""

    folder: Path
    tensors: dict[str, torch.Tensor]
    label_names: list[str]
    problem_type: str
    """the task's name in transformers"""
    backbone: Identity
    """the backbone it was trained on"""
    peft: dict[str, Any]
    """its adapter_config.json"""

    def fingerprint(self) -> str:
        """SHA-256 of the tensors as a file."""
        return hashlib.sha256(safetensors.torch.save(self.tensors)).hexdigest()


def read_adapter(folder: Path) -> SavedAdapter:
    """Reads a folder that `save_adapter` wrote."""
    if (folder / WEIGHTS).is_file() and not (folder / CONFIG).is_file():
        raise UserError(f"model.adapter: {folder} is of a run with peft.peft_type none; name one with an adapter")
    try:
        tensors = safetensors.torch.load_file(folder / WEIGHTS)
        label_names = [str(name) for name in json.loads((folder / "labels.json").read_text(encoding="utf-8"))]
        backbone = Identity(**json.loads((folder / IDENTITY).read_bytes()))
        peft = dict(json.loads((folder / CONFIG).read_bytes()))
        problem_type = str(json.loads((folder / "backbone/config.json").read_bytes())["problem_type"])
    except (OSError, ValueError, TypeError, LookupError, SafetensorError) as error:
        raise UserError(f"model.adapter: {folder} is not the adapter of a finished run: {one_line(error)}") from None
    return SavedAdapter(folder, tensors, label_names, problem_type, backbone, peft)


def find_class_tensors(backbone: Backbone, settings: PeftConfig) -> set[str]:
    """Names of the tensors of the head with a row for each class: their shape depends on the number of classes."""
    wider = dataclasses.replace(backbone, config=copy.deepcopy(backbone.config))
    wider.config.num_labels = len(backbone.config.id2label or {}) + 1
    shapes = [
        {name: tensor.shape for name, tensor in adapter_state(build_without_weights(each, settings)).items()}
        for each in (backbone, wider)
    ]
    return {name for name, shape in shapes[0].items() if shape != shapes[1][name]}


def take_over(
    start: SavedAdapter, new: dict[str, torch.Tensor], label_names: list[str], class_tensors: set[str]
) -> dict[str, torch.Tensor]:
    """The saved tensors for other classes: a class that both have keeps its rows, another one has those of `new`."""
    tensors = dict(start.tensors)
    pairs = [(label_names.index(name), row) for row, name in enumerate(start.label_names) if name in label_names]
    for name in class_tensors & tensors.keys():
        if len(tensors[name]) == len(start.label_names) and tensors[name].shape[1:] == new[name].shape[1:]:
            tensors[name] = new[name].clone()
            for to, row in pairs:
                tensors[name][to] = start.tensors[name][row]
    return tensors


def save_adapter(
    folder: Path,
    peft_config: peft.PeftConfig,
    tensors: dict[str, torch.Tensor],
    backbone: Backbone,
    max_length: int,
    label_names: list[str],
    constants: Constants,
    card: str,
) -> None:
    """Writes the adapter folder, with the constants of the task. An `OSError` leaves an existing folder unchanged."""
    temporary = folder.with_name(f"{UNFINISHED}{folder.name}")  # in a container only this place may be writable
    shutil.rmtree(temporary, ignore_errors=True)
    with writing(temporary):
        save_tokenizer(backbone.tokenizer, max_length, temporary)
        files = {path.name: path.read_bytes() for path in temporary.iterdir() if path.is_file()}
    files[WEIGHTS] = safetensors.torch.save(tensors, {"format": "pt"})
    if peft_config.peft_type is not None:
        files[CONFIG] = adapter_config_json(peft_config).encode()
    # in its own folder: beside adapter_config.json, transformers would read the adapter as a whole model
    files["backbone/config.json"] = backbone.config.to_json_string().encode()
    files[IDENTITY] = (json.dumps(dataclasses.asdict(backbone.identity), indent=2, ensure_ascii=False) + "\n").encode()
    files["labels.json"] = (json.dumps(label_names, ensure_ascii=False) + "\n").encode()
    if constants:
        files[CONSTANTS] = (json.dumps(constants, indent=2, ensure_ascii=False) + "\n").encode()
    files["README.md"] = card.encode("utf-8", "backslashreplace")
    replace_folder(folder, files)


def load_task(folder: Path, config: TaskConfig, label_names: list[str]) -> Task:
    """The task of a finished run, with the constants in its adapter's folder."""
    return make_task(config, load_constants(folder, config, label_names))


def load_constants(folder: Path, config: TaskConfig, label_names: list[str], option: str = "--run") -> Constants:
    """The constants of the task that `save_adapter` wrote; `option` is the one that names the folder."""
    path = folder / CONSTANTS
    try:
        constants = dict(json.loads(path.read_bytes())) if path.is_file() else {}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{option}: {path} cannot be read: {one_line(error)}") from None
    try:
        return check_constants(config, constants, label_names)
    except UserError as error:
        raise UserError(f"{option}: {path}: {error}") from None


def find_trained_backbone(run: Path, config: ModelConfig, label_names: list[str], problem_type: str) -> Backbone:
    """Finds the backbone that a finished run trained on, or refuses another; the tokenizer is the adapter's own."""
    folder, recorded = run / "adapter", None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        side = tokenizer.padding_side  # the run's; `find_backbone` sets the backbone's own
        if (folder / IDENTITY).is_file():
            recorded = Identity(**json.loads((folder / IDENTITY).read_bytes()))
        else:
            line = f"{run} does not record its backbone: {config.name} may not be the one it was trained on"
            print_once(f"warning: {line}", quiet=False)
    except Exception as error:  # tokenizers raise bare exceptions
        raise UserError(f"--run: tokenizer or {IDENTITY} of {folder} cannot be read: {one_line(error)}") from None
    try:
        backbone = find_backbone(config, label_names, recorded, tokenizer, problem_type)
    except UserError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{reason}\nName an unchanged copy of the run's backbone: --model.name FOLDER") from None
    backbone.tokenizer.padding_side = side
    if recorded is not None:
        check_same_backbone(recorded, backbone.identity, run)
    return backbone


def load_trained_model(
    backbone: Backbone, folder: Path, compute_type: torch.dtype = torch.float32, dequantize: bool = False
) -> PeftModel:
    """Loads a backbone with what `folder` holds, in evaluation mode: an adapter through plain PEFT."""
    model, _, _ = load_weights(backbone, dequantize)
    try:
        # trainable until the frozen weights are cast, so that the adapter stays in fp32 as in training
        if (folder / CONFIG).is_file():
            if json.loads((folder / CONFIG).read_bytes()).get("peft_type") == "OSF":
                model.float()  # OSF computes its factors in the type of the weights
            model = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
        else:
            model = only_these_train(model, safetensors.torch.load_file(folder / WEIGHTS).keys())
    except (OSError, RuntimeError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(f"{folder}: the adapter does not fit: {' '.join(str(error).split())[:240]}") from None
    widen_trained(model)  # PEFT loads into the types of the backbone
    load_adapter_tensors(model, safetensors.torch.load_file(folder / WEIGHTS), str(folder))
    set_precision(model, compute_type)
    return model.requires_grad_(False).eval()


def check_adapter(
    folder: Path,
    backbone: Backbone,
    inputs: Mapping[str, torch.Tensor],
    expected: torch.Tensor,
    compute_type: torch.dtype,
    tolerance: float,
) -> None:
    """Loads a folder of `save_adapter` into a fresh model, so no run ends with an adapter that does not work.

    `inputs` are input_ids and attention_mask of some examples, [B, L]. `expected` are the trained model's logits of
    them, [B, C]. Weights, types and kernels are equal, so only the order of sums may differ by the tolerance.
    """
    device = next(iter(inputs.values())).device
    fresh = load_trained_model(backbone, folder, compute_type).to(device)
    with torch.no_grad(), torch.autocast(device.type, compute_type, enabled=compute_type != torch.float32):
        difference = (fresh(**inputs).logits.float() - expected.to(device).float()).abs().max().item()
    if not difference <= tolerance:
        raise RuntimeError(f"{folder}: logits differ from the trained model's by {difference:.2g}")


def export_merged(adapter: Path, backbone: Backbone, config: Config, output: Path, task: Task) -> float:
    """Merges, saves, reads back and compares; returns the largest difference of a logit of the adapter.

    If the predictions of the task are numbers, the model's logits are these numbers.
    """
    model = load_trained_model(backbone, adapter, dequantize=True)
    expected = _compute_logits(model, backbone.tokenizer)
    factor, shift = map(torch.from_numpy, task.affine or (np.ones(1), np.zeros(1)))
    rounding = 4 * torch.finfo(torch.float32).eps * shift.abs() / factor  # of numbers far from 0 for their scale
    temporary = output.with_name(f"{UNFINISHED}{output.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with writing(output):
            merged = merge(model, config)
            if task.affine is not None:
                scale_head(merged, factor, shift)
            merged.save_pretrained(temporary)
            for path in temporary.glob("*.safetensors"):  # safetensors makes them unreadable for others
                path.chmod((temporary / "config.json").stat().st_mode)
            save_tokenizer(backbone.tokenizer, config.data.max_length, temporary)
        saved = AutoModelForSequenceClassification.from_pretrained(temporary, trust_remote_code=False).eval()
        found = (_compute_logits(saved, backbone.tokenizer).double() - shift) / factor
        differences = (found - expected).abs().amax(dim=0)
        difference = differences.max().item()
        if not (differences <= TOLERANCE * max(1.0, expected.abs().max().item()) + rounding).all():
            raise UserError(
                f"--run: the merged model's logits differ by {difference:.2g} from the adapter's; not exported"
            )
        publish(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return float(difference)


def merge(model: Any, config: Config) -> Any:
    """The backbone's model with the adapter in its weights."""
    unwrap_head(model)
    if config.peft.options.get("layer_replication"):
        copy_shared_parameters(model)
    try:
        return model.merge_and_unload(safe_merge=True)
    except (AttributeError, NotImplementedError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"--run: an adapter of type {config.peft.peft_type} cannot be merged: {error}") from None


def scale_head(model: Any, factor: torch.Tensor, shift: torch.Tensor) -> None:
    """Makes each logit logit * factor + shift, in the last layer of the head; [C] each."""
    inner = f"{model.base_model_prefix}."
    heads = [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not name.startswith(inner) and module.out_features == len(factor)
    ]
    if not heads or heads[-1].bias is None:
        raise UserError(
            "--run: the head of this backbone has no bias that could hold the mean of the targets; use predict.py, or "
            "the lines in adapter/README.md"
        )
    weight, bias = heads[-1].weight, heads[-1].bias
    weight.data = (weight.double() * factor[:, None]).to(weight.dtype)
    bias.data = (bias.double() * factor + shift).to(bias.dtype)


def unwrap_head(model: Any) -> None:
    """Replaces PEFT's wrapper of the head by the trained head. PEFT 0.21 merges the wrapper correctly for LoRA only."""
    for name, module in list(model.named_modules()):
        if (trained := trained_module(module)) is not module:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, trained)


def copy_shared_parameters(model: Any) -> None:
    """Gives each layer that PEFT replicated parameters of its own to merge into."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in seen:
                setattr(module, name, torch.nn.Parameter(parameter.detach().clone()))
            seen.add(id(parameter))


def _compute_logits(model: Any, tokenizer: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(**tokenizer(list(PROBES), return_tensors="pt", padding=True)).logits
    return logits
