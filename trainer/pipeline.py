"""A run from a checked configuration to its summary: data, model, resume, training, test, adapter, report.

Always holds: whatever a user can get wrong is found before a weight is loaded and before a file of the run is touched;
`summary.json` is the last thing written, so a run with a summary is finished.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from peft import PeftModel

from trainer import dropout
from trainer.adapter import check_adapter, load_adapter_tensors, model_card, save_adapter
from trainer.batching import Plan, collate, split_by_tokens
from trainer.checkpoint import load_newest, remove_unfinished, write_atomic
from trainer.config import Config, UserError, as_dict
from trainer.data import Corpus, load_corpus
from trainer.evaluation import write_evaluation
from trainer.loop import Interrupted, Stopped, peak_memory_bytes, plan_in_force, score, train
from trainer.metrics import METRICS
from trainer.model import (
    COMPUTE_TYPES,
    Backbone,
    build_model,
    check_fit,
    find_backbone,
    parameter_table,
    shard_frozen,
    silence_libraries,
)
from trainer.optim import build_optimizer
from trainer.options import config_text
from trainer.packed import PackedForward, PaddedForward, why_not_packed
from trainer.processes import StopRequest, Watch, agree, choose_precision, together
from trainer.state import Training, TrainState, restore
from trainer.tokenising import Examples, tokenise
from trainer.tracking import RunLog

LIBRARIES = ("torch", "accelerate", "transformers", "peft", "datasets", "numpy", "safetensors")
PENDING_SUMMARY = "summary.pending.json"
# Tokens of a micro-batch where the configuration leaves them open: on a CPU the fewest that are as fast as more; on a
# GPU more than most hold, so that the first step that lacks memory finds what fits (see loop.py).
CPU_TOKENS, GPU_TOKENS = 2048, 65536


def train_and_report(config: Config, folder: Path) -> int:
    """Trains, tests and reports; returns the exit code: 0, or 128 + signal.

    Raises:
        UserError: anything the user can mend.
    """
    stop = StopRequest()
    stop.listen()
    silence_libraries()
    precision = choose_precision(config.run.precision)
    _check_trackers(config.tracking.backends)
    same = {f"{group}.{name}": str(v) for group, values in as_dict(config).items() for name, v in values.items()}
    with together(precision, same, folder, config.tracking.backends) as (accelerator, watch):
        watch.position = "the preparation of the data"
        corpus = load_corpus(config.data, config.run.seed, config.run.quiet)
        _check_names(config, corpus)
        backbone = find_backbone(config.model, corpus.label_names)
        pairs = corpus.splits["train"].text_pairs is not None
        _padded_because(config, check_fit(backbone, config.peft, config.data.max_length, pairs), sharded=False)
        with _locked(folder) if accelerator.is_main_process else contextlib.nullcontext():
            try:
                _train(config, folder, corpus, backbone, precision, stop, accelerator, watch)
            except Stopped as stopped:
                if accelerator.is_main_process:
                    name = {2: "SIGINT (Ctrl-C)", 15: "SIGTERM"}[stopped.signal]
                    print(
                        f"stopped by {name} after step {stopped.step}; the state is saved in {folder / 'checkpoints'}. "
                        "The same command, typed again, continues.",
                        file=sys.stderr,
                    )
                return 128 + stopped.signal
    return 0


def _check_trackers(backends: list[str]) -> None:
    """Trackers named in the configuration must be installed.

    Raises:
        UserError: a name that is not.
    """
    installed = [str(tracker.value) for tracker in get_available_trackers()]
    missing = [name for name in backends if name not in installed]
    if missing:
        raise UserError(f"tracking.backends: {missing[0]!r} is not installed; installed: {', '.join(installed)}")


def _check_names(config: Config, corpus: Corpus) -> None:
    """Classes and metrics named in the configuration must exist.

    Raises:
        UserError: a name that does not.
    """
    metric, weights = config.evaluation.metric, config.optim.class_weights
    allowed = [*METRICS, *(f"f1/{name}" for name in corpus.label_names)]
    if metric not in allowed:
        raise UserError(f"evaluation.metric: {metric!r} is unknown; known: {', '.join(allowed[:12])}")
    if isinstance(weights, dict):
        unknown = set(weights) - set(corpus.label_names)
        if unknown:
            raise UserError(f"optim.class_weights: {sorted(unknown)[0]!r} is no class; classes: {corpus.label_names}")
        if any(not 0 <= weight < float("inf") for weight in weights.values()):
            raise UserError("optim.class_weights: weights must be at least 0")
        if sum(weights.get(name, 1.0) > 0 for name in corpus.label_names) < 2:
            raise UserError("optim.class_weights: at least two classes need a weight above 0")


def _locked(folder: Path) -> Any:
    """The run folder, held by the main process for as long as it lives; the system frees it when the process dies."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout:
        raise UserError(f"{folder} is in use by another running command; choose another --run.name") from None
    except OSError as error:
        raise UserError(f"run.output_dir: {folder} cannot be written: {error.strerror or error}") from None


def _example_weights(config: Config, labels: np.ndarray, label_names: list[str]) -> np.ndarray:
    """Weight of each example in the loss, float64 [N]."""
    weights = config.optim.class_weights
    if weights is None:
        return np.ones(len(labels))
    if weights == "balanced":
        counts = np.bincount(labels, minlength=len(label_names))
        return (len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1)))[labels]
    return np.array([float(weights.get(name, 1.0)) for name in label_names])[labels]


def _train(
    config: Config,
    folder: Path,
    corpus: Corpus,
    backbone: Backbone,
    precision: str,
    stop: StopRequest,
    accelerator: Accelerator,
    watch: Watch,
) -> None:
    examples = {
        name: tokenise(split, backbone.tokenizer, config.data.max_length, config.run.quiet)
        for name, split in corpus.splits.items()
    }
    watch.position = "the making of the model"
    run = _build(config, folder, corpus, backbone, examples, precision, stop, accelerator, watch)
    agree(accelerator, run.fingerprints)
    is_main = accelerator.is_main_process
    state, best = TrainState(), None
    if is_main:
        remove_unfinished(folder / "checkpoints")
    # read by one process for all: the others may be on machines that do not see the folder
    found = list(load_newest(folder / "checkpoints")) if is_main else [None, []]
    checkpoint, damage = broadcast_object_list(found)
    for line in damage:
        run.log.say(f"warning: {line}")
    if checkpoint is not None:
        state, best = restore(run, checkpoint), checkpoint.best_adapter
        run.log.say(f"continuing after step {state.step} of {run.total_steps}")
    if is_main:  # only now is it sure that the run is this one
        write_atomic(folder / "config.yaml", config_text(config))
    for line in _data_lines(corpus, examples, config.data.max_length):
        run.log.say(line)
    state = _started(run, state, precision)
    run.log.open(config.tracking.backends, state.step, state.evaluated_step, run.total_steps, as_dict(config))
    try:
        stop.deferred = True
        state, best = train(run, state, best)
        run.log.end_progress()
        load_adapter_tensors(run.model, best, "best adapter")
        metrics = _test(run, corpus, examples, state)
        watch.position = "the end"
        _finish(run, corpus, backbone, examples, state, best, metrics, precision)
        accelerator.wait_for_everyone()
    finally:
        run.log.close()


def _build(
    config: Config,
    folder: Path,
    corpus: Corpus,
    backbone: Backbone,
    examples: dict[str, Examples],
    precision: str,
    stop: StopRequest,
    accelerator: Accelerator,
    watch: Watch,
) -> Training:
    """Everything a run trains with, on its device."""
    if accelerator.device.type == "cuda":  # a rerun must give the same bits
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    model = build_model(backbone, config.peft, config.run.seed, COMPUTE_TYPES[precision])
    with accelerator.autocast():
        keys = dropout.install(model, config.run.seed)
    sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true" and accelerator.num_processes > 1
    if sharded:
        shard_frozen(model, accelerator.device, accelerator.num_processes)
    else:
        model.to(accelerator.device)
    model.train()
    because = _padded_because(config, model, sharded)
    optimizer, trained = build_optimizer(model.named_parameters(), config.optim)
    train, validation = examples["train"], examples.get("validation")
    on_cpu = accelerator.device.type == "cpu"
    plan = Plan(
        lengths=train.lengths,
        weights=_example_weights(config, train.labels, corpus.label_names),
        batch_size=config.batch.size,
        seed=config.run.seed,
        max_tokens=config.batch.max_tokens or (CPU_TOKENS if on_cpu else GPU_TOKENS),
        packed=because is None,
    )
    # autocast only: no wrapper for data parallelism, since the loop adds the gradients up itself
    prepared = accelerator.prepare_model(model, evaluation_mode=True)
    return Training(
        config=config,
        folder=folder,
        accelerator=accelerator,
        model=prepared,
        forward=PackedForward(prepared, keys) if plan.packed else PaddedForward(prepared),
        padded_because=because,
        optimizer=accelerator.prepare_optimizer(optimizer),
        trained=trained,
        dropout=keys,
        plan=plan,
        train=train,
        train_rows=corpus.splits["train"].rows,
        validation=validation,
        label_names=corpus.label_names,
        pad_token_id=backbone.tokenizer.pad_token_id,
        total_steps=config.optim.max_steps or config.optim.epochs * plan.steps_per_epoch,
        eval_max_tokens=config.batch.eval_max_tokens or (CPU_TOKENS if on_cpu else GPU_TOKENS),
        fingerprints={
            "backbone": backbone.fingerprint,
            **{f"{name} split": split.fingerprint() for name, split in examples.items()},
        },
        log=RunLog(folder, accelerator, config.run.quiet),
        stop=stop,
        watch=watch,
        sharded=sharded,
    )


def _padded_because(config: Config, model: PeftModel, sharded: bool) -> str | None:
    """Why examples are padded, in words; "" where that was asked for, None where they are packed.

    Raises:
        UserError: packing was asked for and cannot be.
    """
    if config.model.packed is False:
        return ""
    because = "the frozen weights are sharded" if sharded else why_not_packed(model)
    if because and config.model.packed is True:
        raise UserError(f"model.packed: true is not to be had: {because}; auto pads where it must")
    return because


def _data_lines(corpus: Corpus, examples: dict[str, Examples], max_length: int) -> list[str]:
    """What the user should know about the data."""
    counts = corpus.summary()
    sizes = ", ".join(f"{name} {len(split):,}" for name, split in corpus.splits.items())
    cut = sum(int((split.lengths == max_length).sum()) for split in examples.values())
    notes = {
        "duplicates within train": counts["train"]["num_duplicates"],
        "rows of test found in train": counts.get("test", {}).get("num_in_train", 0),
        f"examples fill all {max_length} tokens and may be cut": cut,
    }
    return [
        f"{sizes} examples of {len(corpus.label_names)} classes",
        *(f"note: {count:,} {what}" for what, count in notes.items() if count),
        *(f"warning: {line}" for line in corpus.warnings),
    ]


def _started(run: Training, state: TrainState, precision: str) -> TrainState:
    """Notes this start in the state and in environment.json, and tells the user what will run."""
    accelerator = run.accelerator
    trainable, total = run.model.get_nb_trainable_parameters()
    say = run.log.say
    say(
        f"training {run.folder}: {trainable:,} of {total:,} parameters ({trainable / total:.2%}), "
        f"{len(run.train.lengths)} examples, {run.total_steps} steps of {run.config.batch.size}, "
        f"{accelerator.device.type} x {accelerator.num_processes}, {precision}"
        f"{', frozen weights sharded' if run.sharded else ''}"
    )
    if run.padded_because:
        say(f"note: padded, in batches sorted by length: {run.padded_because}")
    if run.dropout.unreached:
        say(f"note: exact up to dropout: this backbone draws {', '.join(run.dropout.unreached)} out of reach")
    if accelerator.is_main_process:
        path = run.folder / "environment.json"
        starts = json.loads(path.read_text())["starts"] if path.is_file() else []
        starts.append(
            {
                "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "command": shlex.join(sys.argv),
                "world_size": accelerator.num_processes,
                "sharded": run.sharded,
                "device": str(accelerator.device),
                "precision": precision,
                "versions": {name: version(name) for name in LIBRARIES},
                "platform": platform.platform(),
                "resumed_from": state.step if state.resumed_from else None,
            }
        )
        write_atomic(path, json.dumps({"starts": starts}, indent=2) + "\n")
    return dataclasses.replace(state, world_sizes=(*state.world_sizes, accelerator.num_processes))


def _test(run: Training, corpus: Corpus, examples: dict[str, Examples], state: TrainState) -> dict[str, dict[str, Any]]:
    """Scores validation and test with the best adapter and writes evaluation/<split>/; metrics by split."""
    metrics: dict[str, dict[str, Any]] = {}
    for name in ("validation", "test"):
        if name not in examples:
            continue
        try:
            logits, state = score(run, state, examples[name], name)
        except Interrupted as interrupted:
            raise Stopped(interrupted.signal, state.step) from None
        split = corpus.splits[name]
        if run.accelerator.is_main_process:
            metrics[name] = write_evaluation(
                run.folder / "evaluation" / name,
                logits,
                examples[name].labels,
                run.label_names,
                split.rows,
                split.texts,
                split.text_pairs,
            )
    return metrics


def _finish(
    run: Training,
    corpus: Corpus,
    backbone: Backbone,
    examples: dict[str, Examples],
    state: TrainState,
    best: dict[str, torch.Tensor],
    metrics: dict[str, dict[str, Any]],
    precision: str,
) -> None:
    """The main process saves and checks the adapter, writes the report and, last, the summary."""
    # no more than memory has allowed a step: it may have run out
    probe = np.array(split_by_tokens(examples["train"].lengths[:8], plan_in_force(run, state).max_tokens)[0])
    inputs = collate(examples["train"], probe, np.ones(len(probe)), run.pad_token_id, run.accelerator.device).inputs
    with torch.no_grad():  # on every rank: a sharded model needs them all
        expected = run.model.eval()(**inputs).logits
    if not run.accelerator.is_main_process:
        return
    folder = run.folder
    summary = _summary(run, corpus, state, metrics, precision)
    card = model_card(folder.name, run.config, run.label_names, summary)
    save_adapter(folder / "adapter", run.model, best, backbone.tokenizer, run.label_names, card)
    if run.sharded:  # it may fit no device but the host, where other kernels round otherwise
        inputs = {name: tensor.cpu() for name, tensor in inputs.items()}
    check_adapter(
        folder / "adapter",
        backbone,
        inputs,
        expected,
        COMPUTE_TYPES[precision],
        tolerance=0.05 if run.sharded else 1e-3,
    )
    summary["adapter_bytes"] = (folder / "adapter" / "adapter_model.safetensors").stat().st_size
    scores = {
        f"final/{split}_{name}": m[name] for split, m in metrics.items() for name in ("accuracy", "f1_macro", "loss")
    }
    run.log.finals(as_dict(run.config), scores, state.step, state.step / run.plan.steps_per_epoch)
    write_atomic(folder / PENDING_SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    script = Path(__file__).with_name("report.py")
    # in a session of its own: a Ctrl-C at the terminal is for this process, which is about to end anyway
    command = [sys.executable, str(script), "--run", str(folder)]
    report = subprocess.run(command, capture_output=True, text=True, start_new_session=True)
    (folder / PENDING_SUMMARY).rename(folder / "summary.json")
    for split in metrics:
        say = f"{split:>10}: accuracy {metrics[split]['accuracy']:.4f}  F1 {metrics[split]['f1_macro']:.4f}"
        run.log.say(f"{say}  loss {metrics[split]['loss']:.4f}  ({metrics[split]['num_examples']} examples)")
    best_of = f"({summary['adapter_bytes']:,} bytes; best of step {summary['best_step']})"
    run.log.say(f"{'adapter':>10}: {folder / 'adapter'}  {best_of}")
    if report.returncode == 0:
        run.log.say(f"{'report':>10}: {folder / 'report.html'}")
        run.log.say(f"{'next':>10}: python trainer/predict.py --run {folder} --input FILE.csv --output PREDICTIONS.csv")
    else:
        run.log.say(f"warning: no report: {report.stderr.strip()[-300:]}")


def _summary(
    run: Training, corpus: Corpus, state: TrainState, metrics: dict[str, dict[str, Any]], precision: str
) -> dict[str, Any]:

    trainable, total = run.model.get_nb_trainable_parameters()
    short = ("accuracy", "f1_macro", "loss", "num_examples")
    return {
        "status": "finished",
        "recipe": run.config.recipe,
        "steps": state.step,
        "epochs": state.step / run.plan.steps_per_epoch,
        "stopped_early": state.stopped,
        "world_size": run.accelerator.num_processes,
        "world_sizes": list(state.world_sizes),
        "best_step": state.best_step or state.step,
        **{name: {key: m[key] for key in short} for name, m in metrics.items()},
        "trainable_parameters": trainable,
        "total_parameters": total,
        "adapter_bytes": 0,
        "train_seconds": state.run.seconds,
        "examples_per_second": state.run.examples / state.run.seconds,
        "tokens_per_second": state.run.tokens / state.run.seconds,
        "padding_fraction": 1 - state.run.tokens / state.run.padded_tokens,
        "peak_memory_bytes": peak_memory_bytes(run.accelerator.device),
        "precision": precision,
        "resumed_from": list(state.resumed_from),
        "label_names": corpus.label_names,
        "parameters": parameter_table(run.model),
        "data": corpus.summary(),
    }
