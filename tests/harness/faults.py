"""Faults put into a process before its command begins: signals, errors, lack of memory or disk at a chosen point.

Each function patches the program in the process it is called in; all arguments are plain JSON values.
"""

import dataclasses
import errno
import importlib
import itertools
import json
import os
import signal
import sys
import time


def strike(number):
    os.kill(os.getpid(), number)
    if number == signal.SIGKILL:
        signal.pause()


def at_call(place, count=1, number=signal.SIGKILL, after=False):
    """Sends the process a signal at the `count`-th call of `place`, before or after it.

    `place` is the name of a function of trainer/, or "module:name" of any other.
    """
    on_visit(place, count, after, lambda: strike(number))


def error_at_call(place, error, message, count=1):
    """Raises an error of trainer/errors.py or of Python, by its name, at the `count`-th call of `place`."""
    import builtins

    from trainer import errors

    def fail():
        print(f"fault at {time.monotonic()}", flush=True)
        raise (getattr(errors, error, None) or getattr(builtins, error))(message)

    on_visit(place, count, False, fail)


def on_visit(place, count, after, act):
    """Acts at the `count`-th call of `place`, before or after it."""
    calls = 0

    def around(original):
        def struck(*arguments, **settings):
            nonlocal calls
            calls += 1
            mine = calls
            if mine == count and not after:
                act()
            result = original(*arguments, **settings)
            if mine == count and after:
                act()
            return result

        return struck

    replace(place, around)


def replace(place, around):
    """Puts `around(original)` in the place of a function, wherever trainer/ has it imported."""
    if ":" in place:
        path, _, name = place.partition(":")
        owner = importlib.import_module(path)
        *owners, name = name.split(".")
        for step in owners:
            owner = getattr(owner, step)
        setattr(owner, name, around(getattr(owner, name)))
        return
    holders = [module for path, module in sys.modules.items() if path.startswith("trainer.") and hasattr(module, place)]
    originals = {getattr(module, place) for module in holders}
    assert len(originals) == 1, f"{place}: {len(originals)} functions of this name"
    struck = around(originals.pop())
    for module in holders:
        setattr(module, place, struck)


def on_write(is_struck, act):
    """Acts in the middle of each file for which `is_struck(number, path)`: half of it is on the disk."""
    from trainer import files

    original, numbers = files.write_synced, itertools.count(1)

    def write(path, data):
        if is_struck(next(numbers), path):
            original(path, data[: len(data) // 2])
            act(path)
        original(path, data)

    files.write_synced = write


def in_write(count):
    """Kills in the middle of the `count`-th file that files.py writes."""
    on_write(lambda number, path: number == count, lambda path: strike(signal.SIGKILL))


def torn_file(name):
    """Kills in the middle of writing a file of this name."""
    on_write(lambda number, path: name in path.name, lambda path: strike(signal.SIGKILL))


def in_save(save, write):
    """Kills in the middle of file `write` of the `save`-th folder that files.py puts in place."""
    on_visit("replace_folder", save, False, lambda: in_write(write))


def full_disk(first):
    """From the `first`-th file on, files.py meets a full disk."""

    def fail(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    on_write(lambda number, path: number >= first, fail)


def at_cpu_time(seconds):
    """Ends the process, as SIGKILL would, when it has computed for so long: a moment no other load can shift."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, seconds)


def say_when_met():
    """Says how long the process has computed when the ranks have met."""
    on_visit("load_corpus", 1, False, lambda: print(f"met at {time.process_time()}", flush=True))


def on_cpu_time(seconds, act):
    """Acts when the process has computed for so long since the ranks have met."""

    def arm():
        signal.signal(signal.SIGPROF, lambda *_: act())
        signal.setitimer(signal.ITIMER_PROF, seconds)

    on_visit("load_corpus", 1, False, arm)


def signal_at_cpu_time(seconds, number, everyone=False):
    """Sends a signal to this rank, or to all, when this one has computed for so long since they have met."""
    on_cpu_time(seconds, lambda: os.killpg(0, number) if everyone else os.kill(os.getpid(), number))


def clock_jump(seconds, days):
    """The clock is set by so many days when the process has computed for so long; monotonic clocks are not."""
    import datetime

    def jump():
        now, now_ns = time.time, time.time_ns
        time.time = lambda: now() + days * 86400
        time.time_ns = lambda: now_ns() + days * 86400 * 10**9

        class Shifted(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return super().now(tz) + datetime.timedelta(days=days)

        datetime.datetime = Shifted

    on_cpu_time(seconds, jump)


def no_figures():
    """Leaves TensorBoard's figures out, to save time."""
    from trainer.reporting.tracking import RunLog

    RunLog.log_confusion_matrix = RunLog.log_residuals = lambda *arguments: None


def log_ids(folder):
    """Appends a line about every micro-batch that trains to <folder>/<rank>.jsonl: step, attempt, ids that count."""
    from pathlib import Path

    path = Path(folder) / f"{os.environ.get('RANK', '0')}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    step, attempt = None, 0

    def stepping(train_step):
        def stepped(run, number, *others):
            nonlocal step, attempt
            step, attempt = number, attempt + 1
            return train_step(run, number, *others)

        return stepped

    def noting(add_gradient):
        def noted(learner, examples, number, ids, weights):
            with path.open("a") as file:
                file.write(json.dumps({"step": step, "attempt": attempt, "ids": ids[weights > 0].tolist()}) + "\n")
            return add_gradient(learner, examples, number, ids, weights)

        return noted

    replace("train_step", stepping)
    replace("add_gradient", noting)


def out_of_memory(above, where="forward"):
    """Memory runs out in "forward", "backward" or "scoring" of a micro-batch of more than `above` tokens.

    It does so when the work is done: what the failed part has left behind, a gradient above all, must not count.
    Scoring is all that has no backward, the check of the finished adapter too.
    """
    import torch

    concerns, too_large = False, False

    def marking(original):
        def marked(*arguments):
            nonlocal concerns
            concerns = True
            try:
                return original(*arguments)
            finally:
                concerns = False

        return marked

    def measuring(collate):
        def measured(*arguments):
            nonlocal too_large
            batch = collate(*arguments)
            too_large = concerns and batch.inputs["input_ids"].numel() > above
            return batch

        return measured

    def ending(original):
        def ended(*arguments, **settings):
            result = original(*arguments, **settings)
            if too_large:
                raise torch.OutOfMemoryError("a test's")
            return result

        return ended

    for place in ("score_micro_batch", "probe") if where == "scoring" else ("add_gradient",):
        replace(place, marking)
    for kind in ("Packed", "Padded"):
        replace(f"trainer.packed.forward:{kind}Forward.collate", measuring)
    forwards = ["trainer.packed.forward:PackedForward.__call__", "peft:PeftModelForSequenceClassification.forward"]
    for work in ["accelerate:Accelerator.backward"] if where == "backward" else forwards:
        replace(work, ending)


def forget_an_example(step):
    """One example of this step does not train."""

    def around(train_step):
        def forgetful(run, number, micro_batches):
            if number == step:
                micro_batches[0].weights[0] = 0
            return train_step(run, number, micro_batches)

        return forgetful

    replace("train_step", around)


def weigh_micro_batches_alike():
    """The gradient is the mean over micro-batches of the mean over each one's examples."""
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
    """Each rank draws its own dropout masks."""
    from trainer.dropout.sites import DropoutKeys

    right = DropoutKeys.__init__
    DropoutKeys.__init__ = lambda self, seed: right(self, seed + int(os.environ.get("RANK", "0")))


def lose_the_head():
    """The final adapter is saved without its head."""
    from safetensors.torch import load_file, save_file

    def around(save_final_adapter):
        def wrong(run, *given):
            save_final_adapter(run, *given)
            path = run.folder / "adapter/adapter_model.safetensors"
            save_file({name: tensor for name, tensor in load_file(path).items() if "classifier" not in name}, path)

        return wrong

    replace("save_final_adapter", around)


def forget_the_optimizer():
    """A resume leaves the optimizer as new."""
    replace("load_optimizer_tensors", lambda right: lambda *given: None)


def no_room_for_a_copy():
    """Memory runs out where the finished adapter is first loaded beside the trained model."""
    calls = itertools.count()

    def around(check_adapter):
        def checked(*given):
            import torch

            if next(calls) == 0:
                raise torch.OutOfMemoryError("a test's")
            check_adapter(*given)

        return checked

    replace("check_adapter", around)


def no_merge():
    """PEFT finds that an adapter cannot be merged."""
    from peft.tuners.lora import LoraModel

    def refused(*_, **__):
        raise RuntimeError("impossible to merge")

    LoraModel.merge_and_unload = refused


def crooked_merge():
    """Merging an adapter gives other weights."""
    from peft.tuners.lora import LoraModel

    merge = LoraModel.merge_and_unload

    def crooked(model, *arguments, **settings):
        merged = merge(model, *arguments, **settings)
        merged.classifier.out_proj.weight.data.mul_(1.1)
        return merged

    LoraModel.merge_and_unload = crooked


def on_host(name):
    """The process takes its machine to be another."""
    import socket

    socket.gethostname = lambda: name


def stderr_left(kind):
    """Stderr is a pipe, or a terminal, of which nobody has the other end."""
    other, end = os.pipe() if kind == "pipe" else os.openpty()
    os.close(other)
    os.dup2(end, 2)
