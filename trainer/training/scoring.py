"""Scoring a split once, over all ranks, exactly.

Always holds: every example of the split is scored exactly once, whatever the number of processes; this is checked, not
assumed. The micro-batches are a function of the lengths and the token budget alone, never of the number of ranks, so
the logits are equal to the last bit on any number of processes of one kind of device.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from trainer.batching.plan import Tokenised, collate, split_by_tokens
from trainer.compat import on_device
from trainer.errors import UserError, bar_settings
from trainer.files import write_atomic
from trainer.packed.forward import Forward
from trainer.tasks.single_label import classification_metrics, confusion, probabilities, report_text


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
    folder: Path,
    logits: np.ndarray,
    labels: np.ndarray,
    label_names: list[str],
    rows: np.ndarray,
    texts: Sequence[str],
    text_pairs: Sequence[str] | None,
) -> dict[str, Any]:
    """Writes predictions.csv, metrics.json, confusion_matrix.csv and classification_report.txt; returns the metrics.

    Args:
        folder: evaluation/<split>.
        logits: [N, C].
        labels: class numbers [N].
        label_names: [C].
        rows: row of each example in its source, [N].
        texts: [N].
        text_pairs: [N] or None.
    """
    metrics = classification_metrics(logits, labels, label_names)
    counts = confusion(logits, labels, len(label_names))
    header = ["id", "label", "prediction", "confidence", *(f"probability:{name}" for name in label_names), "text"]
    named = [label_names[label] for label in labels]
    table = [header + (["text_pair"] if text_pairs is not None else [])]
    for i, (prediction, shares) in enumerate(predictions(logits, label_names)):
        pair = [text_pairs[i]] if text_pairs is not None else []
        table.append(
            [rows[i], named[i], prediction, f"{max(shares):.6f}", *(f"{p:.6f}" for p in shares), texts[i], *pair]
        )
    write_atomic(folder / "predictions.csv", csv_text(table))
    write_atomic(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    matrix = [[name, *row] for name, row in zip(label_names, counts.tolist(), strict=True)]
    write_atomic(folder / "confusion_matrix.csv", csv_text([["true \\ predicted", *label_names], *matrix]))
    write_atomic(folder / "classification_report.txt", report_text(logits, labels, label_names))
    return metrics


def predictions(logits: np.ndarray, label_names: list[str]) -> Iterator[tuple[str, list[float]]]:
    """Per example: the predicted class's name, and the probability of each class [C]."""
    for shares in probabilities(logits):
        yield label_names[int(shares.argmax())], shares.tolist()


def csv_text(table: Sequence[Sequence[Any]]) -> str:
    """Rows as csv."""
    lines: list[str] = []
    writer: Any = csv.writer(SimpleNamespace(write=lines.append))  # its line end, "\r\n", has a lone "\r" quoted
    writer.writerows(table)
    return "".join(f"{line[:-2]}\n" for line in lines)
