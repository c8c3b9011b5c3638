"""Backbone + head + PEFT adapter: checking them before a weight is read, building them.

Always holds: only the adapter and the head train, in fp32; frozen matrices are kept in the compute type, norms and
embeddings as loaded. The head is every module outside the backbone proper plus whatever the weights file lacks, so no
freshly drawn layer is ever left untrained or unsaved.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import re
from typing import Any

import jsonargparse
import peft
import torch
import transformers
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForSequenceClassification

from trainer.config.schema import PeftConfig
from trainer.errors import UserError, one_line
from trainer.model.backbone import Backbone, load_weights

# Methods whose adapter holds all that trains, so that a checkpoint resumes exactly; each is under test.
PEFT_TYPES = (
    "LORA", "C3A", "FOURIERFT", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "MISS", "OFT", "VERA"
)  # fmt: skip
OURS_TO_SET = {
    "peft_type",
    "task_type",
    "inference_mode",
    "base_model_name_or_path",
    "revision",
    "auto_mapping",
    "peft_version",
}
# These start from changed backbone weights, so the saved adapter would not fit the backbone it names.
CHANGES_BACKBONE = ("pissa", "corda", "olora", "loftq", "eva", "lora_ga")
PRODUCTS = (nn.Linear, transformers.pytorch_utils.Conv1D)
COMPUTE_TYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def adapter_config(settings: PeftConfig, path: str) -> peft.PeftConfig:
    """PEFT's own configuration of the adapter, names and types checked against PEFT's class.

    Raises:
        UserError: unknown method or option (names the nearest), wrong type, or values PEFT refuses; all at once.
    """
    if settings.peft_type not in PEFT_TYPES:
        raise UserError(f"peft.peft_type: {settings.peft_type!r} is not supported; supported: {', '.join(PEFT_TYPES)}")
    kind = _kind_of(settings.peft_type)
    known = _names_of(settings.peft_type)
    parser = _parser_of(settings.peft_type)
    problems, options = [], {}
    for name, value in settings.options.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; nearest: peft.{near[0]}" if near else f"; it has {', '.join(sorted(known))}"
            if any(name in _names_of(other) for other in PEFT_TYPES):  # of a recipe for another method, perhaps
                hint += f"; --peft.{name} null leaves it out"
            problems.append(f"unknown option 'peft.{name}' for {settings.peft_type}{hint}")
            continue
        try:
            options[name] = parser.parse_object({"peft": {name: value}})["peft"][name]
        except jsonargparse.ArgumentError:
            problems.append(
                f"peft.{name}: {value!r} does not fit; PEFT wants {kind.__annotations__.get(name, 'another type')}"
            )
    start = settings.options.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGES_BACKBONE):
        problems.append(
            f"peft.init_lora_weights: {start!r} changes the frozen backbone; the adapter alone would not load"
        )
    for name, value in options.items():
        if name.endswith("dropout") and isinstance(value, int | float) and not 0 <= value < 1:
            problems.append(f"peft.{name}: {value} must be at least 0 and below 1")
    if settings.peft_type in ("LOHA", "LOKR") and options.get("module_dropout"):
        problems.append("peft.module_dropout: it leaves out whole adapters, which then get no gradient; only 0 trains")
    if options.get("alora_invocation_tokens"):
        problems.append("peft.alora_invocation_tokens: such an adapter acts only behind these tokens; nothing trains")
    if problems:
        raise UserError("\n".join(problems))
    if settings.peft_type == "IA3" and options.get("target_modules"):
        # left open, PEFT would fill it in on loading with modules that may not be targets
        options.setdefault("feedforward_modules", [])
    try:
        return kind(task_type=peft.TaskType.SEQ_CLS, base_model_name_or_path=path, **options)
    except (TypeError, ValueError) as error:
        raise UserError(f"peft: {one_line(error)}") from None


def _kind_of(peft_type: str) -> type[peft.PeftConfig]:
    return PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(peft_type)]


def _names_of(peft_type: str) -> set[str]:
    return {item.name for item in dataclasses.fields(_kind_of(peft_type))} - OURS_TO_SET


@functools.cache
def _parser_of(peft_type: str) -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(_kind_of(peft_type), "peft")
    return parser


def check_fit(backbone: Backbone, settings: PeftConfig, max_length: int, pairs: bool) -> PeftModel:
    """Builds the model, without weights, and refuses what cannot train, before anything large is read.

    Raises:
        UserError: max_length above the backbone's positions, targets that match nothing, budget exceeded.
    """
    positions = backbone.max_positions
    if positions is not None and max_length > positions:
        raise UserError(f"data.max_length: {max_length} is above the {positions} positions of {backbone.path}")
    if getattr(backbone.config, "attention_type", None) == "block_sparse":
        full = (5 + 2 * backbone.config.num_random_blocks) * backbone.config.block_size
        if max_length > full:
            raise UserError(
                f"data.max_length: {max_length} is not supported: above {full} tokens this backbone attends to blocks "
                f"drawn at random, and to others in evaluation; use --data.max_length {full}"
            )
    num_special = backbone.tokenizer.num_special_tokens_to_add(pair=pairs)
    if max_length <= num_special:
        raise UserError(f"data.max_length: {max_length} leaves no room for text beside {num_special} special tokens")
    wanted = adapter_config(settings, backbone.path)
    with torch.device("meta"):
        try:
            # PEFT's layer_replication changes the configuration
            model = AutoModelForSequenceClassification.from_config(copy.deepcopy(backbone.config))
        except Exception as error:  # of whatever kind the family's code raises at numbers that do not fit together
            raise UserError(f"model.name: {backbone.path} cannot be built: {one_line(error)}") from None
        _check_targets(model, settings)
        model = _wrap(model, wanted, set())
        _check_adapted(model, settings)
    check_budget(model, settings)
    return model


def build_model(backbone: Backbone, settings: PeftConfig, seed: int) -> PeftModel:
    """Loads the weights and adds head and adapter, drawn from the seed; in fp32 on the CPU.

    Raises:
        UserError: weights that cannot be read, or the budget exceeded by layers the weights file lacks.
    """
    torch.manual_seed(seed)
    model, missing = load_weights(backbone)
    owners = {key.rpartition(".")[0] for key in missing}
    torch.manual_seed(seed)
    model = _wrap(model, adapter_config(settings, backbone.path), owners)
    model.peft_config["default"].revision = backbone.revision
    check_budget(model, settings)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32, copy=True)
    return model


def set_precision(model: nn.Module, compute_type: torch.dtype) -> None:
    """Keeps frozen matrices (with their biases) in the compute type; under autocast they would be cast at every use.

    In memory of torch's own: of a mapped file's, the alignment is chance, and the last bits of small products with it.
    And what an adapter makes of a product has the product's type: some give fp32, which DeBERTa is not made for.
    """
    for module in model.modules():
        if isinstance(module, PRODUCTS) or hasattr(module, "q_bias"):  # DeBERTa adds biases of its products itself
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(compute_type, copy=True)
        if isinstance(module, BaseTunerLayer) and isinstance(module.get_base_layer(), PRODUCTS):
            module.register_forward_hook(_as_autocast_would)


def _as_autocast_would(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    kind = output.device.type
    return output.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else output


def shard_frozen(model: PeftModel, device: torch.device, world_size: int) -> None:
    """Shares the frozen weights out over the ranks (FSDP2): each is whole only while its layer computes.

    What trains stays whole on every rank, so that gradients, optimizer and checkpoints are those of an unsharded run.
    In place; `model` is on the CPU, and on `device` afterwards.
    """
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    mesh = init_device_mesh(device.type, (world_size,))
    layers = set(getattr(model.get_base_model(), "_no_split_modules", None) or ())
    for module in reversed(list(model.modules())):  # the innermost first; the model itself comes last
        if module is model or type(module).__name__ in layers:
            fully_shard(module, mesh=mesh, ignored_params=trained)
    for parameter in trained:
        parameter.data = parameter.data.to(device)


def parameter_table(model: PeftModel) -> list[dict[str, Any]]:
    """Parameters by module, layers of one kind together: [{module, trainable, total}], trained ones first.

    PEFT keeps a frozen original beside the trained copy of the head; as in PEFT's own count, both are in `total`.
    """
    rows: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        owner = name.removeprefix("base_model.model.").rpartition(".")[0]
        owner = re.sub(r"\.(base_layer|original_module|modules_to_save\.default|\w+\.default)(?=\.|$)", "", owner)
        owner = re.sub(r"\.\d+(?=\.|$)", ".*", owner)
        row = rows.setdefault(owner, {"module": owner, "trainable": 0, "total": 0})
        row["total"] += parameter.numel()
        row["trainable"] += parameter.numel() if parameter.requires_grad else 0
    return sorted(rows.values(), key=lambda row: -row["trainable"])


def check_budget(model: PeftModel, settings: PeftConfig) -> None:
    """Refuses a model that trains more parameters than `peft.max_trainable_parameters`.

    Raises:
        UserError: with the table per module, and for LoRA-like methods the largest rank that fits.
    """
    budget = settings.max_trainable_parameters
    trainable, _ = model.get_nb_trainable_parameters()
    if budget is None or trainable <= budget:
        return
    rows = [row for row in parameter_table(model) if row["trainable"]]
    table = [f"{row['trainable']:>12,}  {row['module']}" for row in rows]
    lines = [f"peft.max_trainable_parameters: {trainable:,} parameters would train, the budget is {budget:,}:", *table]
    rank = settings.options.get("r", getattr(model.peft_config["default"], "r", None))
    if settings.peft_type == "LORA" and isinstance(rank, int):
        adapter = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and ".lora_" in n)
        largest = (budget - (trainable - adapter)) * rank // adapter if adapter else 0
        lines.append(
            f"largest rank that fits: --peft.r {largest}"
            if largest >= 1
            else f"no rank fits: the head alone has {trainable - adapter:,}; choose a smaller backbone"
        )
    raise UserError("\n".join(lines))


def _wrap(model: nn.Module, config: peft.PeftConfig, new_modules: set[str]) -> PeftModel:
    """PEFT around the model; the head, and modules that no weights file filled, train and are saved whole."""
    prefix = str(model.base_model_prefix)
    head = [name for name, child in model.named_children() if name != prefix and any(True for _ in child.parameters())]
    wrapping: Any = copy.deepcopy(config)
    # a new module inside the backbone (BERT's pooler) is named by its path below the model, a head by its name
    inside = {name for name in new_modules if name.split(".")[0] == prefix}
    # PEFT itself adds "classifier" and "score" for sequence classification
    extra = {*head, *inside, *(wrapping.modules_to_save or [])} - {"classifier", "score"}
    wrapping.modules_to_save = sorted(extra) or None
    try:
        return peft.get_peft_model(model, wrapping)
    except Exception as error:  # of whatever kind its methods raise at modules that they are not made for
        if "No modules were targeted" in str(error):
            raise UserError(
                "peft.target_modules: no module gets an adapter; the head and peft.modules_to_save train whole, and "
                "peft.exclude_modules and peft.layers_to_transform leave others out"
            ) from None
        raise UserError(f"peft: {one_line(error)}") from None


def _check_targets(model: nn.Module, settings: PeftConfig) -> None:
    """Every module that the adapter's options name must be there: PEFT itself passes over those that are not."""
    targets = settings.options.get("target_modules")
    names = [name for name, _ in model.named_modules()]
    kinds = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)})

    def matches(name: str, wanted: str) -> bool:
        return f".{name}".endswith(f".{wanted}")

    def absent(wanted: list[str]) -> list[str]:
        return [w for w in wanted if not any(matches(name, w) for name in names)]

    for option in ("modules_to_save", "exclude_modules"):
        wanted = settings.options.get(option) or []
        if isinstance(wanted, str):  # a regular expression
            unknown = [] if any(re.fullmatch(wanted, name) for name in names) else [wanted]
        else:
            unknown = absent(wanted)
        if unknown:
            raise UserError(f"peft.{option}: this backbone has no module {unknown[0]!r}")
    for wanted in settings.options.get("target_parameters") or []:
        if not any(matches(name, wanted) for name, _ in model.named_parameters()):
            raise UserError(f"peft.target_parameters: this backbone has no parameter {wanted!r}")
    if isinstance(targets, list):
        lost = absent(targets) if targets else ["[]"]
        chosen = [(name, m) for name, m in model.named_modules() if any(matches(name, t) for t in targets)]
    elif isinstance(targets, str) and targets != "all-linear":
        try:
            chosen = [(name, m) for name, m in model.named_modules() if re.fullmatch(targets, name)]
        except re.error as error:
            raise UserError(f"peft.target_modules: {targets!r} is no regular expression: {error}") from None
        lost = [] if chosen else [targets]
    else:
        return
    if lost:
        raise UserError(
            f"peft.target_modules: {', '.join(map(repr, lost))} matches nothing; this backbone has {', '.join(kinds)}"
        )
    empty = [name for name, module in chosen if not any(True for _ in module.parameters())]
    if empty:
        raise UserError(f"peft.target_modules: {empty[0]} has no parameters that an adapter could change")


def _check_adapted(model: PeftModel, settings: PeftConfig) -> None:
    """Refuses names that led to no adapter: PEFT passes over those inside modules that train and are saved whole."""
    names = {name.removeprefix("base_model.model."): module for name, module in model.named_modules()}
    adapted = [name for name, module in names.items() if isinstance(module, BaseTunerLayer)]
    whole = [name for name, module in names.items() if isinstance(module, ModulesToSaveWrapper)]
    targets = settings.options.get("target_modules")
    for target in targets if isinstance(targets, list) else []:
        found = [name for name in names if f".{name}".endswith(f".{target}")]
        outside = [name for name in found if not any(f"{name}.".startswith(f"{module}.") for module in whole)]
        if not outside:
            raise UserError(
                f"peft.target_modules: {target!r} is only in {', '.join(whole)}, which trains and is saved whole; "
                "leave it out"
            )
    layers = settings.options.get("layers_to_transform")
    for layer in layers if isinstance(layers, list) else [layers]:
        if layer is not None and not any(f".{layer}." in name for name in adapted):
            raise UserError(f"peft.layers_to_transform: layer {layer} has no module that gets an adapter")
    for option in ("rank_pattern", "alpha_pattern"):
        for pattern in settings.options.get(option) or {}:
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in adapted):
                raise UserError(f"peft.{option}: {pattern!r} matches no module that has an adapter")
