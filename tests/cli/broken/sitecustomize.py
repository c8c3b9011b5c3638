"""Breaks the processes that --verify starts, as the variable BREAK says. Python imports this at its start."""

import dataclasses
import functools
import os
import sys


def weigh_micro_batches_alike():
    """The mean over micro-batches of the mean over each one's examples."""
    from trainer.batching.plan import Plan

    right = Plan.micro_batches

    def wrong(plan, step, rank, world_size):
        parts = [part for other in range(world_size) for part in right(plan, step, other, world_size)]
        count, total = sum(part.weights.any() for part in parts), plan.total_weight(step)
        return [
            dataclasses.replace(part, weights=part.weights * total / count / (part.weights.sum() or 1))
            for part in right(plan, step, rank, world_size)
        ]

    Plan.micro_batches = wrong


def key_masks_by_rank():
    from trainer.dropout.sites import DropoutKeys

    right = DropoutKeys.__init__
    DropoutKeys.__init__ = lambda self, seed: right(self, seed + int(os.environ.get("RANK", "0")))


def lose_the_head():
    from safetensors.torch import load_file, save_file

    from trainer.training import pipeline

    right = pipeline.save_final_adapter

    @functools.wraps(right)
    def wrong(run, *given):
        right(run, *given)
        path = run.folder / "adapter/adapter_model.safetensors"
        save_file({name: tensor for name, tensor in load_file(path).items() if "classifier" not in name}, path)

    pipeline.save_final_adapter = wrong


def forget_the_optimizer():
    from trainer.training import checkpoint

    checkpoint.load_optimizer_tensors = lambda *given: None


PROGRAMS = ("trainer.verification.ranks", "trainer/run.py")
if any(word.endswith(PROGRAMS) for word in sys.orig_argv) and "launcher.py" not in " ".join(sys.orig_argv):
    globals()[os.environ["BREAK"]]()
