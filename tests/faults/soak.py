"""Breaks short runs of two ranks, each in one way at a random moment, types the same command again, and compares.

    python -m tests.faults.soak --rounds 200 --seed 1

A run is lost where the command does not finish it, and diverged where it ends in other bytes than undisturbed.
"""

import argparse
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.harness.commands import changed, on_ranks
from tests.harness.data import OPTIONS, save_backbone, topic_rows, write_csv
from tests.harness.runs import assert_same, checkpoints, outcome

LOST, STOPPED = 75, 128 + signal.SIGTERM
ENDS_AT_ONCE = 10  # seconds in which the others follow a rank that fails


class Failure(Exception):
    """A command ended otherwise than it should."""


@dataclass
class Round:
    """One run that something happens to."""

    chooser: random.Random
    place: Path
    arguments: list
    seconds: list
    """processor time of each rank in an undisturbed run, after the ranks have met"""
    num_bytes: int
    """of an undisturbed run's folder"""

    @property
    def folder(self):
        return self.place / "run"

    def moment(self, since):
        """A rank, and a moment on it: a random part of its processor time, at least `since`; and both in words."""
        rank, part = self.chooser.randrange(2), self.chooser.uniform(since, 1)
        seconds = part * self.seconds[rank]
        return rank, seconds, f"rank {rank} at {part:4.0%}"

    def type(self, *expected, only=None):
        """Types the command, which is to end with one of the `expected` pairs of exit codes, or well."""
        ranks = on_ranks(2, self.arguments, [("no_figures",)], only)
        codes, said = [rank.code for rank in ranks], "".join(rank.stderr for rank in ranks)
        if codes not in [[0, 0], *expected]:
            raise Failure(f"exit codes {codes}\n{said[-2000:]}")
        if any(codes) and abs(ranks[0].at - ranks[1].at) > ENDS_AT_ONCE:
            raise Failure(f"one rank ended {abs(ranks[0].at - ranks[1].at):.0f} s behind the other")


# --- what may happen: each does it and says when ----------------------------------------------------------------------


def signalled(run, number, everyone, since=0.0):
    rank, seconds, words = run.moment(since)
    codes = [[STOPPED] * 2]
    if number == signal.SIGKILL:
        codes = [[-9, -9]] if everyone else [[-9, LOST], [-9, 0]] if rank == 0 else [[LOST, -9], [0, -9]]
    run.type(*codes, only={rank: [("signal_at_cpu_time", seconds, number, everyone)]})
    return words


def one_rank_killed(run):
    return signalled(run, signal.SIGKILL, False)


def all_ranks_killed(run):
    return signalled(run, signal.SIGKILL, True)


def sigterm_to_one(run):
    return signalled(run, signal.SIGTERM, False)


def sigterm_to_all(run):
    return signalled(run, signal.SIGTERM, True)


def disk_full(run):
    left = run.chooser.randrange(run.num_bytes)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={2 * run.num_bytes}", "tmpfs", str(run.place)]
    if subprocess.run(mount, capture_output=True).returncode:  # no right to: the disk is full in checkpoint.py only
        file = run.chooser.randrange(1, 25)
        run.type([2, 2], only={0: [("full_disk", file)]})
        return f"at file {file}"
    filler = run.place / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(run.place).free - left))
    run.type([2, 2])
    run.type([2, 2])  # still no room, and still nothing lost
    filler.unlink()
    return f"after {left / run.num_bytes:.0%} of its bytes"


def killed_and_damaged(run, damage):
    """Kills, and damages a file of the newest checkpoint; a young run has none, and an ended one needs none."""
    words = signalled(run, signal.SIGKILL, run.chooser.random() < 0.5, since=0.7)
    saved = checkpoints(run.folder)
    if not saved or (run.folder / "summary.json").exists():
        return f"{words}, no damage"
    path = run.chooser.choice(sorted(saved[-1].iterdir()))
    damage(path)
    return f"{words}, {path.name}"


def byte_flipped(run):
    def flip(path):
        data = bytearray(path.read_bytes())
        data[run.chooser.randrange(len(data))] ^= 1 << run.chooser.randrange(8)
        path.write_bytes(data)

    return killed_and_damaged(run, flip)


def file_missing(run):
    return killed_and_damaged(run, Path.unlink)


def file_cut(run):
    def cut(path):
        data = path.read_bytes()
        path.write_bytes(data[: run.chooser.randrange(len(data))])

    return killed_and_damaged(run, cut)


def leftovers(run):
    """Kills, and adds what writers killed at other moments leave: half of a file beside the whole one from before."""
    words = signalled(run, signal.SIGKILL, run.chooser.random() < 0.5)
    if (run.folder / "summary.json").exists():  # a finished run has no writers
        return words
    run.folder.mkdir(exist_ok=True)
    (run.folder / ".lock").write_text("1\n")
    (run.folder / ".unfinished-config.yaml").write_text("run:\n  na")
    halves = {"environment.json": ".unfinished-environment.json", "metrics.jsonl": ".unfinished-metrics.jsonl"}
    for whole, half in halves.items():
        if (run.folder / whole).exists():
            (run.folder / half).write_text('{"half": ')
    for saved in checkpoints(run.folder):
        for name in (f".unfinished-{saved.name}", f".unfinished-old-{saved.name}"):
            shutil.rmtree(saved.with_name(name), ignore_errors=True)
            shutil.copytree(saved, saved.with_name(name))
            (saved.with_name(name) / "manifest.json").unlink()
    return words


def clock_jumps(run):
    """By a day, on one rank or on both; nothing else happens."""
    days, ranks = run.chooser.choice([-1, 1]), run.chooser.choice([[0], [1], [0, 1]])
    _, seconds, words = run.moment(0)
    run.type(only={rank: [("clock_jump", seconds, days)] for rank in ranks})
    return f"{days:+} day on ranks {ranks}, {words}"


FAULTS = [one_rank_killed, all_ranks_killed, sigterm_to_one, sigterm_to_all, disk_full]
FAULTS += [byte_flipped, file_missing, file_cut, leftovers, clock_jumps]


# --- the rounds -------------------------------------------------------------------------------------------------------


def soak(backbone, place, rounds, seed):
    """Prints a line a round; returns how many runs were lost and how many diverged."""
    print(f"seed {seed}", flush=True)
    chooser = random.Random(seed)
    write_csv(place / "train.csv", topic_rows(40, seed=1))
    write_csv(place / "test.csv", topic_rows(9, seed=2))
    data = {"data__train": place / "train.csv", "data__test": place / "test.csv"}
    few = {"batch__max_tokens": 150, "batch__eval_max_tokens": 300, "checkpoint__every_steps": 2}
    options = changed([], model__name=backbone, **data, **OPTIONS | few)
    for name in ("reference", "again"):  # the second time is timed, with caches filled as in all that follow
        ranks = on_ranks(2, changed(options, run__output_dir=place / name), [("no_figures",), ("say_when_met",)])
        assert [rank.code for rank in ranks] == [0, 0], ranks[0].stderr
    undisturbed = place / "again" / "run"
    reference = outcome(place / "reference" / "run")
    assert_same(undisturbed, reference)
    met = [float(re.search(r"^met at (.*)$", rank.stdout, re.M)[1]) for rank in ranks]
    seconds = [rank.cpu_seconds - before for rank, before in zip(ranks, met, strict=True)]
    num_bytes = 512 * sum(path.stat().st_blocks for path in undisturbed.rglob("*"))
    order, lost, diverged = [], 0, 0
    for number in range(1, rounds + 1):
        order = order or chooser.sample(FAULTS, len(FAULTS))  # each as often as the others
        fault, room = order.pop(), place / f"round-{number}"
        room.mkdir()
        run = Round(chooser, room, changed(options, run__output_dir=room), seconds, num_bytes)
        began, when, said = time.monotonic(), "", "same"
        try:
            when = f"{fault(run)}, {progress(run.folder)}"
            run.type()
            try:
                assert_same(run.folder, reference)
            except (AssertionError, OSError, ValueError) as difference:
                diverged, said = diverged + 1, f"DIVERGED: {difference}"
        except (Failure, TimeoutError) as failure:
            lost, said = lost + 1, f"LOST: {failure}"
        what = fault.__name__.replace("_", " ")
        print(f"{number:4}  {what:16}  {when:60}  {time.monotonic() - began:4.1f} s  {said}", flush=True)
        _remove(room)
    print(f"rounds {rounds}, lost {lost}, diverged {diverged}", flush=True)
    return lost, diverged


def progress(folder):
    """How far a run has come."""
    if (folder / "summary.json").exists():
        return "finished"
    saved = checkpoints(folder)
    return f"{saved[-1].name} saved" if saved else "nothing saved"


def _remove(room):
    if room.is_mount():
        subprocess.run(["umount", "-l", str(room)], check=True)
    shutil.rmtree(room)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=20)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="isotrain-soak-") as place:
        backbone = save_backbone(Path(place) / "tiny-roberta")
        return int(any(soak(backbone, Path(place), asked.rounds, asked.seed)))


if __name__ == "__main__":
    sys.exit(main())
