"""Scoring a split once, over all ranks, exactly; and what an evaluation during training does with the scores.

Always holds: every example of the split is scored exactly once on any number of processes; this is checked. The
micro-batches are a function of the lengths and the token budget alone, never of the number of ranks. So the logits are
equal to the last bit on any number of processes of one kind of device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from trainer.batching.collate import average_windows
from trainer.batching.plan import split_by_tokens
from trainer.compat import on_device
from trainer.config.schema import chosen_metric
from trainer.data.rows import TextSplit
from trainer.data.tokens import Examples
from trainer.errors import UserError, bar_settings
from trainer.files import csv_text, write_atomic
from trainer.model.adapter import adapter_tensors
from trainer.packed.forward import Forward
from trainer.tasks.shares import class_shares
from trainer.tasks.task import Task, format_score, headline_values, is_better, measure, metric_value
from trainer.training.records import Run, current_plan
from trainer.training.state import TrainState
from trainer.training.step import first_signal, sum_over_ranks


class Full(Exception):
    """Memory ran out on some rank; all ranks raise it."""


class Stopped(Exception):
    """A signal ended the training or a scoring early; the run can resume."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(number, step)
        self.signal, self.step = number, step


@torch.no_grad()
def score_split(
    forward: Forward,
    examples: Examples,
    accelerator: Accelerator,
    *,
    max_tokens: int,
    num_labels: int,
    check_round: Callable[[bool], None] = lambda is_full: None,
    progress: str | None = None,
) -> np.ndarray:
    """Logits of every example, float32 [N, C], in the order of the split, on every rank.

    Args:
        forward: its model's training mode is restored afterwards.
        examples: N examples.
        accelerator: of the run.
        max_tokens: token budget of one micro-batch.
        num_labels: C.
        check_round: called after every round, with whether memory ran out on this rank; raises on all ranks or on none.
        progress: label of the progress bar; None = no bar.

    Raises:
        UserError: memory ran out on this rank; the watch stops the others.
    """
    was_training = forward.model.training
    forward.model.eval()
    rank, world_size = accelerator.process_index, accelerator.num_processes
    settings = forward.packed, forward.padding.one_length, examples.window_length
    parts = split_by_tokens(examples.lengths, max_tokens, *settings)
    logits = torch.zeros(len(examples.lengths), num_labels, device=accelerator.device)
    times_seen = torch.zeros(len(examples.lengths), device=accelerator.device)
    rounds = range(0, len(parts), world_size)
    try:
        for first in tqdm(rounds, desc=progress, disable=progress is None, leave=False, **bar_settings()):
            # a rank without a part in the last round scores another one's: a sharded model needs every rank
            number = first + rank
            ids = np.array(parts[number if number < len(parts) else -1])
            found = None
            with contextlib.suppress(torch.OutOfMemoryError):
                found = score_micro_batch(forward, examples, ids, accelerator)
            check_round(found is None)
            if found is None:
                hint = "try a lower batch.eval_max_tokens (predict.py: --max_tokens)"
                raise UserError(f"out of memory while scoring {max_tokens:,} tokens at a time; {hint}")
            if number < len(parts):
                positions = on_device(ids, accelerator.device)
                logits[positions] = found.float()
                times_seen[positions] += 1
    finally:
        forward.model.train(was_training)
    logits, times_seen = accelerator.reduce(logits, "sum"), accelerator.reduce(times_seen, "sum")
    assert bool((times_seen == 1).all()), "an example was scored twice or not at all"
    return logits.cpu().numpy()


def score_micro_batch(forward: Forward, examples: Examples, ids: np.ndarray, accelerator: Accelerator) -> torch.Tensor:
    """Logits of the examples `ids`, [B, C]."""
    batch = forward.collate(examples, ids, np.ones(len(ids)), accelerator.device)
    with accelerator.autocast():
        return average_windows(batch, forward(batch.inputs, batch.lengths))


def score(run: Run, state: TrainState, name: str) -> np.ndarray:
    """Scores a split with the model as it is; returns its logits, float32 [N, C], on every rank.

    If memory runs out on some rank, all of them begin again with half of the token budget.

    Raises:
        Stopped: some rank received a signal; the scores so far are lost.
        UserError: a logit is not finite, or memory ran out with a single example or with sharded weights.
    """
    learner, examples = run.learner, run.inputs.examples[name]

    def check_round(is_full: bool) -> None:
        if is_full and learner.sharded:  # the other ranks wait in a collective of this forward
            return
        num_full, *counts = sum_over_ranks(learner.accelerator, [], [is_full, *run.stop.counts()]).tolist()
        if signal := first_signal(counts):
            raise Stopped(signal, state.step)
        if num_full:
            raise Full

    run.watch.position = f"the scoring of {name} after step {state.step}"
    # a training budget that was lowered lowers this one in proportion
    max_tokens = run.eval_max_tokens * current_plan(run, state).max_tokens // run.plan.max_tokens
    num_labels, progress = len(run.inputs.corpus.label_names), run.log.bar_label(name)
    settings: Any = {"num_labels": num_labels, "progress": progress, "check_round": check_round}
    while True:
        try:
            logits = score_split(learner.forward, examples, learner.accelerator, max_tokens=max_tokens, **settings)
            break
        except Full:
            if max_tokens <= (longest := examples.lengths.max()):
                fix = "use a lower data.max_length or run.precision bf16"
                raise UserError(f"{name}: out of memory with a single example of {longest} tokens; {fix}") from None
            max_tokens = max(int(longest), max_tokens // 2)
            run.log.print_line(f"{name}: out of memory; continuing with at most {max_tokens:,} tokens at a time")
            if learner.accelerator.device.type == "cuda":
                torch.cuda.empty_cache()
    if not np.isfinite(logits).all():
        refuse_broken_logits(logits, run.inputs.corpus.splits[name].rows, name, "--run.precision bf16 or no")
    return logits


def refuse_broken_logits(logits: np.ndarray, rows: np.ndarray, name: str, precision: str) -> None:
    """Refuses logits that are not finite, [N, C]: fp16 may overflow, and no class would be the largest."""
    if len(broken := rows[~np.isfinite(logits).all(axis=1)]):
        shown = ", ".join(map(str, broken[:8])) + (", ..." if len(broken) > 8 else "")
        raise UserError(
            f"{name}: the logits of {len(broken)} examples are not finite: id {shown} (row, counted from 0); "
            f"try {precision}"
        )


def evaluate(
    run: Run, state: TrainState, best: dict[str, torch.Tensor] | None
) -> tuple[TrainState, dict[str, torch.Tensor] | None]:
    """Scores the validation split, keeps the adapter if it is the best so far, and counts the patience.

    Raises:
        Stopped: some rank received a signal; the scores so far are lost.
    """
    if "validation" not in run.inputs.examples:
        return dataclasses.replace(state, evaluated_step=state.step), None
    logits = score(run, state, "validation")
    log, task, label_names = run.log, run.learner.task, run.inputs.corpus.label_names
    metric, patience = chosen_metric(run.config), run.config.evaluation.patience
    metrics = measure(task, logits, run.inputs.examples["validation"].targets, label_names)
    value = metric_value(metrics, metric)
    better = is_better(task, metric, value, state.best_value)
    log_evaluation(run, state, logits, metrics)
    epoch, headline = state.step / run.plan.steps_per_epoch, headline_values(task, metrics, metric)
    shown = "  ".join(f"{name} {format_score(number)}" for name, number in headline.items())
    log.print_line(f"step {state.step:>6}  epoch {epoch:5.2f}  validation: {shown}{'  best' if better else ''}")
    state = dataclasses.replace(state, evaluated_step=state.step)
    if better:
        state = dataclasses.replace(state, best_step=state.step, best_value=value, num_worse=0)
        return state, adapter_tensors(run.learner.model)
    num_worse = state.num_worse + 1
    if num_worse == patience:
        log.print_line(
            f"early stopping at step {state.step}: evaluation.patience {patience} is used up; the best "
            f"{metric} is {format_score(state.best_value or 0.0)}, of step {state.best_step}"
        )
    return dataclasses.replace(state, num_worse=num_worse, stopped_early=num_worse == patience), best


def log_evaluation(run: Run, state: TrainState, logits: np.ndarray, metrics: dict[str, Any]) -> None:
    """Logs the metrics of the validation split, and draws its confusion matrix or residuals."""
    log, task, label_names = run.log, run.learner.task, run.inputs.corpus.label_names
    targets = run.inputs.examples["validation"].targets
    scalars = {f"validation/{name}": metrics[name] for name in task.metrics}
    scalars |= {f"validation/f1/{name}": each["f1"] for name, each in metrics["per_class"].items() if "f1" in each}
    log.log_scalars(scalars, state.step, state.step / run.plan.steps_per_epoch)
    if task.confusion is not None:
        counts = task.confusion(logits, targets)
        log.log_confusion_matrix("validation/confusion_matrix", counts, label_names, state.step)
    if task.affine is not None:
        factor, shift = task.affine
        log.log_residuals("validation/residuals", targets, logits * factor + shift, label_names, state.step)


def write_evaluation(
    folder: Path,
    task: Task,
    logits: np.ndarray,
    targets: np.ndarray,
    label_names: list[str],
    split: TextSplit,
    train: Mapping[str, Any],
) -> dict[str, Any]:
    """Writes predictions.csv, metrics.json and the task's own files to evaluation/<split>; returns the metrics.

    `train` has the counts of the training split, for the shares of the classes.
    """
    columns: dict[str, Iterable[Any]] = {
        "id": split.rows,
        "label": task.format_targets(targets, label_names),
        **task.prediction_columns(logits, label_names),
        "text": split.texts,
        **({"text_pair": split.text_pairs} if split.text_pairs is not None else {}),
    }
    shares = class_shares(task, logits, label_names, train)
    metrics = {**measure(task, logits, targets, label_names), "class_shares": shares}
    write_atomic(folder / "predictions.csv", predictions_csv(columns))
    write_atomic(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    for name, text in task.files(logits, targets, label_names).items():
        write_atomic(folder / name, text)
    return metrics


def predictions_csv(columns: Mapping[str, Iterable[Any]]) -> str:
    """Columns of N values as csv; probabilities have six decimals."""
    shown = [
        [f"{value:.6f}" for value in values] if name.partition(":")[0] in ("confidence", "probability") else values
        for name, values in columns.items()
    ]
    return csv_text([columns, *zip(*shown, strict=True)])
