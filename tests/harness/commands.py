"""Starts the commands of trainer/ as a user types them: from the fork server, on one rank or several."""

import importlib
import os
import subprocess
import sys

from tests.harness import faults
from tests.harness.processes import ROOT, free_port, rank_environment, start_process, wait_all

ENTRIES = ("run", "predict", "export", "report", "verification/ranks")


def import_entries():
    """The module of each command; importing them is what the fork server saves."""
    return {name: importlib.import_module(f"trainer.{name.replace('/', '.')}") for name in ENTRIES}


def _run_entry(end, entry, arguments, points, report):
    """What the end of trainer/<entry>.py does, in a forked process."""
    import trainer.reporting.page
    from trainer.errors import main_guard

    if not report:
        trainer.reporting.page.build_report = lambda folder, summary: folder / "report.html"
    for name, *given in points:
        getattr(faults, name)(*given)
    sys.argv = [f"trainer/{entry}.py", *arguments]
    return main_guard(import_entries()[entry].main)


def start(entry, arguments, points=(), report=False, env=None, **place):
    """Starts trainer/<entry>.py with these arguments.

    `points` are calls of faults.py made before it begins; without `report` run.py's report is left out, to save time.
    `place` is as of `start_process`.
    """
    words, points = [str(argument) for argument in arguments], [list(point) for point in points]
    return start_process(_run_entry, entry, words, points, report, environment=env, **place)


def command(*request, **settings):
    """Runs trainer/<entry>.py to its end; arguments as of `start`."""
    return start(*request, **settings).wait()


def start_ranks(world_size, arguments, points=(), only=None, folders=None, local_world_size=None, entry="run"):
    """Starts trainer/<entry>.py on several ranks of one machine, without a launcher that could hide how they end.

    `points` hold on all ranks; `only` has those of single ranks, and `folders` the folders they work in, by rank.
    They believe that `local_world_size` of them are on a machine.
    """
    port, ranks = free_port(), []
    for rank in range(world_size):
        ranks.append(
            start(
                entry,
                arguments,
                [*points, *(only or {}).get(rank, ())],
                env=rank_environment(rank, world_size, port, local_world_size),
                folder=(folders or {}).get(rank, ROOT),
                first=ranks[0] if ranks else None,
            )
        )
    return ranks


def on_ranks(*request, **settings):
    """Runs trainer/<entry>.py on several ranks to its end; arguments as of `start_ranks`."""
    return wait_all(start_ranks(*request, **settings))


def run_script(script, arguments, launcher=(), **settings):
    """Runs `python [launcher] trainer/<script>` as a user would; returns the finished process with its output."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, *launcher, ROOT / "trainer" / script, *arguments]
    return subprocess.run(
        list(map(str, line)), capture_output=True, text=True, env=environment, timeout=240, **settings
    )


def changed(arguments, **options):
    """The arguments with some options' values changed or added; `a__b` stands for --a.b, None drops it."""
    result = list(map(str, arguments))
    for name, value in options.items():
        option = "--" + name.replace("__", ".")
        if option in result:
            at = result.index(option)
            del result[at : at + 2]
        if value is not None:
            result += [option, str(value)]
    return result
