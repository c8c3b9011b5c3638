"""A rank never fails alone: the others end at once, one of them says why, and the same command finishes the run."""

import os
import re

import pytest

from tests.harness.commands import changed, on_ranks
from tests.harness.data import topic_rows, write_csv
from tests.harness.runs import assert_same, outcome

LESS = ("no_figures",)
LOST = os.EX_TEMPFAIL
SURPRISE = ("error_at_call", "apply_gradient", "ValueError", "a surprise")
AT_ONCE = 10  # seconds; a collective would wait for half an hour
# What fails on which rank, the exit codes of ranks 0 and 1, and what is said of it. A rank that is lost was lost where
# the one that tells it is. One fault after another befalls the same run, so that a fault costs one start.
CHAIN = [
    (1, ("at_call", "tokenize"), [LOST, -9], "rank 1 on HOST was lost in the (preparation|setup)"),
    (1, ("error_at_call", "example_losses", "OSError", "a disk", 7), [2, 2], "rank 1 on HOST: a disk"),
    # after the vote: the other one waits for this one's gradient
    (1, ("at_call", "sum_gradients", 2), [LOST, -9], "rank 1 on HOST was lost in step 5"),
    (1, SURPRISE, [1, 1], "rank 1 on HOST: ValueError: a surprise"),
    (0, ("in_save", 1, 3), [-9, LOST], "rank 0 on HOST was lost in the checkpoint of step 6"),
    (1, ("at_call", "score_micro_batch", 3), [LOST, -9], "rank 1 on HOST was lost in the scoring of"),
    (0, ("at_call", "save_adapter"), [-9, LOST], "rank 0 on HOST was lost in the end"),
]  # fmt: skip


@pytest.fixture(scope="module")
def two(options, tmp_path_factory):
    """What the uninterrupted run of two ranks leaves."""
    place = tmp_path_factory.mktemp("two")
    ranks = on_ranks(2, changed(options, run__output_dir=place), [LESS])
    assert [rank.code for rank in ranks] == [0, 0], ranks[0].stderr
    return outcome(place / "run")


def assert_ended_together(ranks, failed, codes, says):
    """All ranks have ended soon after the one that failed, with these codes, and one of them has said why."""
    said = "".join(rank.stderr for rank in ranks)
    assert [rank.code for rank in ranks] == codes, said
    fault = re.search(r"^fault at (.*)$", ranks[failed].stdout, re.M)
    began = float(fault[1]) if fault else ranks[failed].at
    assert max(rank.at for rank in ranks) - began < AT_ONCE
    (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert re.match(f"error: {says}".replace("HOST", re.escape(f"{ranks[0].host} (127.0.0.1)")), error)
    assert said.count("Traceback") == (1 if 1 in codes else 0), said  # of what nobody has foreseen, by whom it befell


def test_one_rank_after_another_fails(options, two, tmp_path):
    arguments = changed(options, run__output_dir=tmp_path)
    for failed, point, codes, says in CHAIN:
        print(f"rank {failed}: {point}")
        assert_ended_together(on_ranks(2, arguments, [LESS], {failed: [point]}), failed, codes, says)
        assert not (tmp_path / "run" / "summary.json").exists()
    ranks = on_ranks(2, arguments, [LESS])
    assert [rank.code for rank in ranks] == [0, 0], ranks[0].stderr
    assert_same(tmp_path / "run", two)


def test_the_third_rank_hears_of_the_second_through_the_first(options, tmp_path):
    arguments = changed(options, run__output_dir=tmp_path)
    ranks = on_ranks(3, arguments, [LESS], {1: [("error_at_call", "sum_gradients", "UserError", "a mistake")]})
    assert_ended_together(ranks, 1, [2, 2, 2], "rank 1 on HOST: a mistake")


def test_ranks_with_different_data_are_refused(options, tmp_path):
    for name, seed in (("here", 1), ("there", 9)):
        (tmp_path / name).mkdir()
        write_csv(tmp_path / name / "train.csv", topic_rows(61, seed=seed))
    arguments = changed(options, run__output_dir=tmp_path, data__train="train.csv")
    folders = {0: tmp_path / "here", 1: tmp_path / "there"}
    ranks = on_ranks(2, arguments, [LESS], {1: [("on_host", "elsewhere")]}, folders)
    assert [rank.code for rank in ranks] == [2, 2]
    for rank in ranks:  # each on its machine
        (error,) = [line for line in rank.stderr.splitlines() if line.startswith("error: ")]
        digest = r"[0-9a-f]+"
        differ = f"the processes differ in train split: {digest} on {ranks[0].host} .*, {digest} on elsewhere .*"
        assert re.match(f"error: (rank 1 on elsewhere .*: )?{differ}", error)
        assert "Traceback" not in rank.stderr
    assert {path.name for path in tmp_path.glob("run/*")} <= {".lock"}
