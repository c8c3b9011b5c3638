"""The adapter in and out: tensors of a trained model, the adapter/ folder, a fresh model from it.

Always holds: an adapter is read strictly, a missing or an unexpected tensor is an error; the folder is plain PEFT,
beside tokenizer, class names, the backbone's record and a model card, and is put in place whole.
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

import safetensors.torch
import torch
import yaml
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer

from trainer.config.schema import Config, ModelConfig, completed
from trainer.errors import UserError, one_line
from trainer.files import UNFINISHED, replace_folder, writing
from trainer.model.backbone import Backbone, Identity, apart, find_backbone, load_weights, refuse_another
from trainer.model.build import set_precision

IDENTITY = "backbone/identity.json"


def adapter_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    """The adapter and head under PEFT's own names, copied to the CPU."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in _state_of(model).items()}


def _state_of(model: PeftModel) -> dict[str, torch.Tensor]:
    """What PEFT takes for the adapter. Of `bias: all` it takes the head's frozen original too, and its biases twice."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {
        name: tensor
        for name, tensor in state.items()
        if ".original_module." not in name and ".modules_to_save.default." not in name
    }


def load_adapter_tensors(model: PeftModel, tensors: dict[str, torch.Tensor], source: str) -> None:
    """Puts adapter and head in place.

    Raises:
        UserError: any tensor missing, unexpected or of another shape.
    """
    expected = _state_of(model)
    _refuse_other_keys(set(tensors), set(expected), source)
    wrong = [name for name, tensor in tensors.items() if tensor.shape != expected[name].shape]
    if wrong:
        shapes = list(tensors[wrong[0]].shape), list(expected[wrong[0]].shape)
        raise UserError(f"{source}: {wrong[0]} has shape {shapes[0]}, the model wants {shapes[1]}")
    set_peft_model_state_dict(model, tensors)


@dataclasses.dataclass(frozen=True)
class Start:
    """The adapter of a finished run that another run starts from."""

    folder: Path
    tensors: dict[str, torch.Tensor]
    label_names: list[str]
    recorded: Identity
    """the backbone it was trained on"""
    peft: dict[str, Any]
    """its adapter_config.json"""

    def fingerprint(self) -> str:
        """SHA-256 of the tensors as a file."""
        return hashlib.sha256(safetensors.torch.save(self.tensors)).hexdigest()


def read_start(folder: Path) -> Start:
    """Reads what `save_adapter` has written.

    Raises:
        UserError: it is not there, or cannot be read.
    """
    try:
        tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
        label_names = [str(name) for name in json.loads((folder / "labels.json").read_text(encoding="utf-8"))]
        recorded = Identity(**json.loads((folder / IDENTITY).read_bytes()))
        peft = dict(json.loads((folder / "adapter_config.json").read_bytes()))
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(f"model.adapter: {folder} is no adapter folder of a finished run: {one_line(error)}") from None
    return Start(folder, tensors, label_names, recorded, peft)


def adapter_config_json(model: PeftModel) -> str:
    """adapter_config.json as PEFT writes it."""
    config = copy.deepcopy(model.peft_config["default"])
    config.inference_mode = True
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    return json.dumps(values, indent=2, sort_keys=True, default=str) + "\n"


def find_trained_backbone(run: Path, config: ModelConfig, label_names: list[str]) -> tuple[Backbone, list[str]]:
    """The backbone that a finished run trained on, with the adapter's own tokenizer; and warnings.

    Raises:
        UserError: not found, or another backbone than the recorded one.
    """
    folder = run / "adapter"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raise bare ones
        raise UserError(f"--run: the tokenizer in {folder} cannot be read: {one_line(error)}") from None
    try:
        recorded = Identity(**json.loads((folder / IDENTITY).read_bytes()))
    except FileNotFoundError:  # a run of an earlier version
        recorded = None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--run: {folder / IDENTITY} cannot be read: {error}") from None
    try:
        backbone = find_backbone(config, label_names, recorded, tokenizer)
    except UserError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{reason}\nName an unchanged copy of the run's backbone: --model.name FOLDER") from None
    if recorded is None:
        return backbone, [f"{run} has no record of its backbone: {config.name} may not be the one it was trained on"]
    refuse_another(recorded, backbone.identity, run)
    return backbone, []


def load_plain(backbone: Backbone, folder: Path, compute_type: torch.dtype = torch.float32) -> PeftModel:
    """A fresh backbone with the adapter in `folder`, through plain PEFT, in evaluation mode.

    Raises:
        UserError: the adapter does not fit the backbone: names the first missing or unexpected tensor.
    """
    model, _ = load_weights(backbone)
    try:
        # trainable until the frozen weights are cast: the adapter's own are kept in fp32, as in training
        model = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    except (OSError, RuntimeError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(f"{folder}: the adapter does not fit: {' '.join(str(error).split())[:240]}") from None
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        saved = set(file.keys())
    _refuse_other_keys(saved, set(_state_of(model)), str(folder))
    set_precision(model, compute_type)
    return model.requires_grad_(False).eval()


def save_adapter(
    folder: Path,
    model: PeftModel,
    tensors: dict[str, torch.Tensor],
    backbone: Backbone,
    max_length: int,
    label_names: list[str],
    card: str,
) -> None:
    """Writes the adapter folder: plain PEFT layout, the tokenizer, labels.json, README.md and backbone/.

    Raises:
        OSError: the disk is full or not writable; a folder that was there is unchanged.
    """
    temporary = folder.with_name(f"{UNFINISHED}{folder.name}")  # a container may have no other place to write
    shutil.rmtree(temporary, ignore_errors=True)
    with writing(temporary):
        save_tokenizer(backbone.tokenizer, max_length, temporary)
        files = {path.name: path.read_bytes() for path in temporary.iterdir() if path.is_file()}
    files["adapter_model.safetensors"] = safetensors.torch.save(tensors, {"format": "pt"})
    files["adapter_config.json"] = adapter_config_json(model).encode()
    # in a folder of its own: beside adapter_config.json, transformers would take the adapter for a whole model
    files["backbone/config.json"] = backbone.config.to_json_string().encode()
    files[IDENTITY] = (json.dumps(dataclasses.asdict(backbone.identity), indent=2, ensure_ascii=False) + "\n").encode()
    files["labels.json"] = (json.dumps(label_names, ensure_ascii=False) + "\n").encode()
    files["README.md"] = card.encode("utf-8", "backslashreplace")
    replace_folder(folder, files)


def save_tokenizer(tokenizer: Any, max_length: int, folder: Path) -> None:
    """Writes the tokenizer with the run's length, so that whoever truncates gets what the model was trained on."""
    own = copy.deepcopy(tokenizer)
    own.init_kwargs.pop("max_length", None)  # of an earlier use
    own.model_max_length = max_length
    own.save_pretrained(folder)
    if any(apart(token) in own.backend_tokenizer.to_str() for token in own.all_special_tokens):
        # its own class would build the tokenizer without our normalizer; this one reads tokenizer.json as it is
        path = folder / "tokenizer_config.json"
        values = json.loads(path.read_text(encoding="utf-8"))
        values |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": own.model_input_names}
        path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_adapter(
    folder: Path,
    backbone: Backbone,
    inputs: Mapping[str, torch.Tensor],
    expected: torch.Tensor,
    compute_type: torch.dtype,
    tolerance: float,
) -> None:
    """Loads the folder into a fresh model through plain PEFT and compares logits: no run ends with a dead adapter.

    Args:
        folder: as `save_adapter` wrote it.
        backbone: that the adapter was trained on.
        inputs: input_ids and attention_mask of some examples, [B, L].
        expected: logits of the trained model, holding the tensors that were saved, on these examples, [B, C].
        compute_type: of the trained model's frozen matrices.
        tolerance: of a logit. The weights, types and kernels are the same: what may differ is the order of sums.

    Raises:
        RuntimeError: the logits differ.
    """
    device = next(iter(inputs.values())).device
    fresh = load_plain(backbone, folder, compute_type).to(device)
    with torch.no_grad(), torch.autocast(device.type, compute_type, enabled=compute_type != torch.float32):
        difference = (fresh(**inputs).logits.float() - expected.to(device).float()).abs().max().item()
    if not difference <= tolerance:
        raise RuntimeError(f"{folder} gives other logits than the trained model (by {difference:.2g})")


def model_card(
    name: str, config: Config, backbone: Backbone, label_names: list[str], summary: Mapping[str, Any]
) -> str:
    """README.md of an adapter, from the run's summary."""
    front = {"library_name": "peft", "pipeline_tag": "text-classification"}
    if backbone.revision:  # the hub takes no local folder for a base model
        front["base_model"] = backbone.path
    scored = [(split, summary[split]) for split in ("validation", "test") if split in summary]
    rows = "".join(f"| {s} | {m['accuracy']:.4f} | {m['f1_macro']:.4f} | {m['num_examples']} |\n" for s, m in scored)
    names = "\n".join(f"    {i}: {json.dumps(label, ensure_ascii=False)}" for i, label in enumerate(label_names))
    return f"""---
{yaml.safe_dump(front, sort_keys=False)}---

# {name}

A {config.peft.peft_type} adapter and classification head, trained by Isotrain: {summary["trainable_parameters"]:,}
trained parameters, {summary["steps"]} steps, best of step {summary["best_step"]}. `backbone/identity.json` names the
backbone, with its commit on the hub and the SHA-256 of its files.

| split | accuracy | macro F1 | examples |
|---|---|---|---|
{rows}
Classes, by number (also in labels.json):

{names}

These lines classify a text:

{loading_lines(backbone, pairs=bool(completed(config.data.train or "", config.data).text_pair_columns))}"""


def loading_lines(backbone: Backbone, pairs: bool) -> str:
    """The lines of a model card that load the adapter without Isotrain."""
    name, imports = backbone.asked.name, ""
    path, comment = repr(backbone.path), "" if backbone.revision else "  # the backbone's folder"
    if name.startswith("package:"):
        package, _, folder = name.removeprefix("package:").partition("/")
        imports = "from importlib.util import find_spec\n\n"
        path, comment = f"find_spec({package!r}).submodule_search_locations[0] + {'/' + folder!r}", ""
    revision = f"revision={backbone.revision!r}, " if backbone.revision else ""
    text = '{"text": "A text.", "text_pair": "Its pair."}' if pairs else '"A text."'
    return f"""```python
{imports}from peft import PeftModel
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, pipeline

adapter = "adapter"  # this folder
backbone = {path}{comment}

tokenizer = AutoTokenizer.from_pretrained(adapter)
config = AutoConfig.from_pretrained(adapter, subfolder="backbone")
model = AutoModelForSequenceClassification.from_pretrained(
    backbone, {revision}config=config, dtype="float32", ignore_mismatched_sizes=True
)
model = PeftModel.from_pretrained(model, adapter).eval()
classify = pipeline("text-classification", model=model, tokenizer=tokenizer)
print(classify([{text}], truncation=True, top_k=None))
```
"""


def _refuse_other_keys(saved: set[str], expected: set[str], source: str) -> None:
    for what, names in (("lacks", expected - saved), ("has an unexpected", saved - expected)):
        if names:
            raise UserError(f"{source}: the adapter {what} tensor {sorted(names)[0]} ({len(names)} in all)")
