"""Isotrain among the contenders of `compare.py`, through the code that its entry point runs."""

import sys

if __name__ == "__main__":
    from trainer.distributed.environment import set_environment

    set_environment()  # as trainer/run.py does, before torch is loaded

import contextlib
import dataclasses
import json

import numpy as np
import torch

from benchmarks.workload import (
    ALPHA,
    DROPOUT,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    MAX_LENGTH,
    MICRO_BATCH,
    RANK,
    SEED,
    WEIGHT_DECAY,
    Pass,
    clock,
    serve,
)
from trainer.batching.collate import collate_padded
from trainer.batching.plan import num_positions, split_by_tokens
from trainer.config.loading import parse_config
from trainer.distributed.session import StopRequest, start_accelerator
from trainer.distributed.watch import Watch
from trainer.model.backbone import silence_libraries
from trainer.training import loop, scoring
from trainer.training import setup as building
from trainer.training.state import TrainState
from trainer.training.step import example_losses


def arguments(task):
    """The command line of the run."""
    return [
        "--model.name", str(task.folder / "backbone"), "--data.train", str(task.folder / "train.csv"),
        "--data.validation_fraction", "0", "--data.max_length", str(MAX_LENGTH), "--model.dropout", str(DROPOUT),
        "--batch.size", str(task.batch), "--peft.r", str(RANK), "--peft.lora_alpha", str(ALPHA),
        "--peft.lora_dropout", str(DROPOUT), "--peft.target_modules", json.dumps(list(task.targets)),
        "--optim.learning_rate", str(LEARNING_RATE), "--optim.weight_decay", str(WEIGHT_DECAY),
        "--optim.max_grad_norm", str(MAX_GRAD_NORM), "--optim.schedule", "constant", "--run.seed", str(SEED),
        "--run.precision", task.precision, "--run.output_dir", str(task.folder / "runs"), "--run.name", "isotrain",
        "--run.quiet", "true", "--tracking.backends", "[]",
    ]  # fmt: skip


def build(task):
    """What `trainer/run.py` would train with."""
    silence_libraries()
    config = parse_config(arguments(task))
    folder = task.folder / "runs" / "isotrain"
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = start_accelerator(task.precision)
    inputs = building.prepare(config, folder)
    return building.build(config, folder, inputs, accelerator, StopRequest(), Watch())


class Isotrain:
    """A run in the hands of the benchmark."""

    def __init__(self, task):
        self.task, self.run, self.state = task, build(task), TrainState()
        loop.save_checkpoint = lambda run, state, best: None
        self.lengths, self.tokens = self.run.inputs.examples["train"].lengths, self.run.inputs.examples["train"].tokens

    def train(self, steps):
        run, state = self.run, dataclasses.replace(self.state, step=steps.start)
        started = clock(self.task.device)
        state, _ = loop.train(dataclasses.replace(run, total_steps=steps.stop), state, None)
        if state.max_tokens is not None:
            sys.exit("Isotrain ran out of memory")
        seconds = clock(self.task.device) - started
        self.state = state
        return Pass(
            seconds,
            examples=sum(len(run.plan.global_batch(step)) for step in steps),
            tokens=sum(run.plan.num_tokens(step) for step in steps),
            positions=sum(computed_positions(run, step) for step in steps),
        )

    def parity(self):
        """See `parity`; of the first step."""
        return parity(self.run, 0)

    def evaluate(self, places):
        """Scores the examples at these places; behind the last comes the first."""
        ids = np.array(places) % len(self.lengths)
        examples = subset(self.run.inputs.examples["train"], ids)
        started = clock(self.task.device)
        scores_of(self.run, examples)
        seconds = clock(self.task.device) - started
        return Pass(seconds, len(ids), int(examples.lengths.sum()), scored_positions(self.run, examples.lengths))


def scores_of(run, examples):
    """Logits of these examples, as an evaluation computes them."""
    inputs = dataclasses.replace(run.inputs, examples={"the comparison": examples})
    return scoring.score(dataclasses.replace(run, inputs=inputs), TrainState(), "the comparison")


def computed_positions(run, step):
    """Positions that a step computes, padding included."""
    return sum(tokens for tokens, _ in run.plan.sizes(step, 1))


def scored_positions(run, lengths):
    """Positions that an evaluation computes, padding included."""
    parts = split_by_tokens(lengths, run.eval_max_tokens, run.plan.packed)
    return sum(num_positions(lengths[part], run.plan.packed) for part in parts)


def subset(examples, ids):
    """The examples `ids` alone, in this order."""
    spans = [slice(examples.offsets[i], examples.offsets[i + 1]) for i in ids]
    lengths = examples.lengths[ids]
    return dataclasses.replace(
        examples,
        tokens=np.concatenate([examples.tokens[span] for span in spans]),
        offsets=np.concatenate([[0], lengths.cumsum()]),
        targets=examples.targets[ids],
        lengths=lengths,
    )


# --- does it compute what everyone computes? --------------------------------------------------------------------------


class Collector:
    """Stands in for the optimizer: keeps the gradient instead of applying it."""

    def __init__(self, run):
        self.run, self.optimizer = run, run.learner.optimizer.optimizer

    def step(self):
        self.gradient = taken_gradient(self.run)

    def zero_grad(self, **_):
        pass


def taken_gradient(run):
    """The gradient of all that trains, one vector; the tensors are left without."""
    gradient = torch.cat([parameter.grad.flatten().double() for parameter in run.learner.parameters.values()])
    for parameter in run.learner.parameters.values():
        parameter.grad = None
    return gradient


def step_gradient(run, step):
    """The gradient as `loop.train_step` comes by it, before clipping."""
    optim_config = dataclasses.replace(run.learner.optim_config, max_grad_norm=None)
    collector = Collector(run)
    learner = dataclasses.replace(run.learner, optimizer=collector, optim_config=optim_config)
    probe = dataclasses.replace(run, learner=learner)
    loop.train_step(probe, step, run.plan.micro_batches(step, 0, 1))
    if run.learner.accelerator.scaler is not None:  # it has unscaled for an optimizer that takes no step
        run.learner.accelerator.scaler.update()
    return collector.gradient


def padded(run, ids, width):
    """The examples as one batch, padded to `width` positions."""
    pad_token_id, device = run.inputs.backbone.tokenizer.pad_token_id, run.learner.accelerator.device
    batch = collate_padded(run.inputs.examples["train"], ids, run.plan.weights[ids], device, pad_token_id, left=False)
    fill = {"input_ids": pad_token_id}
    inputs = {
        name: torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]), value=fill.get(name, 0))
        for name, tensor in batch.inputs.items()
    }
    return dataclasses.replace(batch, inputs=inputs)


def padded_gradient(run, step, parts, width):
    """The gradient by the model's own forward, the parts one after another; the same dropout masks."""
    total = run.plan.total_weight(step)
    scale = run.learner.accelerator.scaler.get_scale() if run.learner.accelerator.scaler is not None else 1.0
    for ids in parts:
        batch = padded(run, ids, width)
        with run.learner.dropout.micro_batch(step, batch.ids, batch.lengths):
            logits = run.learner.model(**batch.inputs).logits
        (example_losses(run.learner.losses, logits, batch).sum() / total * scale).backward()
    return taken_gradient(run) / scale


@torch.no_grad()
def padded_logits(run, parts, width):
    run.learner.model.eval()
    logits = [run.learner.model(**padded(run, ids, width).inputs).logits.double().cpu() for ids in parts]
    run.learner.model.train()
    return torch.cat(logits)


def apart(found, expected):
    """Relative L2 difference."""
    return float((found - expected).norm() / expected.norm())


@contextlib.contextmanager
def in_fp32(run):
    """Inside, the padded forward computes in fp32, with the same numbers as weights."""
    model = run.learner.model
    narrow = {parameter: parameter.data for parameter in model.parameters() if parameter.dtype != torch.float32}
    with_autocast = model.forward
    model.forward = getattr(model, "_original_forward", with_autocast)
    for parameter, data in narrow.items():
        parameter.data = data.float()
    try:
        yield
    finally:
        model.forward = with_autocast
        for parameter, data in narrow.items():
            parameter.data = data


def parity(run, step):
    """How far Isotrain's gradient and logits of a step's examples are from the padded forward's in fp32.

    Beside each, how far the padded forward in the run's own precision is from them: what rounding alone does. While it
    lasts, LoRA's B is not 0, so that A has a gradient.
    """
    ids = run.plan.global_batch(step)
    width = int(run.inputs.examples["train"].lengths[ids].max())
    parts = np.array_split(ids, -(-len(ids) // MICRO_BATCH))
    kept = {name: parameter.detach().clone() for name, parameter in run.learner.parameters.items()}
    torch.manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in run.learner.parameters.items():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    try:
        with in_fp32(run):
            gradient, logits = padded_gradient(run, step, parts, width), padded_logits(run, parts, width)
        scores = scores_of(run, subset(run.inputs.examples["train"], ids))
        return {
            "gradient": apart(step_gradient(run, step), gradient),
            "gradient_rounding": apart(padded_gradient(run, step, parts, width), gradient),
            "logits": apart(torch.from_numpy(scores).double(), logits),
            "logits_rounding": apart(padded_logits(run, parts, width), logits),
        }
    finally:
        with torch.no_grad():
            for name, parameter in run.learner.parameters.items():
                parameter.copy_(kept[name])


if __name__ == "__main__":
    serve(sys.argv[1:], Isotrain)
