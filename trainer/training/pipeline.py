"""A run from a checked configuration to its summary: data, model, resume, training, test, adapter, report.

Always holds: whatever a user can get wrong is found before a weight is loaded and before a file of the run is touched;
`summary.json` is the last thing written, so a run with a summary is finished.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import platform
import shlex
import signal
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import broadcast_object_list

from trainer.batching.plan import collate, split_by_tokens
from trainer.compat import peak_memory_bytes
from trainer.config.loading import config_text, load_config
from trainer.config.schema import Config, as_dict
from trainer.distributed.session import (
    StopRequest,
    check_agreement,
    check_device,
    choose_precision,
    join_processes,
)
from trainer.distributed.watch import Watch
from trainer.errors import UserError, quote_path
from trainer.files import hold_run_folder, remove_unfinished, write_atomic
from trainer.model.adapter import (
    SavedAdapter,
    adapter_config_json,
    check_adapter,
    load_adapter_tensors,
    save_adapter,
)
from trainer.model.backbone import silence_libraries
from trainer.model.build import COMPUTE_TYPES
from trainer.model.card import model_card
from trainer.model.identity import Identity
from trainer.model.peft_options import parameter_table
from trainer.tasks import TASKS
from trainer.training.checkpoint import load_newest, recorded_backbone
from trainer.training.loop import Interrupted, Stopped, score, train
from trainer.training.memory import plan_in_force
from trainer.training.scoring import write_evaluation
from trainer.training.setup import Inputs, build, prepare
from trainer.training.state import Training, TrainState, restore

FREE = {"base_model_name_or_path", "revision", "peft_version"}
"""in adapter_config.json, what may differ from the adapter that a run starts from"""
LIBRARIES = ("torch", "accelerate", "transformers", "peft", "datasets", "numpy", "safetensors")


def train_and_report(config: Config, folder: Path, is_finished: Callable[[], bool] | None = None) -> int:
    """Trains, tests and reports; returns the exit code: 0, or 128 + signal.

    Raises:
        UserError: anything the user can mend.
    """
    stop, notes = StopRequest(), []
    if not stop.listen():
        notes.append("started from a thread: a signal ends the run at once, and it continues from the last checkpoint")
    silence_libraries()
    check_device()
    kept = _kept_precision(folder) if config.run.precision == "auto" else None
    precision = choose_precision(kept or config.run.precision, begun=kept is not None)
    if kept and (alone := choose_precision("auto")) != kept:
        notes.append(f"run.precision: auto stays {kept}, as when the run began; this machine would choose {alone}")
    _check_trackers(config.tracking.backends)
    same = {f"{group}.{name}": str(v) for group, values in as_dict(config).items() for name, v in values.items()}
    with join_processes(precision, same) as (accelerator, watch):
        if is_finished is not None and accelerator.is_main_process and is_finished():
            sys.exit(0)  # on all ranks: see `together`
        precision = accelerator.mixed_precision
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, precision=precision))
        watch.position = "the preparation of the data"
        with hold_run_folder(folder) if accelerator.is_main_process else contextlib.nullcontext():
            # read by one process for all: the others may be on machines that do not see the folder
            known = recorded_backbone(folder / "checkpoints") if accelerator.is_main_process else None
            (known,) = broadcast_object_list([known])
            inputs = prepare(config, folder, precision, Identity(**known) if known else None)
            try:
                _train(inputs, accelerator, stop, watch, notes)
            except Stopped as stopped:
                if accelerator.is_main_process:
                    name = f"{signal.Signals(stopped.signal).name}{' (Ctrl-C)' if stopped.signal == 2 else ''}"
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


def _kept_precision(folder: Path) -> str | None:
    """What `auto` came to when the run began; None for a new run, and for one of an earlier version."""
    try:
        precision = load_config(folder / "config.yaml").run.precision
    except UserError:
        return None
    return None if precision == "auto" else precision


def _train(inputs: Inputs, accelerator: Accelerator, stop: StopRequest, watch: Watch, notes: list[str]) -> None:
    config, folder = inputs.config, inputs.folder
    watch.position = "the making of the model"
    run = build(inputs, accelerator, stop, watch)
    check_agreement(run.fingerprints)
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
    elif inputs.start is not None:
        _start_from(run, inputs.start)
    if is_main:  # only now is it sure that the run is this one
        write_atomic(folder / "config.yaml", config_text(config))
    for line in [*_data_lines(inputs), *(f"note: {note}" for note in notes)]:
        run.log.say(line)
    state = _started(run, state, inputs.precision)
    stop.deferred = True
    run.log.open(config.tracking.backends, state.step, state.evaluated_step, run.total_steps, as_dict(config))
    try:
        state, best = train(run, state, best)
        run.log.end_progress()
        load_adapter_tensors(run.model, best, "best adapter")
        metrics = _test(run, inputs, state)
        watch.position = "the end"
        _finish(run, inputs, state, best, metrics)
    finally:
        run.log.close()


def _start_from(run: Training, start: SavedAdapter) -> None:
    """Puts in place the adapter and head of another run.

    Raises:
        UserError: they do not fit.
    """
    own = json.loads(adapter_config_json(run.model))
    for name in sorted(own.keys() & start.peft.keys()):
        if own[name] != start.peft[name] and name not in FREE and not name.endswith("dropout"):
            there = f"{start.folder} was trained with peft.{name} {start.peft[name]!r}, and here it is {own[name]!r}"
            raise UserError(f"model.adapter: {there}; give all of peft the values of its run (config.yaml)")
    load_adapter_tensors(run.model, start.tensors, f"model.adapter: {start.folder}")
    run.log.say(f"starting from the adapter {start.folder}")


def _probe(run: Training, state: TrainState) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A few examples, and the logits that the model gives for them. On every rank: a sharded model needs them all."""
    # no more than memory has allowed a step: it may have run out
    padding, limit = run.forward.padding, plan_in_force(run, state).max_tokens
    probe = np.array(split_by_tokens(run.train.lengths[:8], limit, one_length=padding.one_length)[0])
    device = run.accelerator.device
    batch = collate(run.train, probe, np.ones(len(probe)), run.pad_token_id, device, left=padding.left).inputs
    with torch.no_grad():
        expected = run.model.eval()(**batch).logits
    if run.sharded:  # the whole may fit no device but the host, where other kernels round otherwise
        batch = {name: tensor.cpu() for name, tensor in batch.items()}
    return batch, expected


def _data_lines(inputs: Inputs) -> list[str]:
    """What the user should know about the data."""
    corpus, max_length = inputs.corpus, inputs.config.data.max_length
    counts = corpus.counts
    sizes = ", ".join(f"{name} {len(split):,}" for name, split in corpus.splits.items())
    cut = sum(int((split.lengths == max_length).sum()) for split in inputs.examples.values())
    is_held_out = inputs.config.data.validation is None and "validation" in corpus.splits
    together = "; the held-out validation has none of its texts" if is_held_out else ""
    notes = {
        f"duplicates within train{together}": counts["train"]["num_duplicates"],
        **{f"rows of {name} found in train": counts[name]["num_in_train"] for name in corpus.splits if name != "train"},
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
    for note in run.notes:
        say(f"note: {note}")
    if accelerator.is_main_process:
        path = run.folder / "environment.json"
        try:
            starts = json.loads(path.read_text())["starts"]
        except (OSError, ValueError, LookupError, TypeError):  # the first one, or a file that no continuation needs
            starts = []
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
                "backbone": dataclasses.asdict(run.backbone),
                "resumed_from": state.step if state.resumed_from else None,
            }
        )
        write_atomic(path, json.dumps({"starts": starts}, indent=2) + "\n")
    return dataclasses.replace(state, world_sizes=(*state.world_sizes, accelerator.num_processes))


def _test(run: Training, inputs: Inputs, state: TrainState) -> dict[str, dict[str, Any]]:
    """Scores validation and test with the best adapter and writes evaluation/<split>/; metrics by split."""
    metrics: dict[str, dict[str, Any]] = {}
    for name in ("validation", "test"):
        if name not in inputs.examples:
            continue
        examples, split = inputs.examples[name], inputs.corpus.splits[name]
        try:
            logits, state = score(run, state, examples, name)
        except Interrupted as interrupted:
            raise Stopped(interrupted.signal, state.step) from None
        if run.accelerator.is_main_process:
            task, folder = TASKS[run.config.task.type], run.folder / "evaluation" / name
            metrics[name] = write_evaluation(folder, task, logits, examples.labels, run.label_names, split)
    return metrics


def _finish(
    run: Training,
    inputs: Inputs,
    state: TrainState,
    best: dict[str, torch.Tensor],
    metrics: dict[str, dict[str, Any]],
) -> None:
    """The main process saves and checks the adapter, writes the report and, last, the summary."""
    batch, expected = _probe(run, state)
    if not run.accelerator.is_main_process:
        return
    folder, backbone = run.folder, inputs.backbone
    summary = _summary(run, inputs, state, metrics)
    card = model_card(folder.name, run.config, backbone, run.label_names, summary)
    save_adapter(folder / "adapter", run.model, best, backbone, run.config.data.max_length, run.label_names, card)
    tolerance = 0.05 if run.sharded else 1e-3
    check_adapter(folder / "adapter", backbone, batch, expected, COMPUTE_TYPES[inputs.precision], tolerance)
    summary["adapter_bytes"] = (folder / "adapter" / "adapter_model.safetensors").stat().st_size
    headline = TASKS[run.config.task.type].headline
    scores = {f"final/{split}_{name}": numbers[name] for split, numbers in metrics.items() for name in headline}
    run.log.finals(as_dict(run.config), scores, state.step, state.step / run.plan.steps_per_epoch)
    from trainer.reporting.page import build_report  # matplotlib can wait until the first step is done

    try:
        with warnings.catch_warnings(action="ignore"):  # matplotlib's, of letters that its font lacks
            report = f"{'report':>10}: {build_report(folder, summary)}"
    except Exception as error:  # a report is never worth a run
        report = f"warning: no report: {error}"
    write_atomic(folder / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    for split, numbers in metrics.items():
        shown = "  ".join(f"{name} {numbers[name]:.4f}" for name in headline)
        run.log.say(f"{split:>10}: {shown}  ({numbers['num_examples']} examples)")
    best_of = f"({summary['adapter_bytes']:,} bytes; best of step {summary['best_step']})"
    run.log.say(f"{'adapter':>10}: {folder / 'adapter'}  {best_of}")
    run.log.say(report)
    predict = f"python trainer/predict.py --run {quote_path(folder)} --input FILE.csv --output PREDICTIONS.csv"
    run.log.say(f"{'next':>10}: {predict}")


def _summary(run: Training, inputs: Inputs, state: TrainState, metrics: dict[str, dict[str, Any]]) -> dict[str, Any]:
    trainable, total = run.model.get_nb_trainable_parameters()
    short = (*TASKS[run.config.task.type].headline, "num_examples")
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
        "precision": inputs.precision,
        "backbone": dataclasses.asdict(run.backbone),
        "padding": dataclasses.asdict(run.forward.padding),
        "resumed_from": list(state.resumed_from),
        "label_names": inputs.corpus.label_names,
        "label_values": inputs.corpus.label_values,
        "parameters": parameter_table(run.model),
        "data": inputs.corpus.counts,
    }
