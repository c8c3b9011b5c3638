"""From a configuration to what a run trains with: data, backbone, model, optimizer and plan.

Always holds: whatever a user can get wrong is found before a weight is loaded; nothing is drawn but from the seed, so
every process builds the same.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import PeftModel

from trainer.batching.plan import Plan
from trainer.config.labels import describe_look_alikes, match_labels
from trainer.config.schema import Config
from trainer.data.corpus import Corpus, load_corpus
from trainer.data.tokens import tokenise
from trainer.distributed.session import StopRequest
from trainer.distributed.watch import Watch
from trainer.errors import UserError
from trainer.model.adapter import read_adapter
from trainer.model.backbone import FP32_ONLY_FAMILIES, find_backbone
from trainer.model.build import COMPUTE_TYPES, build_model, check_fit, set_precision, shard_frozen
from trainer.model.identity import Identity, check_same_backbone
from trainer.packed.families import why_not_packed
from trainer.packed.forward import PackedForward, PaddedForward
from trainer.reporting.tracking import RunLog
from trainer.tasks import TASKS
from trainer.training.optim import build_optimizer
from trainer.training.records import Console, Inputs, Learner, Run
from trainer.training.start_check import check_start

# Token budgets where the configuration has none. A CPU is not faster with more. On a GPU memory.py finds what fits.
CPU_TOKENS, GPU_TOKENS = 2048, 65536
DRAW_FORMAT = "3"  # changes with the batches or masks of a (seed, step): a run of another format is refused


def prepare(config: Config, folder: Path, recorded: Identity | None = None) -> Inputs:
    """Reads the data, finds the backbone, and checks that they fit the configuration; loads no weights.

    Args:
        config: its run.precision is no, bf16 or fp16.
        folder: of the run, for messages.
        recorded: the backbone of the run's checkpoints; this very one is used.

    Raises:
        UserError: they do not fit, or are missing.
    """
    start = read_adapter(Path(config.model.adapter)) if config.model.adapter is not None else None
    corpus = load_corpus(config.data, TASKS[config.task.type], config.run.seed, config.run.quiet)
    _check_names(config, corpus)
    if start is not None and start.label_names != corpus.label_names:
        classes = f"the classes of {start.folder} are {start.label_names}, those of the data {corpus.label_names}"
        raise UserError(f"model.adapter: {classes}; data.label_names sets their order")
    problem_type = TASKS[config.task.type].problem_type
    backbone = find_backbone(config.model, corpus.label_names, recorded, problem_type=problem_type)
    if config.run.precision != "no" and backbone.config.model_type in FP32_ONLY_FAMILIES:
        raise UserError(f"run.precision: {backbone.config.model_type} computes in fp32 only; use --run.precision no")
    pairs = corpus.splits["train"].text_pairs is not None
    _why_padded(config, check_fit(backbone, config.peft, config.data.max_length, pairs), sharded=False)
    if recorded is not None:
        check_same_backbone(recorded, backbone.identity, folder, "; for a new run: --run.name NAME")
    if start is not None:
        check_same_backbone(start.backbone, backbone.identity, start.folder)
    examples = {
        name: tokenise(split, backbone.tokenizer, config.data.max_length, config.run.quiet)
        for name, split in corpus.splits.items()
    }
    fingerprints = {
        "draw format": DRAW_FORMAT,
        "backbone": backbone.fingerprint,
        **{f"{name} split": split.fingerprint() for name, split in examples.items()},
        **({"adapter to start from": start.fingerprint()} if start is not None else {}),
    }
    return Inputs(corpus, examples, backbone, start, fingerprints)


def build(
    config: Config, folder: Path, inputs: Inputs, accelerator: Accelerator, stop: StopRequest, watch: Watch
) -> Run:
    """Builds the run, its model on its device.

    Raises:
        UserError: weights that cannot be read, or an option that is not supported here.
    """
    on_cpu, train = accelerator.device.type == "cpu", inputs.examples["train"]
    learner = _build_learner(config, inputs, accelerator)
    default_tokens = CPU_TOKENS if on_cpu else GPU_TOKENS
    plan = Plan(
        lengths=train.lengths,
        weights=learner.task.example_weights(config.optim.class_weights, train.labels, inputs.corpus.label_names),
        batch_size=config.batch.size,
        seed=config.run.seed,
        max_tokens=config.batch.max_tokens or default_tokens,
        packed=learner.forward.packed,
        one_length=learner.forward.padding.one_length,
    )
    return Run(
        config=config,
        folder=folder,
        inputs=inputs,
        learner=learner,
        console=Console(RunLog(folder, accelerator.is_main_process, config.run.quiet), stop, watch),
        plan=plan,
        total_steps=config.optim.max_steps or config.optim.epochs * plan.steps_per_epoch,
        eval_max_tokens=config.batch.eval_max_tokens or default_tokens,
    )


def describe_forward(run: Run) -> list[str]:
    """Notes for the user on how the model computes."""
    learner, padding = run.learner, run.learner.forward.padding
    notes = {
        "tensors of the weights file": "; ".join(run.inputs.backbone.notes),
        "padded, in batches sorted by length": _why_padded(run.config, learner.model, learner.sharded, padding.packs),
        "batches hold examples of one length": "this model's logits depend on padding" if padding.one_length else None,
        "exact up to dropout; out of reach this model draws": ", ".join(learner.dropout.unreached),
    }
    return [f"{what}: {why}" for what, why in notes.items() if why]


def _build_learner(config: Config, inputs: Inputs, accelerator: Accelerator) -> Learner:
    """Builds the model in training mode, its forward and its optimizer.

    Raises:
        UserError: weights that cannot be read, or a model that `check_start` refuses.
    """
    device, backbone = accelerator.device, inputs.backbone
    if device.type == "cuda":
        _ask_for_equal_bits()
    model = build_model(backbone, config.peft, config.run.seed)
    texts, max_length = inputs.corpus.splits["train"], config.data.max_length
    keys, padding = check_start(model, config.run.seed, texts, backbone.tokenizer, max_length, backbone.path)
    backbone.tokenizer.padding_side = "left" if padding.left else "right"  # it is saved with the adapter
    set_precision(model, COMPUTE_TYPES[config.run.precision])
    sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true" and accelerator.num_processes > 1
    if sharded:
        shard_frozen(model, device, accelerator.num_processes)
    else:
        model.to(device)
    model.train()
    optimizer, parameters = build_optimizer(model.named_parameters(), config.optim)
    # autocast only: no wrapper for data parallelism, since a step sums the gradients itself
    prepared = accelerator.prepare_model(model, evaluation_mode=True)
    packs = _why_padded(config, model, sharded, padding.packs) is None
    return Learner(
        accelerator=accelerator,
        model=prepared,
        forward=PackedForward(prepared, keys)
        if packs
        else PaddedForward(prepared, backbone.tokenizer.pad_token_id, padding),
        optimizer=accelerator.prepare_optimizer(optimizer),
        parameters=parameters,
        dropout=keys,
        task=TASKS[config.task.type],
        optim=config.optim,
        sharded=sharded,
    )


def _ask_for_equal_bits() -> None:
    """A rerun must give the same bits: a GPU has faster kernels that do not."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing reads it


def _why_padded(config: Config, model: PeftModel, sharded: bool, packs: bool = True) -> str | None:
    """Why examples are padded, in words; "" where that was asked for, None where they are packed.

    Raises:
        UserError: packing was asked for and cannot be.
    """
    if config.model.packed is False:
        return ""
    because = "the frozen weights are sharded" if sharded else why_not_packed(model)
    because = because or (None if packs else "packed examples give other logits")
    if because and config.model.packed is True:
        raise UserError(f"model.packed: true is not supported here: {because}. Use auto to fall back to padding")
    return because


def _check_names(config: Config, corpus: Corpus) -> None:
    """Checks the names of metrics and classes in the configuration.

    Raises:
        UserError: a name that does not exist, or class weights that no model can be trained with.
    """
    task, metric, names = TASKS[config.task.type], config.evaluation.metric, corpus.label_names
    if metric not in task.metrics and not (metric.startswith("f1/") and match_labels([metric[3:]], names)):
        allowed = [*task.metrics, *(f"f1/{name}" for name in names)]
        hint = describe_look_alikes(metric, allowed)
        raise UserError(f"evaluation.metric: {metric!r} is unknown; known: {', '.join(allowed[:12])}{hint}")
    targets = corpus.splits["train"].labels
    assert targets is not None
    task.example_weights(config.optim.class_weights, targets, names)
