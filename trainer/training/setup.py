"""Builds a run from its configuration: data, backbone, model, optimizer and plan.

Always holds: a user's mistake is found before weights are loaded. All random numbers come from the seed, so every
process builds the same.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import PeftModel

from trainer.batching.plan import Plan
from trainer.compat import checkpoint_layers
from trainer.config.labels import describe_look_alikes, match_labels
from trainer.config.schema import Config, OptimConfig, PeftConfig, chosen_overlap, fill_task
from trainer.data.corpus import Corpus, load_corpus
from trainer.data.tokens import Examples, tokenize
from trainer.distributed.session import StopRequest
from trainer.distributed.watch import Watch
from trainer.dropout.sites import DropoutKeys
from trainer.errors import UserError, print_once
from trainer.model.adapter import SavedAdapter, load_constants, read_adapter
from trainer.model.backbone import FP32_ONLY_FAMILIES, Backbone, Identity, check_same_backbone, find_backbone
from trainer.model.budget import fit_budget
from trainer.model.build import COMPUTE_TYPES, build_model, check_fit, set_precision, shard_frozen
from trainer.model.quantization import check_quantization
from trainer.packed.families import why_not_packed
from trainer.packed.forward import Forward, build_forward, check_packed
from trainer.reporting.tracking import RunLog
from trainer.tasks import make_task
from trainer.tasks.task import Constants
from trainer.training.adalora import set_total_steps
from trainer.training.adapter_start import start_adapter
from trainer.training.optim import build_optimizer
from trainer.training.records import Inputs, Learner, Run
from trainer.training.start_check import check_start

# Token budgets if none is configured. A CPU is not faster with more. On a GPU the loop lowers what does not fit.
CPU_TOKENS, GPU_TOKENS = 2048, 65536
DRAW_FORMAT = "3"  # changes with the batches or masks of a (seed, step): a run of another format is refused


@dataclass(frozen=True)
class Draft:
    """A run as far as no weights are needed."""

    corpus: Corpus
    backbone: Backbone
    peft: PeftConfig
    """the options of the adapter, with the rank that fits the budget"""
    twin: PeftModel
    """the model on the meta device"""
    start: SavedAdapter | None
    """the adapter of `model.adapter`"""


def draft_run(config: Config, recorded: Identity | None = None, needs_weights: bool = True) -> Draft:
    """Reads the data, finds the backbone, and checks that they fit the configuration.

    `recorded` is the backbone of the run's checkpoints. The weights must be there if `needs_weights`.
    """
    start = read_adapter(Path(config.model.adapter)) if config.model.adapter is not None else None
    corpus = load_corpus(config.data, config.task, config.run.seed, config.run.quiet)
    check_names(config, corpus)
    problem_type = make_task(corpus.task).problem_type
    if start is not None:
        check_same_task(start, problem_type)
    backbone = find_backbone(
        config.model, corpus.label_names, recorded, problem_type=problem_type, needs_weights=needs_weights
    )
    if config.run.precision != "no" and backbone.config.model_type in FP32_ONLY_FAMILIES:
        raise UserError(f"run.precision: {backbone.config.model_type} computes in fp32 only; use --run.precision no")
    pairs = corpus.splits["train"].text_pairs is not None
    peft = choose_rank(backbone, config)
    twin = check_fit(backbone, peft, config.data.max_length, pairs)
    check_packed(config.model.packed, why_not_packed(twin))
    if config.model.gradient_checkpointing and not twin.get_base_model().supports_gradient_checkpointing:
        family = backbone.config.model_type
        raise UserError(f"model.gradient_checkpointing: transformers does not support it for {family}; leave it out")
    if config.model.quantization is not None:
        check_quantization(twin, peft)
    return Draft(corpus, backbone, peft, twin, start)


def prepare(config: Config, folder: Path, recorded: Identity | None = None) -> Inputs:
    """Prepares all that a run trains on and starts from; loads no weights.

    `recorded` is the backbone of the run's checkpoints, which must be found again.
    """
    draft = draft_run(config, recorded)
    corpus, backbone, start = draft.corpus, draft.backbone, draft.start
    if recorded is not None:
        check_same_backbone(recorded, backbone.identity, folder, "; for a new run: --run.name NAME")
    if start is not None:
        check_same_backbone(start.backbone, backbone.identity, start.folder)
        corpus = dataclasses.replace(corpus, constants=keep_constants(corpus, start))
    examples = tokenize_splits(config, draft)
    fingerprints = {
        "draw format": DRAW_FORMAT,
        "backbone": backbone.identity.fingerprint,
        **{f"{name} split": split.fingerprint() for name, split in examples.items()},
        **({"adapter to start from": start.fingerprint()} if start is not None else {}),
        **({"constants of the task": json.dumps(corpus.constants)} if corpus.constants else {}),
    }
    return Inputs(corpus, examples, backbone, draft.peft, start, fingerprints)


def check_same_task(start: SavedAdapter, problem_type: str) -> None:
    """Refuses an adapter that was trained for another task."""
    there, here = (kind.removesuffix("_classification") for kind in (start.problem_type, problem_type))
    if there != here:
        fix = "set task.type to that of its run, or leave model.adapter out"
        raise UserError(f"model.adapter: {start.folder} was trained for {there}, and the labels are {here}; {fix}")


def tokenize_splits(config: Config, draft: Draft) -> dict[str, Examples]:
    """The corpus in tokens, by split."""
    overlap = chosen_overlap(config.data)
    return {
        name: tokenize(split, draft.backbone.tokenizer, config.data.max_length, config.run.quiet, overlap=overlap)
        for name, split in draft.corpus.splits.items()
    }


def keep_constants(corpus: Corpus, start: SavedAdapter) -> Constants:
    """The constants before step 1; a label name that `start` knows keeps its own, since its logits fit them."""
    saved = load_constants(start.folder, corpus.task, start.label_names, "model.adapter")
    return {
        kind: {name: saved[kind].get(name, value) for name, value in values.items()}
        for kind, values in corpus.constants.items()
    }


def choose_rank(backbone: Backbone, config: Config) -> PeftConfig:
    """The options of the adapter; with `peft.fit_budget`, with the rank that fits, which the user is told."""
    if not config.peft.fit_budget:
        return config.peft
    peft, lines = fit_budget(backbone, config.peft)
    for line in lines:
        print_once(line, config.run.quiet)
    return peft


def build(
    config: Config, folder: Path, inputs: Inputs, accelerator: Accelerator, stop: StopRequest, watch: Watch
) -> Run:
    """Builds the run, with the model on its device. Its configuration names the task and the rank that were found."""
    config = dataclasses.replace(fill_task(config, inputs.corpus.task), peft=inputs.peft)
    on_cpu, train = accelerator.device.type == "cpu", inputs.examples["train"]
    learner = _build_learner(config, inputs, accelerator)
    default_tokens = CPU_TOKENS if on_cpu else GPU_TOKENS
    plan = Plan(
        lengths=train.lengths,
        weights=learner.task.example_weights(config.optim.class_weights, train.targets, inputs.corpus.label_names),
        batch_size=config.batch.size,
        seed=config.run.seed,
        max_tokens=config.batch.max_tokens or default_tokens,
        packed=learner.forward.packed,
        one_length=learner.forward.padding.one_length,
        window_length=train.window_length,
    )
    total_steps = count_steps(config.optim, plan)
    set_total_steps(learner.model, total_steps)
    return Run(
        config=config,
        folder=folder,
        inputs=inputs,
        learner=learner,
        log=RunLog(folder, accelerator.is_main_process, config.run.quiet),
        stop=stop,
        watch=watch,
        plan=plan,
        total_steps=total_steps,
        eval_max_tokens=config.batch.eval_max_tokens or default_tokens,
    )


def count_steps(config: OptimConfig, plan: Plan) -> int:
    """Optimizer steps of the whole run."""
    return config.max_steps or config.epochs * plan.steps_per_epoch


def describe_forward(forward: Forward, keys: DropoutKeys) -> list[str]:
    """Notes for the user on how the model computes."""
    notes = []
    if forward.padded_because:
        notes.append(f"examples are padded, in batches sorted by length: {forward.padded_because}")
    if forward.padding.one_length:
        notes.append("batches hold examples of one length: this model's logits depend on padding")
    if keys.unreached:
        unkeyed = ", ".join(keys.unreached)
        notes.append(f"results depend on the number of processes: this model's own dropout ({unkeyed}) cannot be keyed")
    return notes


def _build_learner(config: Config, inputs: Inputs, accelerator: Accelerator) -> Learner:
    """Builds the model in training mode, its forward and its optimizer."""
    device, backbone = accelerator.device, inputs.backbone
    if device.type == "cuda":
        _use_deterministic_kernels()
    sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true" and accelerator.num_processes > 1
    if sharded and config.model.quantization is not None:
        raise UserError("model.quantization: nf4 weights cannot be sharded; use another --topology than fsdp")
    model, notes = build_model(backbone, config.peft, config.run.seed)
    start, about_start = start_adapter(model, config.peft, inputs)
    train, label_names = inputs.examples["train"], inputs.corpus.label_names
    task = make_task(config.task, inputs.corpus.constants)
    texts, max_length = inputs.corpus.splits["train"], config.data.max_length
    set_precision(model, COMPUTE_TYPES[config.run.precision])
    keys, padding = check_start(model, config.run.seed, texts, backbone.tokenizer, max_length, backbone.path)
    if padding.one_length and config.data.long_documents == "windows":
        reason = "its logits depend on padding, and the last window of a text is shorter"
        raise UserError(f"data.long_documents windows is not supported for {backbone.path}: {reason}; use cut")
    backbone.tokenizer.padding_side = "left" if padding.left else "right"  # it is saved with the adapter
    if sharded:
        shard_frozen(model, device, accelerator.num_processes)
    else:
        model.to(device)
    model.train()
    checkpoint = keys.checkpoint if config.model.gradient_checkpointing else None
    if checkpoint is not None:
        checkpoint_layers(model.get_base_model(), checkpoint)
    optimizer, parameters = build_optimizer(model.named_parameters(), config.optim)
    # autocast only: no wrapper for data parallelism, since a step sums the gradients itself
    prepared = accelerator.prepare_model(model, evaluation_mode=True)
    forward = build_forward(
        prepared, backbone.tokenizer.pad_token_id, config.model.packed, padding, sharded, checkpoint
    )
    return Learner(
        accelerator=accelerator,
        model=prepared,
        forward=forward,
        optimizer=accelerator.prepare_optimizer(optimizer),
        parameters=parameters,
        start=start,
        dropout=keys,
        task=task,
        losses=task.make_losses(config.optim, train.targets, label_names),
        optim_config=config.optim,
        sharded=sharded,
        notes=[*notes, *about_start, *describe_forward(forward, keys)],
    )


def _use_deterministic_kernels() -> None:
    """Makes a rerun on a GPU equal to the bit."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing reads it


def check_names(config: Config, corpus: Corpus) -> None:
    """Refuses unknown metrics and classes, and options of the loss that nothing can be trained with."""
    config = fill_task(config, corpus.task)
    task, metric, names = make_task(config.task), config.evaluation.metric, corpus.label_names
    targets = corpus.splits["train"].known_targets
    classes = task.count_labels(targets, names)
    if metric is None:
        raise UserError(f"evaluation.metric: {config.task.type} has no default; known: {', '.join(task.metrics)}")
    if metric not in task.metrics and not (metric.startswith("f1/") and match_labels([metric[3:]], classes)):
        allowed = [*task.metrics, *(f"f1/{name}" for name in classes)]
        hint = describe_look_alikes(metric, allowed)
        known = f"known for task.type {config.task.type}: {', '.join(allowed[:12])}"
        raise UserError(f"evaluation.metric: {metric!r} is unknown; {known}{hint}")
    task.example_weights(config.optim.class_weights, targets, names)
    task.make_losses(config.optim, targets, names)
