"""Faults put into a process before its command begins: signals at a chosen point, a full disk, a broken tracker.

Each function patches the program in the process it is called in; all arguments are plain JSON values.
"""

import importlib
import os
import signal
import sys


def strike(number):
    os.kill(os.getpid(), number)
    if number != signal.SIGKILL:
        return
    signal.pause()


def at_call(place, count=1, number=signal.SIGKILL, after=False):
    """Sends the process a signal at the `count`-th call of `place`, before or after it.

    `place` is the name of a function of trainer/, or "module:name" of any other.
    """
    calls = 0

    def around(original):
        def struck(*arguments, **settings):
            nonlocal calls
            calls += 1
            mine = calls
            if mine == count and not after:
                strike(number)
            result = original(*arguments, **settings)
            if mine == count and after:
                strike(number)
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


def in_write(count, number=signal.SIGKILL):
    """Kills in the middle of the `count`-th file that checkpoint.py writes: half of it is on the disk."""
    from trainer import checkpoint

    original = checkpoint._write_synced
    calls = 0

    def struck(path, data):
        nonlocal calls
        calls += 1
        if calls == count:
            original(path, data[: len(data) // 2])
            strike(number)
        original(path, data)

    checkpoint._write_synced = struck


def in_save(save, write, number=signal.SIGKILL):
    """Kills in the middle of file `write` of the `save`-th folder that checkpoint.py puts in place (0: before any)."""
    calls = 0

    def around(original):
        def struck(target, files):
            nonlocal calls
            calls += 1
            if calls == save:
                in_write(write, number) if write else strike(number)
            original(target, files)

        return struck

    replace("replace_folder", around)


def full_disk(first):
    """From the `first`-th file on, checkpoint.py meets a full disk."""
    import errno

    from trainer import checkpoint

    original = checkpoint._write_synced
    calls = 0

    def full(path, data):
        nonlocal calls
        calls += 1
        if calls >= first:
            original(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        original(path, data)

    checkpoint._write_synced = full


def at_cpu_time(seconds):
    """Ends the process, as SIGKILL would, when it has computed for so long: a moment no other load can shift."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, seconds)


def no_figures():
    """Leaves TensorBoard's figures out, to save time."""
    from trainer.tracking import RunLog

    RunLog.confusion_matrix = lambda *arguments: None


def torn_file(name, number=signal.SIGKILL):
    """Kills in the middle of writing a file of this name: half of it is on the disk."""
    from pathlib import Path

    from trainer import checkpoint

    write_text, write_synced = Path.write_text, checkpoint._write_synced

    def text(path, data, *arguments, **settings):
        if name in path.name:
            write_text(path, data[: len(data) // 2], *arguments, **settings)
            strike(number)
        return write_text(path, data, *arguments, **settings)

    def synced(path, data):
        if name in path.name:
            write_synced(path, data[: len(data) // 2])
            strike(number)
        write_synced(path, data)

    Path.write_text, checkpoint._write_synced = text, synced


def crooked_merge():
    """Merging an adapter gives other weights."""
    from peft.tuners.lora import LoraModel

    merge = LoraModel.merge_and_unload

    def crooked(model, *arguments, **settings):
        merged = merge(model, *arguments, **settings)
        merged.classifier.out_proj.weight.data.mul_(1.1)
        return merged

    LoraModel.merge_and_unload = crooked
