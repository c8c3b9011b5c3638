"""PEFT's options: checked against PEFT's own classes and against the model, then applied.

Always holds: an option that PEFT would ignore is refused. The head is every module outside the backbone proper, plus
whatever the weights file lacks, so no new layer stays untrained or unsaved.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Iterable
from typing import Any

import jsonargparse
import peft
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from trainer.compat import path_in_model, plain_owner
from trainer.config.schema import PeftConfig
from trainer.errors import UserError, one_line
from trainer.model.lora_start import changes_backbone, check_start, start_of

# Methods whose adapter holds all that trains, so that a checkpoint resumes exactly; each is under test.
PEFT_TYPES = (
    "LORA", "ADALORA", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "GLORA", "GRALORA", "HIRA", "HRA", "IA3",
    "LN_TUNING", "LOHA", "LOKR", "MISS", "OFT", "OSF", "PEANUT", "RANDLORA", "ROAD", "SHIRA", "SUPERTUNING",
    "TINYLORA", "UNILORA", "VBLORA", "VERA", "WAVEFT",
)  # fmt: skip
NO_HEAD = "it cannot train and save the head"
NO_KEYS = "it puts virtual tokens before an example, and dropout cannot be keyed by the places behind them"
NO_TASK = "it needs the number of a task for each example"
NO_BASIS = "its adapter lacks the decomposition of the weights that it is for, and another machine may find another"
REFUSED = {
    "ADAMSS": "the shapes of what trains depend on a clustering of the weights",
    "ADAPTION_PROMPT": NO_HEAD, "TRAINABLE_TOKENS": NO_HEAD, "XLORA": NO_HEAD,
    "CARTRIDGE": NO_KEYS, "P_TUNING": NO_KEYS, "PREFIX_TUNING": NO_KEYS, "PROMPT_TUNING": NO_KEYS,
    "CPT": "it is for causal language models only",
    "FROD": NO_BASIS, "PSOFT": NO_BASIS,
    "LILY": "it mixes its parts by the mean over all tokens of a batch, so examples change one another",
    "MULTITASK_PROMPT_TUNING": NO_TASK, "POLY": NO_TASK,
    "PVERA": "it adds noise that cannot be keyed by example",
    "SHADOW": "it hands the layers an object in place of the hidden states, which classifiers cannot compute with",
}  # fmt: skip
"""The other methods of PEFT 0.21, with the reason. A test proves each."""
NEEDS_NUMBERS = ("BOFT", "SHIRA", "UNILORA")
"""methods that PEFT cannot build without numbers in the weights"""
# Starts of LoRA that cannot train here.
UNSUPPORTED_STARTS = {
    "loftq": "quantizes the backbone, and no LoRA on the unchanged backbone equals that",
    "corda": "needs statistics of the backbone that PEFT computes in a script of its own",
    "lora_ga": "needs gradients of the backbone that PEFT computes in a script of its own",
}

UNSUPPORTED_OPTIONS = {
    "velora_config": "its gradient is that of a mean over the micro-batch, so examples change one another",
    "monteclora_config": "it adds noise that cannot be keyed by example, and a loss that PEFT leaves to the caller",
    "kasa_config": "it adds a loss that PEFT leaves to the caller",
    "save_only_topk_weights": "checkpoints would hold a part of what trains",
}
"""Options of supported methods that cannot train or resume exactly, with the reason."""

MATRIX_LAYERS = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d)
TARGETS = {"LORA": (*MATRIX_LAYERS, nn.Embedding)}
"""by method: the kinds of layers that messages name as its targets"""


def adapter_config(settings: PeftConfig, path: str) -> peft.PeftConfig:
    """PEFT's configuration of the adapter, names and types checked against PEFT's class; names all problems at once."""
    if settings.peft_type not in PEFT_TYPES:
        reason = f": {REFUSED[settings.peft_type]}" if settings.peft_type in REFUSED else ""
        known = f"supported: {', '.join(PEFT_TYPES)}"
        raise UserError(f"peft.peft_type: {settings.peft_type!r} is not supported{reason}; {known}")
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(settings.peft_type)]
    options, problems = _parse_options(settings, kind)
    problems += _find_unsupported(settings, options)
    if problems:
        raise UserError("\n".join(problems))
    if settings.peft_type == "IA3" and options.get("target_modules"):
        # without it, PEFT would fill it in on loading with modules that may not be targets
        options.setdefault("feedforward_modules", [])
    if settings.peft_type == "ADALORA":  # the length of the run replaces this one
        options["total_step"] = options.get("tinit", 0) + options.get("tfinal", 0) + 1
    try:
        return kind(task_type=peft.TaskType.SEQ_CLS, base_model_name_or_path=path, **options)
    except (TypeError, ValueError) as error:
        raise UserError(f"peft: {one_line(error)}") from None


def _parse_options(settings: PeftConfig, kind: type[peft.PeftConfig]) -> tuple[dict[str, Any], list[str]]:
    """Options with the types of PEFT's class, and a line for each that does not fit it."""
    set_here = {item.name for item in dataclasses.fields(peft.PeftConfig)}  # the method, the task, the backbone
    types = {item.name: item.type for item in dataclasses.fields(kind) if item.name not in set_here}
    problems, known, options = [], {}, {}
    for name, value in settings.options.items():
        if name not in types:
            (near,) = difflib.get_close_matches(name, types, n=1, cutoff=0)
            hint = f"nearest: peft.{near}; --peft.{name} null leaves it out"  # perhaps a recipe's, for another method
            problems.append(f"unknown option 'peft.{name}' for {settings.peft_type}; {hint}")
        elif name == "init_lora_weights" and re.fullmatch("pissa_niter_[1-9][0-9]*", str(value)):
            options[name] = value  # PEFT does not list it among its values
        else:
            known[name] = value
    parser = _parser_of(kind)  # type: ignore[arg-type]
    try:
        parsed = parser.parse_object({"peft": known})["peft"]
    except jsonargparse.ArgumentError:  # one at a time, to say which
        parsed = {}
        for name, value in known.items():
            try:
                parser.parse_object({"peft": {name: value}})
            except jsonargparse.ArgumentError:
                problems.append(f"peft.{name}: {value!r} does not fit; PEFT takes {types[name]}")
    for name in [name for name in known if name in parsed]:
        value = parsed[name]
        options[name] = value.as_dict() if isinstance(value, jsonargparse.Namespace) else value
    return options, problems


@functools.cache
def _parser_of(kind: Any) -> jsonargparse.ArgumentParser:
    """Reads the options of PEFT's class; making it takes a fifth of a second."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "peft")
    return parser


def _find_unsupported(settings: PeftConfig, options: dict[str, Any]) -> list[str]:
    """A line for each option that PEFT has and that cannot train here."""
    problems = []
    if settings.peft_type == "ADALORA":
        if "total_step" in options:
            problems.append("peft.total_step: leave it out; it is the length of the run")
        if options.get("target_r", 8) >= options.get("init_r", 12):
            problems.append(f"peft.target_r: {options.get('target_r', 8)} must be below init_r")
    start = start_of(settings)
    for name in UNSUPPORTED_STARTS:
        if start.startswith(name):
            reason = f"{UNSUPPORTED_STARTS[name]}; use true, pissa, olora or eva"
            problems.append(f"peft.init_lora_weights: {start!r} is not supported: it {reason}")
    if changes_backbone(settings) and options.get("layer_replication"):
        problems.append(
            f"peft.layer_replication: must be null with peft.init_lora_weights {start}, which changes the weights that "
            "replicated layers share"
        )
    for name, value in options.items():
        if name.endswith("dropout") and isinstance(value, int | float) and not 0 <= value < 1:
            problems.append(f"peft.{name}: {value} must be at least 0 and below 1")
    if settings.peft_type in ("LOHA", "LOKR") and options.get("module_dropout"):
        problems.append("peft.module_dropout: must be 0; it drops whole adapters, which then get no gradient")
    for name, reason in UNSUPPORTED_OPTIONS.items():
        if options.get(name):
            problems.append(f"peft.{name}: leave it out; {reason}")
    if options.get("alora_invocation_tokens"):
        problems.append("peft.alora_invocation_tokens: must be null; the adapter acts only after these tokens")
    return problems


def add_adapter(model: nn.Module, config: peft.PeftConfig, new_modules: set[str]) -> PeftModel:
    """Wraps the model by PEFT; the head and `new_modules`, which no weights file filled, train and are saved whole."""
    prefix = str(model.base_model_prefix)
    head = {name for name, child in model.named_children() if name != prefix and any(True for _ in child.parameters())}
    # a new module inside the backbone (BERT's pooler) is named by its path below the model, a head by its name
    inside = {name for name in new_modules if name.split(".")[0] == prefix}
    # PEFT itself adds "classifier" and "score" for sequence classification
    extra = {*head, *inside, *(config.modules_to_save or [])} - {"classifier", "score"}  # type: ignore[attr-defined]
    config.modules_to_save = sorted(extra) or None  # type: ignore[attr-defined]
    try:
        return peft.get_peft_model(model, config)
    except re.error as error:
        raise UserError(f"peft: {error.pattern!r} is not a regular expression: {error}") from None
    except Exception as error:  # its methods raise many kinds at modules that they do not support
        reason = f"{type(error).__name__}: {error}"  # StopIteration: of a module without parameters
        if "Please specify `target_modules`" in reason:
            fault = f"PEFT has no default for {model.config.model_type}"  # type: ignore[union-attr]
        elif any(part in reason for part in ("No modules were targeted", "not found in the base", "StopIteration")):
            fault = "no module gets an adapter, or one without parameters does"
        else:
            raise UserError(f"peft: {one_line(error)}") from None
        targets = _describe_targets(model, str(config.peft_type.value), [*head, *inside])  # type: ignore[union-attr]
        hint = "The head trains whole, and peft.exclude_modules and peft.layers_to_transform leave modules out"
        raise UserError(f"peft.target_modules: {fault}; choose from {targets}. {hint}") from None


def reads_weights(settings: PeftConfig) -> bool:
    """Whether the adapter starts from numbers that PEFT computes from the frozen weights, in their type."""
    start = settings.options.get("init_lora_weights")
    is_random = not isinstance(start, str) or start.lower() in ("true", "false", "gaussian", "orthogonal")
    return settings.peft_type == "OSF" or bool(settings.options.get("use_dora")) or not is_random


def check_effects(model: PeftModel, settings: PeftConfig) -> None:
    """Refuses options that name modules, parameters or layers to no effect; PEFT ignores them."""
    tuner: Any = model.base_model
    modules: dict[str, Any] = {path_in_model(name): module for name, module in model.named_modules()}
    layers: dict[str, Any] = {name: module for name, module in modules.items() if isinstance(module, BaseTunerLayer)}
    adapted = [name for name, module in layers.items() if any(p.requires_grad for p in module.parameters())]
    saved_whole = [name for name, module in modules.items() if isinstance(module, ModulesToSaveWrapper)]
    check_start(settings, layers)
    if settings.options.get("layer_replication") and getattr(model.get_base_model().config, "layer_types", None):
        raise UserError("peft.layer_replication: must be null: PEFT copies layers, and not the list of their types")
    names_by_option: dict[str, Iterable[str]] = {
        "target_modules": adapted, "rank_pattern": adapted, "alpha_pattern": adapted, "layers_to_transform": adapted,
        "target_parameters": tuner.targeted_parameter_names, "modules_to_save": saved_whole,
        "exclude_modules": modules,
    }  # fmt: skip
    for option, names in names_by_option.items():
        value = settings.options.get(option)
        if value is None or value == "all-linear":
            continue
        for wanted in value if isinstance(value, list | dict) else [value]:
            if not any(_matches(option, wanted, name, is_regex=isinstance(value, str)) for name in names):
                targets = _describe_targets(model, settings.peft_type, saved_whole)
                raise UserError(
                    f"peft.{option}: {wanted!r} has no effect; adapters fit {targets}; "
                    f"{', '.join(saved_whole)} trains whole"
                )


def _matches(option: str, wanted: Any, name: str, is_regex: bool) -> bool:
    """Whether PEFT takes a value of an option for this module or parameter."""
    if option == "layers_to_transform":
        return f".{wanted}." in name
    if option.endswith("_pattern"):
        return re.fullmatch(rf"(.*\.)?({wanted})", name) is not None
    return re.fullmatch(wanted, name) is not None if is_regex else f".{name}".endswith(f".{wanted}")


def _describe_targets(model: nn.Module, peft_type: str, whole: Iterable[str]) -> str:
    """Last names of the layers that a method can target, without those in `whole`, which train and are saved whole."""
    if peft_type == "LN_TUNING":
        modules = {name: m for name, m in model.named_modules() if getattr(getattr(m, "weight", None), "ndim", 0) == 1}
    else:
        modules = {name: m for name, m in model.named_modules() if isinstance(m, TARGETS.get(peft_type, MATRIX_LAYERS))}
    owners = {plain_owner(f"{name}.weight") for name in modules}
    heads = tuple(f"{name}." for name in whole)
    names = ", ".join(sorted({name.rpartition(".")[2] for name in owners if not f"{name}.".startswith(heads)}))
    if not names:
        return "none (this family has no such layer)"
    return names if peft_type == "LN_TUNING" else f"{names}, or all-linear"


def parameter_table(model: PeftModel) -> list[dict[str, Any]]:
    """Parameters by module, layers of one kind together: [{module, trainable, total}], most trained first.

    PEFT keeps a frozen original beside the trained copy of the head. As in PEFT's own count, both are in `total`.
    """
    rows: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        owner = re.sub(r"\.\d+(?=\.|$)", ".*", plain_owner(name))
        row = rows.setdefault(owner, {"module": owner, "trainable": 0, "total": 0})
        row["total"] += parameter.numel()
        row["trainable"] += parameter.numel() if parameter.requires_grad else 0
    return sorted(rows.values(), key=lambda row: -row["trainable"])


def check_parameter_budget(model: PeftModel, settings: PeftConfig) -> None:
    """Refuses a model that trains more parameters than `peft.max_trainable_parameters`."""
    budget = settings.max_trainable_parameters
    trainable, _ = model.get_nb_trainable_parameters()
    if budget is None or trainable <= budget:
        return
    lines = [f"peft.max_trainable_parameters: {trainable:,} parameters would train, the budget is {budget:,}:"]
    lines += [f"{row['trainable']:>12,}  {row['module']}" for row in parameter_table(model) if row["trainable"]]
    if settings.peft_type == "LORA":
        adapter = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and ".lora_" in n)
        head = trainable - adapter
        config: Any = model.peft_config["default"]
        rank = (budget - head) * config.r // max(1, adapter)
        none_fits = f"no rank fits: the head alone has {head:,}; choose a smaller backbone"
        fix = f"{rank} --peft.fit_budget false" if settings.fit_budget else f"{rank}, or --peft.fit_budget true"
        lines.append(f"largest rank that fits: --peft.r {fix}" if rank >= 1 else none_fits)
    raise UserError("\n".join(lines))
