"""A run from its configuration to its summary: data, model, resume, training, test, adapter, report.

Always holds: a user's mistake is found before weights are loaded and before a file of the run is touched.
`summary.json` is written last, so a run with a summary is finished.
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

from trainer.batching.plan import split_by_tokens
from trainer.compat import peak_memory_bytes
from trainer.config.labels import plural, quoted
from trainer.config.loading import config_text, load_config
from trainer.config.schema import Config, as_dict, chosen_metric
from trainer.data.corpus import Corpus
from trainer.data.tokens import Examples
from trainer.distributed.session import StopRequest, check_agreement, check_device, choose_precision, join_processes
from trainer.errors import UserError, quote_path
from trainer.files import hold_run_folder, remove_unfinished, write_atomic
from trainer.model.adapter import (
    SavedAdapter,
    adapter_config_json,
    adapter_tensors,
    check_adapter,
    find_class_tensors,
    load_adapter_tensors,
    save_adapter,
    take_over,
)
from trainer.model.backbone import Identity, silence_libraries
from trainer.model.build import COMPUTE_TYPES
from trainer.model.card import model_card
from trainer.model.lora_start import as_plain_lora
from trainer.model.peft_options import parameter_table
from trainer.packed.forward import PaddedForward
from trainer.tasks import make_task
from trainer.tasks.shares import find_shift
from trainer.tasks.task import Constants, format_score, headline_values
from trainer.training.checkpoint import Checkpoint, load_newest, restore
from trainer.training.loop import train
from trainer.training.records import Run, current_plan
from trainer.training.scoring import Stopped, score, write_evaluation
from trainer.training.setup import build, prepare
from trainer.training.state import TrainState

CHANGEABLE = {"base_model_name_or_path", "revision", "peft_version", "total_step"}
"""keys that may differ in the adapter_config.json that a run starts from; total_step is the run's length"""
LIBRARIES = ("torch", "accelerate", "transformers", "peft", "datasets", "numpy", "safetensors")


def train_and_report(config: Config, folder: Path, check_folder: Callable[[], bool] | None = None) -> int:
    """Trains, tests and reports; returns the exit code: 0, or 128 + signal.

    Rank 0 calls `check_folder` after the rendezvous. If it returns True, the run is finished and all ranks end.
    """
    stop = StopRequest()
    can_stop = stop.listen()
    silence_libraries()
    check_device()
    precision, notes = _choose_precision(config, folder)
    if not can_stop:
        notes.append("started from a thread: a signal ends the run at once, and it continues from the last checkpoint")
    _check_trackers(config.tracking.backends)
    facts = {f"{group}.{name}": str(v) for group, values in as_dict(config).items() for name, v in values.items()}
    with join_processes(precision, facts) as (accelerator, watch):
        if check_folder is not None and accelerator.is_main_process and check_folder():
            sys.exit(0)  # on all ranks: see `join_processes`
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, precision=accelerator.mixed_precision))
        with hold_run_folder(folder) if accelerator.is_main_process else contextlib.nullcontext():
            checkpoint, damage = _read_newest(accelerator, folder / "checkpoints")
            watch.position = "the preparation of the data"
            known = checkpoint.state.get("backbone") if checkpoint is not None else None
            inputs = prepare(config, folder, Identity(**known) if known else None)
            watch.position = "the setup of the model"
            run = build(config, folder, inputs, accelerator, stop, watch)
            check_agreement(inputs.fingerprints)
            for line in damage:
                run.log.print_line(f"warning: {line}")
            state, best = _resume_or_start(run, checkpoint)
            state = record_start(run, state, notes)
            stop.deferred = True
            try:
                run.log.open(
                    config.tracking.backends, state.step, state.evaluated_step, run.total_steps, as_dict(run.config)
                )
                state, best = train(run, state, best)
                finish(run, state, best)
            except Stopped as stopped:
                say_stopped(run, stopped)
                return 128 + stopped.signal
            finally:
                run.log.close()
    return 0


def _choose_precision(config: Config, folder: Path) -> tuple[str, list[str]]:
    """The precision of the run, and notes about it; `auto` keeps what it chose when the run began."""
    kept = None
    if config.run.precision == "auto":
        with contextlib.suppress(UserError):  # a new run
            kept = load_config(folder / "config.yaml").run.precision
    if kept in (None, "auto"):  # earlier versions recorded auto
        return choose_precision(config.run.precision), []
    now, precision = choose_precision("auto"), choose_precision(kept, begun=True)
    note = f"run.precision: auto stays {kept}, as when the run began; this machine would choose {now}"
    return precision, [note] if now != kept else []


def _check_trackers(backends: list[str]) -> None:
    """Raises a UserError for a tracker that is not installed."""
    installed = [str(tracker.value) for tracker in get_available_trackers()]
    missing = [name for name in backends if name not in installed]
    if missing:
        raise UserError(f"tracking.backends: {missing[0]!r} is not installed; installed: {', '.join(installed)}")


def _read_newest(accelerator: Accelerator, checkpoints: Path) -> tuple[Checkpoint | None, list[str]]:
    """Reads the newest checkpoint on the main process for all ranks: the others may not see the folder."""
    found = None
    if accelerator.is_main_process:
        remove_unfinished(checkpoints)
        found = load_newest(checkpoints)
    (found,) = broadcast_object_list([found])
    return found


def _resume_or_start(run: Run, checkpoint: Checkpoint | None) -> tuple[TrainState, dict[str, torch.Tensor] | None]:
    """Loads the checkpoint, or the adapter to start from; returns the state and the best adapter so far."""
    if checkpoint is not None:
        state = restore(run, checkpoint)
        run.log.print_line(f"continuing after step {state.step} of {run.total_steps}")
        return state, checkpoint.best_adapter
    if run.inputs.start is not None:
        _load_start(run, run.inputs.start)
    return TrainState(), None


def _load_start(run: Run, start: SavedAdapter) -> None:
    """Loads the adapter and head of another run, if its PEFT options are equal; new classes keep their drawn rows."""
    own = json.loads(adapter_config_json(run.learner.model.peft_config["default"]))
    for name in sorted(own.keys() & start.peft.keys()):
        if own[name] != start.peft[name] and name not in CHANGEABLE and not name.endswith("dropout"):
            there = f"{start.folder} was trained with peft.{name} {start.peft[name]!r}, and here it is {own[name]!r}"
            fix = f"give all of peft the values in {start.folder}/adapter_config.json"
            raise UserError(f"model.adapter: {there}; {fix}")
    tensors, names = start.tensors, run.inputs.corpus.label_names
    if names != start.label_names:
        class_tensors = find_class_tensors(run.inputs.backbone, run.config.peft)
        tensors = take_over(start, adapter_tensors(run.learner.model), names, class_tensors)
    load_adapter_tensors(run.learner.model, tensors, f"model.adapter: {start.folder}")
    run.log.print_line(f"starting from the adapter {start.folder}")
    new, dropped = (
        sorted({*one} - {*other}) for one, other in ((names, start.label_names), (start.label_names, names))
    )
    if new or dropped:
        lists = [f"; {word}: {quoted(found)}" for word, found in (("new", new), ("dropped", dropped)) if found]
        kept = f"kept the head rows of {len(names) - len(new)} of {len(names)} {plural(run.learner.task.noun)}"
        run.log.print_line(f"{kept}{''.join(lists)}")


def record_start(run: Run, state: TrainState, notes: list[str]) -> TrainState:
    """Tells the user what will run, writes config.yaml and environment.json, and adds the start to the state."""
    accelerator, precision, say = run.learner.accelerator, run.config.run.precision, run.log.print_line
    trainable, total = run.learner.model.get_nb_trainable_parameters()
    about_data = describe_data(run.config, run.inputs.corpus, run.inputs.examples)
    for line in [*about_data, *(f"note: {note}" for note in notes)]:
        say(line)
    say(
        f"training {run.folder}: {trainable:,} of {total:,} parameters ({trainable / total:.2%}), "
        f"{len(run.plan.lengths)} examples, {run.total_steps} steps of {run.config.batch.size}, "
        f"{accelerator.device.type} x {accelerator.num_processes}, {precision}"
        f"{', frozen weights sharded' if run.learner.sharded else ''}"
    )
    for note in run.learner.notes:
        say(f"note: {note}")
    if accelerator.is_main_process:
        write_atomic(run.folder / "config.yaml", config_text(run.config))
        path = run.folder / "environment.json"
        try:
            starts = json.loads(path.read_text())["starts"]
        except (OSError, ValueError, LookupError, TypeError):  # the first start, or a file that no resume needs
            starts = []
        starts.append(
            {
                "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "command": shlex.join(sys.argv),
                "world_size": accelerator.num_processes,
                "sharded": run.learner.sharded,
                "device": str(accelerator.device),
                "precision": precision,
                "versions": {name: version(name) for name in LIBRARIES},
                "platform": platform.platform(),
                "backbone": dataclasses.asdict(run.inputs.backbone.identity),
                "resumed_from": state.step if state.resumed_from else None,
            }
        )
        write_atomic(path, json.dumps({"starts": starts}, indent=2) + "\n")
    return dataclasses.replace(state, world_sizes=(*state.world_sizes, accelerator.num_processes))


def describe_data(config: Config, corpus: Corpus, examples: dict[str, Examples]) -> list[str]:
    """Lines for the user about the data."""
    counts, max_length = corpus.counts, config.data.max_length
    sizes = ", ".join(f"{name} {len(split):,}" for name, split in corpus.splits.items())
    lengths = np.concatenate([split.lengths for split in examples.values()])
    num_cut = int((lengths == max_length).sum()) if config.data.long_documents == "cut" else 0
    # a short text of just this length is not cut, so a few examples say little
    is_worth_a_word = num_cut > len(lengths) / 10 and corpus.splits["train"].text_pairs is None
    fix = "; data.long_documents windows reads them whole" if is_worth_a_word else ""
    is_held_out = config.data.validation is None and "validation" in corpus.splits
    together = "; the held-out validation has none of its texts" if is_held_out else ""
    num_labels, noun = len(corpus.label_names), make_task(corpus.task).noun
    kinds = f"{num_labels} {noun if num_labels == 1 else plural(noun)}"
    notes = {
        f"duplicates within train{together}": counts["train"]["num_duplicates"],
        **{f"rows of {name} found in train": counts[name]["num_in_train"] for name in corpus.splits if name != "train"},
        f"examples fill all {max_length} tokens and may be cut{fix}": num_cut,
        f"examples have several windows of {max_length} tokens": int((lengths > examples["train"].window_length).sum()),
    }
    return [
        f"{sizes} examples of {kinds} (task.type {corpus.task.type})",
        *(f"note: {count:,} {what}" for what, count in notes.items() if count),
        *(f"warning: {line}" for line in corpus.warnings),
    ]


def say_stopped(run: Run, stopped: Stopped) -> None:
    """Tells the user that a signal ended the run, and how to continue."""
    if run.learner.accelerator.is_main_process:
        name = f"{signal.Signals(stopped.signal).name}{' (Ctrl-C)' if stopped.signal == signal.SIGINT else ''}"
        print(
            f"stopped by {name} after step {stopped.step}; the state is saved in {run.folder / 'checkpoints'}. "
            "The same command, typed again, continues.",
            file=sys.stderr,
        )


def finish(run: Run, state: TrainState, best: dict[str, torch.Tensor]) -> None:
    """Tests the best adapter; the main process saves it and writes the report and, last, the summary."""
    run.log.close_bar()
    load_adapter_tensors(run.learner.model, best, "best adapter")
    results, constants = write_evaluations(run, state)
    run.watch.position = "the end"
    batch, expected = probe(run, state)
    if not run.learner.accelerator.is_main_process:
        return
    summary, log = summarize(run, state, results), run.log
    save_final_adapter(run, best, summary, constants, batch, expected)
    scores = {f"final/{split}_{name}": value for split, values in results.items() for name, value in values.items()}
    log.log_final_metrics(as_dict(run.config), scores, state.step, state.step / run.plan.steps_per_epoch)
    from trainer.reporting.page import build_report  # matplotlib can wait until the first step is done

    try:
        with warnings.catch_warnings(action="ignore"):  # matplotlib's, of letters that its font lacks
            report = f"{'report':>10}: {build_report(run.folder, summary)}"
    except Exception as error:  # a report is never worth a run
        report = f"warning: no report: {error}"
    write_atomic(run.folder / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    for split, values in results.items():
        shown = "  ".join(f"{name} {format_score(value)}" for name, value in values.items())
        log.print_line(f"{split:>10}: {shown}  ({summary[split]['num_examples']} examples)")
    best_of = f"({summary['adapter_bytes']:,} bytes; best of step {summary['best_step']})"
    log.print_line(f"{'adapter':>10}: {run.folder / 'adapter'}  {best_of}")
    log.print_line(report)
    predict = f"python trainer/predict.py --run {quote_path(run.folder)} --input FILE.csv --output PREDICTIONS.csv"
    log.print_line(f"{'next':>10}: {predict}")


def write_evaluations(run: Run, state: TrainState) -> tuple[dict[str, dict[str, float]], Constants]:
    """Scores validation and test and writes evaluation/<split>/.

    Returns:
        the headline metrics by split, and all constants of the task.
    """
    results: dict[str, dict[str, float]] = {}
    task, constants = run.learner.task, run.inputs.corpus.constants
    for name in ("validation", "test"):
        if name not in run.inputs.examples:
            continue
        logits = score(run, state, name)
        if run.learner.accelerator.is_main_process:
            targets, corpus = run.inputs.examples[name].targets, run.inputs.corpus
            if name == "validation":
                constants = {**constants, **task.find_constants(logits, targets, corpus.label_names)}
                task = make_task(run.config.task, constants)
            folder = run.folder / "evaluation" / name
            split, train = corpus.splits[name], corpus.counts["train"]
            metrics = write_evaluation(folder, task, logits, targets, corpus.label_names, split, train)
            if shift := find_shift(metrics["class_shares"], len(split)):
                run.log.print_line(f"warning: {name}: {shift}")
            results[name] = headline_values(task, metrics, chosen_metric(run.config))
    return results, constants


def probe(run: Run, state: TrainState) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A few examples and their logits by the model's own forward. All ranks call it: a sharded model needs them."""
    # a budget that memory allowed for a step
    learner, examples, limit = run.learner, run.inputs.examples["train"], current_plan(run, state).max_tokens
    padding, pad_token_id = learner.forward.padding, run.inputs.backbone.tokenizer.pad_token_id
    settings = limit, False, padding.one_length, examples.window_length
    ids = np.array(split_by_tokens(examples.lengths[:8], *settings)[0])
    forward = PaddedForward(learner.model.eval(), pad_token_id, padding)
    batch = forward.collate(examples, ids, np.ones(len(ids)), learner.accelerator.device)
    with torch.no_grad():
        expected = forward(batch.inputs, batch.lengths)
    # the whole of a sharded model may fit the host only, where other kernels round differently
    device = torch.device("cpu") if learner.sharded else learner.accelerator.device
    return {name: tensor.to(device) for name, tensor in batch.inputs.items()}, expected


def save_final_adapter(
    run: Run,
    best: dict[str, torch.Tensor],
    summary: dict[str, Any],
    constants: Constants,
    batch: dict[str, torch.Tensor],
    expected: torch.Tensor,
) -> None:
    """Writes adapter/, checks that plain PEFT computes the same logits from it, and adds its size to the summary."""
    folder, backbone, label_names = run.folder / "adapter", run.inputs.backbone, run.inputs.corpus.label_names
    card = model_card(run.folder.name, run.config, backbone, label_names, summary, constants)
    max_length = run.config.data.max_length
    peft_config, start, tolerance = run.learner.model.peft_config["default"], run.learner.start, 1e-3
    if start is not None:
        peft_config, best = as_plain_lora(peft_config, best, start)
    # W - s B0 A0 rounds otherwise, and so do the kernels that a GPU has for batches with and without padding
    in_16_bits, on_gpu = run.config.run.precision != "no", run.learner.accelerator.device.type == "cuda"
    of_16_bits = 0.05 * max(1.0, expected.abs().max().item())
    if run.learner.sharded or (in_16_bits and (start is not None or on_gpu)):
        tolerance = of_16_bits
    save_adapter(folder, peft_config, best, backbone, max_length, label_names, constants, card)
    compute_type = COMPUTE_TYPES[run.config.run.precision]
    try:
        check_adapter(folder, backbone, batch, expected, compute_type, tolerance)
    except torch.OutOfMemoryError:  # a GPU has no room for a second copy of the backbone; the host may have
        batch = {name: tensor.cpu() for name, tensor in batch.items()}
        check_adapter(folder, backbone, batch, expected, compute_type, of_16_bits)
    summary["adapter_bytes"] = (folder / "adapter_model.safetensors").stat().st_size


def summarize(run: Run, state: TrainState, results: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The content of summary.json."""
    trainable, total = run.learner.model.get_nb_trainable_parameters()
    return {
        "status": "finished",
        "recipe": run.config.recipe,
        "steps": state.step,
        "epochs": state.step / run.plan.steps_per_epoch,
        "stopped_early": state.stopped_early,
        "world_size": run.learner.accelerator.num_processes,
        "world_sizes": list(state.world_sizes),
        "best_step": state.best_step or state.step,
        **{name: {**values, "num_examples": len(run.inputs.examples[name])} for name, values in results.items()},
        "trainable_parameters": trainable,
        "total_parameters": total,
        "adapter_bytes": 0,
        "train_seconds": state.total.seconds,
        "examples_per_second": state.total.examples / state.total.seconds,
        "tokens_per_second": state.total.tokens / state.total.seconds,
        "padding_fraction": 1 - state.total.tokens / state.total.padded_tokens,
        "peak_memory_bytes": peak_memory_bytes(run.learner.accelerator.device),
        "precision": run.config.run.precision,
        "backbone": dataclasses.asdict(run.inputs.backbone.identity),
        "padding": dataclasses.asdict(run.learner.forward.padding),
        "resumed_from": list(state.resumed_from),
        "label_names": run.inputs.corpus.label_names,
        "label_values": run.inputs.corpus.label_values,
        "parameters": parameter_table(run.learner.model),
        "data": run.inputs.corpus.counts,
    }
