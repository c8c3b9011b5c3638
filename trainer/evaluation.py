"""Scoring a split once, over all ranks, exactly.

Always holds: every example of the split is scored exactly once, whatever the number of processes; this is checked, not
assumed. The micro-batches are a function of the lengths and the token budget alone, never of the number of ranks, so
the logits are equal to the last bit on any number of processes of one kind of device.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration
from tqdm import tqdm

from trainer.batching import Tokenised, collate, split_by_tokens
from trainer.checkpoint import write_atomic
from trainer.config import UserError
from trainer.metrics import classification_metrics, confusion, probabilities, report_text


class Interrupted(Exception):
    """A stop was asked for; the scores so far are thrown away."""


def choose_precision(wanted: str) -> str:
    """Turns `run.precision` into no, bf16 or fp16, on the device that accelerate will choose.

    accelerate's own "no" is its default and cannot be told from a choice, so `auto` overrides it.

    Raises:
        UserError: fp16 on a CPU.
    """
    on_cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in {"1", "true"}
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if wanted == "auto" and launched in {"bf16", "fp16"}:
        wanted = launched
    if wanted == "auto" and on_cpu:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        wanted = "bf16" if fast else "no"
    elif wanted == "auto":
        wanted = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if wanted == "fp16" and on_cpu:
        raise UserError("run.precision: fp16 on a CPU is dozens of times slower than fp32; use bf16, no or auto")
    return wanted


def start_accelerator(precision: str, folder: Path | None = None, backends: Sequence[str] = ()) -> Accelerator:
    """Joins the processes that the launcher started.

    Args:
        precision: no, bf16 or fp16.
        folder: run folder, for the trackers.
        backends: names of Accelerate's trackers.

    Raises:
        UserError: an unknown tracker, or another number of processes than was asked for.
    """
    place = ProjectConfiguration(project_dir=str(folder.parent), logging_dir=str(folder.parent)) if folder else None
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            # without a GPU, accelerate would otherwise leave several processes unaware of one another
            cpu=not torch.cuda.is_available(),
            log_with=list(backends) or None,
            # the few buffers of a backbone never change, so nothing but gradients needs to cross the network
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
            project_config=place,
        )
    except ValueError as error:
        raise UserError(f"accelerate: {' '.join(str(error).split())[:240]}") from None
    asked = int(os.environ.get("ISOTRAIN_NUM_PROCESSES") or os.environ.get("WORLD_SIZE") or 1)
    if asked != accelerator.num_processes:
        raise UserError(
            f"{asked} processes were asked for, {accelerator.num_processes} came up; see ./launch.sh --dry-run"
        )
    return accelerator


@torch.no_grad()
def score_split(
    model: torch.nn.Module,
    examples: Tokenised,
    accelerator: Accelerator,
    *,
    max_tokens: int,
    pad_token_id: int,
    num_labels: int,
    should_stop: Callable[[], bool] = lambda: False,
    progress: str | None = None,
) -> np.ndarray:
    """Logits of every example, float32 [N, C], in the order of the split, on every rank.

    Args:
        model: prepared or plain; its training mode is put back afterwards.
        examples: N examples.
        accelerator: gives device, autocast and collectives.
        max_tokens: padded tokens of one micro-batch.
        pad_token_id: fills up shorter examples.
        num_labels: C.
        should_stop: asked once a round; must answer alike on all ranks.
        progress: label of the progress bar; None = no bar.

    Raises:
        Interrupted: `should_stop` said so.
    """
    # DDP's forward hides a broadcast of buffers, for which ranks may have unequal numbers of batches here
    model = accelerator.unwrap_model(model)
    was_training = model.training
    model.eval()
    rank, world_size = accelerator.process_index, accelerator.num_processes
    parts = split_by_tokens(examples.lengths, max_tokens)
    logits = torch.zeros(len(examples.lengths), num_labels, device=accelerator.device)
    times_seen = torch.zeros(len(examples.lengths), device=accelerator.device)
    rounds = range(0, len(parts), world_size)
    try:
        for first in tqdm(rounds, desc=progress, disable=progress is None, leave=False, dynamic_ncols=True):
            if should_stop():
                raise Interrupted
            if first + rank < len(parts):
                ids = np.array(parts[first + rank])
                batch = collate(examples, ids, np.ones(len(ids)), pad_token_id, accelerator.device)
                with accelerator.autocast():
                    output = model(**batch.inputs).logits
                positions = torch.from_numpy(ids).to(accelerator.device)
                logits[positions] = output.float()
                times_seen[positions] += 1
    finally:
        model.train(was_training)
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
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(table)
    return buffer.getvalue()
