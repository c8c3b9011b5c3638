"""Scoring a split once, over all ranks, exactly.

Always holds: every example of the split is scored exactly once, whatever the number of processes; this is checked, not
assumed. The micro-batches are a function of the lengths and the token budget alone, never of the number of ranks, so
the logits are equal to the last bit on any number of processes of one kind of device.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from trainer.batching.plan import Tokenised, collate, split_by_tokens
from trainer.compat import on_device
from trainer.data.corpus import TextSplit
from trainer.errors import UserError, bar_settings
from trainer.files import csv_text, write_atomic
from trainer.packed.forward import Forward
from trainer.tasks.task import Task, measure


def refuse_lack_of_memory(out_of_memory: bool) -> None:
    """What `score_split` does by default when memory runs out.

    Raises:
        UserError: it did.
    """
    if out_of_memory:
        raise UserError("out of memory; try a lower number of tokens a batch")


@torch.no_grad()
def score_split(
    forward: Forward,
    examples: Tokenised,
    accelerator: Accelerator,
    *,
    max_tokens: int,
    pad_token_id: int,
    num_labels: int,
    check: Callable[[bool], None] = refuse_lack_of_memory,
    progress: str | None = None,
) -> np.ndarray:
    """Logits of every example, float32 [N, C], in the order of the split, on every rank.

    Args:
        forward: of a prepared or plain model, whose training mode is put back afterwards.
        examples: N examples.
        accelerator: gives device, autocast and collectives.
        max_tokens: tokens of one micro-batch, padding included.
        pad_token_id: fills up shorter examples, where they are padded.
        num_labels: C.
        check: called after every round with whether memory ran out on this rank; raises on all ranks or on none.
        progress: label of the progress bar; None = no bar.
    """
    was_training = forward.model.training
    forward.model.eval()
    rank, world_size = accelerator.process_index, accelerator.num_processes
    parts = split_by_tokens(examples.lengths, max_tokens, forward.packed, forward.padding.one_length)
    padding = None if forward.packed else pad_token_id
    logits = torch.zeros(len(examples.lengths), num_labels, device=accelerator.device)
    times_seen = torch.zeros(len(examples.lengths), device=accelerator.device)
    rounds = range(0, len(parts), world_size)
    try:
        for first in tqdm(rounds, desc=progress, disable=progress is None, leave=False, **bar_settings()):
            # a rank without a part in the last round computes another's for nothing: a sharded model needs every rank
            number = first + rank
            ids = np.array(parts[number if number < len(parts) else -1])
            out_of_memory = False
            try:
                batch = collate(
                    examples, ids, np.ones(len(ids)), padding, accelerator.device, left=forward.padding.left
                )
                with accelerator.autocast():
                    output = forward(batch.inputs, batch.lengths)
            except torch.OutOfMemoryError:
                out_of_memory = True
            check(out_of_memory)
            if number < len(parts):
                positions = on_device(ids, accelerator.device)
                logits[positions] = output.float()
                times_seen[positions] += 1
    finally:
        forward.model.train(was_training)
    logits, times_seen = accelerator.reduce(logits, "sum"), accelerator.reduce(times_seen, "sum")
    assert bool((times_seen == 1).all()), "an example was scored twice or not at all"
    return logits.cpu().numpy()


def write_evaluation(
    folder: Path, task: Task, logits: np.ndarray, targets: np.ndarray, label_names: list[str], split: TextSplit
) -> dict[str, Any]:
    """Writes predictions.csv, metrics.json and the task's own files; returns the metrics.

    Args:
        folder: evaluation/<split>.
        task: of the run.
        logits: [N, C].
        targets: of N examples.
        label_names: [C].
        split: texts and rows of the N examples.
    """
    columns: dict[str, Iterable[Any]] = {
        "id": split.rows,
        "label": task.format_targets(targets, label_names),
        **task.prediction_columns(logits, label_names),
        "text": split.texts,
        **({"text_pair": split.text_pairs} if split.text_pairs is not None else {}),
    }
    metrics = measure(task, logits, targets, label_names)
    write_atomic(folder / "predictions.csv", predictions_csv(columns))
    write_atomic(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    for name, text in task.files(logits, targets, label_names).items():
        write_atomic(folder / name, text)
    return metrics


def predictions_csv(columns: Mapping[str, Iterable[Any]]) -> str:
    """Columns of N values as csv, with six decimals."""
    rows = zip(*columns.values(), strict=True)
    return csv_text([columns, *([f"{v:.6f}" if isinstance(v, float) else v for v in row] for row in rows)])
