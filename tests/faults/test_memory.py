"""Memory that runs out changes how a step is cut into parts, on all ranks, and never what is trained."""

import json
import re
import shutil
import signal

import pytest

from tests.harness.commands import changed, command, on_ranks
from tests.harness.runs import assert_each_once, checkpoints, distance, trained_ids
from trainer.training.checkpoint import read_checkpoint

LESS = ("no_figures",)
SETTINGS = {"optim__learning_rate": "1e-3", "checkpoint__every_steps": 4, "tracking__every_steps": 1}
BUDGET = 100  # of OPTIONS
ABOVE = 60  # the longest example has less, the largest micro-batch of every step more
SAYS = re.compile(r"step (\d+): out of memory; continuing with at most (\d+) tokens at a time")
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def small(options):
    return changed(options, **SETTINGS)


@pytest.fixture(scope="module")
def expected(small, tmp_path_factory):
    """Run folder of the run that has memory enough, on one rank."""
    place = tmp_path_factory.mktemp("expected")
    ended = command("run", changed(small, run__output_dir=place), [LESS])
    assert ended.code == 0, ended.stderr
    return place / "run"


@pytest.fixture(scope="module")
def _short(small, tmp_path_factory):
    place = tmp_path_factory.mktemp("short")
    points = [
        LESS,
        ("log_ids", str(place / "ids-0")),
        ("out_of_memory", ABOVE),
        ("at_call", "apply_gradient", 7),
    ]
    ended = command("run", changed(small, run__output_dir=place), points)
    assert ended.code == -signal.SIGKILL, ended.stderr
    return place, ended


@pytest.fixture
def short(_short, small, tmp_path):
    """Where a run that had too little memory was killed in step 7, behind a checkpoint; its arguments; how it ended."""
    place = shutil.copytree(_short[0], tmp_path / "short")
    return place, changed(small, run__output_dir=place), _short[1]


def budgets(folder):
    """The token budget that was in force in each step."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["memory/max_tokens"] for line in lines if "memory/max_tokens" in line}


def saved_budget(checkpoint):
    return json.loads((checkpoint / "trainer_state.json").read_text())["train"]["max_tokens"]


def assert_went_on(folder, ranks, expected):
    """The run said once that memory had run out, and ended where it ends with enough; returns step and new budget."""
    assert [rank.code for rank in ranks] == [0] * len(ranks), ranks[0].stderr
    said = "".join(rank.stderr for rank in ranks)
    assert "Traceback" not in said
    [(step, budget)] = SAYS.findall(said)
    assert distance(folder, expected) < TOLERANCE
    return int(step), int(budget)


def test_a_smaller_budget_is_kept_by_a_continuation(short, expected):
    place, arguments, before = short
    folder = place / "run"
    [(step, budget)] = SAYS.findall(before.stderr)
    assert step == "1"
    assert BUDGET // 4 <= int(budget) < ABOVE
    (saved,) = checkpoints(folder)
    assert saved_budget(saved) == int(budget)

    ended = command("run", arguments, [LESS, ("log_ids", str(place / "ids-1"))])
    assert ended.code == 0, ended.stderr
    assert "continuing after step 4 of 12" in ended.stderr
    assert "out of memory" not in ended.stderr
    assert budgets(folder) == dict.fromkeys(range(1, 13), int(budget))
    assert saved_budget(checkpoints(folder)[-1]) == int(budget)
    assert_each_once(trained_ids([place / "ids-0", place / "ids-1"]), folder)
    assert distance(folder, expected) < TOLERANCE


def test_another_configured_budget_is_tried(short, expected):
    place, arguments, before = short
    folder = place / "run"
    [(_, budget)] = SAYS.findall(before.stderr)
    ended = command("run", changed(arguments, batch__max_tokens=90), [LESS])
    assert ended.code == 0, ended.stderr
    assert budgets(folder) == {step: int(budget) if step <= 4 else 90 for step in range(1, 13)}
    assert saved_budget(checkpoints(folder)[-1]) is None
    assert distance(folder, expected) < TOLERANCE


@pytest.mark.parametrize(("where", "hit"), [("forward", (0, 1)), ("backward", (1,))])
def test_on_two_ranks(where, hit, small, expected, tmp_path):
    arguments, log = changed(small, run__output_dir=tmp_path), ("log_ids", str(tmp_path / "ids"))
    short = {rank: [("out_of_memory", ABOVE, where)] for rank in hit}
    ranks = on_ranks(2, arguments, [LESS, log], short)
    step, budget = assert_went_on(tmp_path / "run", ranks, expected)
    assert budgets(tmp_path / "run") == {number: budget if number >= step else BUDGET for number in range(1, 13)}
    assert_each_once(trained_ids([tmp_path / "ids"]), tmp_path / "run")


def test_in_scoring_on_one_of_two_ranks(small, expected, tmp_path):
    arguments = changed(small, run__output_dir=tmp_path, batch__max_tokens=ABOVE)
    ranks = on_ranks(2, arguments, [LESS], {1: [("out_of_memory", 3, "scoring")]})
    assert [rank.code for rank in ranks] == [2, 2]
    said = "".join(rank.stderr for rank in ranks)
    assert "Traceback" not in said
    assert re.search(r"out of memory with a single example of \d+ tokens; use a lower data.max_length", said)
    ranks = on_ranks(2, arguments, [LESS], {1: [("out_of_memory", ABOVE, "scoring")]})
    assert [rank.code for rank in ranks] == [0, 0], ranks[0].stderr
    assert "validation: out of memory; continuing with at most" in "".join(rank.stderr for rank in ranks)
    assert distance(tmp_path / "run", expected) < TOLERANCE


def test_not_even_one_example(short):
    place, arguments, _ = short
    (saved,) = checkpoints(place / "run")
    files = {path.name: path.read_bytes() for path in saved.iterdir()}
    ranks = on_ranks(2, arguments, [LESS], {1: [("out_of_memory", 3, "backward")]})
    assert [rank.code for rank in ranks] == [2, 2]
    said = "".join(rank.stderr for rank in ranks)
    assert "Traceback" not in said
    (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert re.search(r"step 5: out of memory with a single example of \d+ tokens; a lower data.max_length", error)
    assert read_checkpoint(saved).step == 4
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == files


def test_an_example_that_does_not_train_is_noticed(small, expected, tmp_path):
    arguments = changed(small, run__output_dir=tmp_path)
    ended = command("run", arguments, [LESS, ("forget_an_example", 5), ("log_ids", str(tmp_path / "ids"))])
    assert ended.code == 0, ended.stderr
    print(distance(tmp_path / "run", expected))
    assert distance(tmp_path / "run", expected) > 100 * TOLERANCE
    with pytest.raises(AssertionError, match="epoch of steps 1 to 6"):
        assert_each_once(trained_ids([tmp_path / "ids"]), tmp_path / "run")
