"""The gradient of a step is the same however its global batch is shared out; wrong ways to do it are told apart."""

import functools
import json

import numpy as np
import pytest

from tests.harness.data import OTHER_FAMILIES, save_backbone, topic_rows
from tests.harness.ranks import call_on_ranks
from tests.parity.ranks import gradients, plain_gradient

WORLDS = (1, 2, 3, 4)
BATCHES = ((8, 0), (7, 2), (3, 1), (8, 7))  # global batch and step; the last is the tail of an epoch: 5 of 61 examples
WHOLE = 10**6
BUDGETS = (WHOLE, 170, 70, 48, 1)
CASES = tuple((*batch, budget) for batch in BATCHES for budget in BUDGETS)
STEP_IS_GRADIENT = (
    "--optim.name", "sgd", "--optim.learning_rate", "1", "--optim.weight_decay", "0", "--optim.max_grad_norm", "null"
)  # fmt: skip
TOLERANCE = 1e-12


@pytest.fixture(scope="module")
def found(parity_arguments):
    """Results by rank of all cases, for a world size and a dropout; computed once."""

    @functools.cache
    def compute(world_size, dropout, wrong, packed, precision):
        name = f"gradients-{world_size}-{dropout}-{wrong}-{packed}-{precision}"
        arguments = parity_arguments(name, dropout, *STEP_IS_GRADIENT, "--model.packed", packed)
        cases = CASES if wrong is None else CASES[:5]
        return call_on_ranks(world_size, gradients, arguments, cases, wrong, precision)

    return lambda world_size, dropout, wrong=None, packed="true", precision=None: compute(
        world_size, dropout, wrong, packed, precision
    )


def distance(one, other):
    return float(np.abs(one["gradient"] - other["gradient"]).max())


@pytest.mark.parametrize(
    ("world_size", "dropout", "packed"),
    [*((world_size, 0.1, packed) for world_size in WORLDS for packed in ("true", "false")), (2, 0.0, "true")],
)
def test_every_factorisation_gives_one_gradient(found, world_size, dropout, packed):
    ranks = found(world_size, dropout, packed=packed)
    for case in CASES:
        whole = found(1, dropout, packed="false")[0][(*case[:2], WHOLE)]
        assert len(whole["sizes"]) == 1
        assert np.abs(whole["gradient"]).max() > 1e-2
        assert np.count_nonzero(whole["gradient"]) > 0.9 * whole["gradient"].size
        for rank in ranks:
            assert distance(rank[case], whole) < TOLERANCE, case
            assert rank[case]["loss"] == pytest.approx(whole["loss"], rel=TOLERANCE)
            assert rank[case]["norm"] == pytest.approx(whole["norm"], rel=TOLERANCE)
            assert np.linalg.norm(whole["gradient"]) == pytest.approx(rank[case]["norm"], rel=1e-9)


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_two_ranks_give_one_gradient_in_every_packed_family(family, parity_arguments, tmp_path):
    """On one rank see test_packed.py."""
    targets, sizes = OTHER_FAMILIES[family]
    backbone = save_backbone(tmp_path / family, family, **sizes)
    cases = [(*batch, budget) for batch in BATCHES[:2] for budget in (WHOLE, 70)]

    def results(world_size, packed):
        arguments = parity_arguments(
            f"{family}-{world_size}-{packed}", 0.1, *STEP_IS_GRADIENT, "--model.packed", packed,
            "--model.name", backbone, "--peft.target_modules", targets,
        )  # fmt: skip
        return call_on_ranks(world_size, gradients, arguments, cases)

    [padded] = results(1, "false")
    for rank in results(2, "true"):
        for case in cases:
            whole = padded[(*case[:2], WHOLE)]
            assert np.abs(whole["gradient"]).max() > 1e-2
            assert distance(rank[case], whole) < TOLERANCE, case


def relative(result, exact):
    return float(np.linalg.norm(result["gradient"] - exact["gradient"]) / np.linalg.norm(exact["gradient"]))


def test_in_bf16_it_is_the_same_up_to_rounding(found):
    """Which is taken from the padded forward over whole batches on one rank."""
    exact = {batch: found(1, 0.1, packed="false")[0][(*batch, WHOLE)] for batch in BATCHES}
    padded = found(1, 0.1, packed="false", precision="bf16")[0]
    rounding = max(relative(padded[(*batch, WHOLE)], exact[batch]) for batch in BATCHES)
    for world_size in (1, 2):
        for rank in found(world_size, 0.1, precision="bf16"):
            assert max(relative(rank[case], exact[case[:2]]) for case in CASES) < 2.5 * rounding
    wrong = found(2, 0.1, "mean of means", precision="bf16")[0]
    assert max(relative(result, exact[case[:2]]) for case, result in wrong.items()) > 10 * rounding


@pytest.mark.parametrize("world_size", WORLDS)
def test_the_cuts_are_as_various_as_they_should_be(found, world_size):
    ranks = found(world_size, 0.1)
    cuts = [[rank[case]["sizes"] for rank in ranks] for case in CASES]
    assert all(len({len(sizes) for sizes in cut}) == 1 for cut in cuts)
    assert {1, 2} <= {len(cut[0]) for cut in cuts}
    assert any(len(set(sizes)) > 1 for cut in cuts for sizes in cut), "no ragged cut"
    if world_size == 1:
        assert {1, 2, 4, 8} <= {len(cut[0]) for cut in cuts}
    if world_size > 3:
        assert any([0] in cut for cut in cuts), "no global batch smaller than the world"


def test_dropout_was_on(found):
    case = CASES[0]
    assert distance(found(1, 0.0)[0][case], found(1, 0.1)[0][case]) > 1e-3


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_mean_of_means_would_be_rejected(found, world_size):
    whole = found(1, 0.0)[0][CASES[0]]
    differing = [
        case
        for case, result in found(world_size, 0.0, "mean of means")[0].items()
        if distance(result, whole) > 1e9 * TOLERANCE
    ]
    assert len(differing) >= (4 if world_size == 1 else 5) - 1
    if world_size == 1:
        assert CASES[0] not in differing, "one micro-batch on one rank is the one case where the two agree"


@pytest.mark.parametrize(("world_size", "wrong"), [(2, "rank"), (1, "position"), (2, "position")])
def test_dropout_keyed_otherwise_would_be_rejected(found, world_size, wrong):
    whole = found(1, 0.1, wrong)[0][CASES[0]]
    for case, result in found(world_size, 0.1, wrong)[0].items():
        if world_size > 1 or len(result["sizes"]) > 1:
            assert distance(result, whole) > 1e9 * TOLERANCE, case


def test_the_step_is_that_of_torchs_own_loss_and_autograd(found, parity_arguments):
    arguments = parity_arguments("plain", 0.0, *STEP_IS_GRADIENT)
    unweighted = [*arguments, "--optim.class_weights", "null", "--run.name", "unweighted"]
    for batch_size, step in BATCHES[:2]:
        [[(loss, gradient), (weighted_loss, weighted_gradient)]] = call_on_ranks(
            1, plain_gradient, arguments, batch_size, step
        )
        ours = found(1, 0.0)[0][(batch_size, step, 70)]
        assert ours["loss"] == pytest.approx(weighted_loss, rel=TOLERANCE)
        assert np.abs(ours["gradient"] - weighted_gradient).max() < TOLERANCE
        [plain] = call_on_ranks(1, gradients, unweighted, [(batch_size, step, 70)])
        assert plain[(batch_size, step, 70)]["loss"] == pytest.approx(loss, rel=TOLERANCE)
        assert np.abs(plain[(batch_size, step, 70)]["gradient"] - gradient).max() < TOLERANCE
        assert abs(loss - weighted_loss) > 1e-4


OF_TASKS = {
    "multi_label": ("--optim.class_weights", "balanced"),
    "regression": ("--optim.class_weights", "null", "--task.type", "regression", "--task.loss", "huber"),
}


def label_of(task, rows, i):
    """All labels of two examples in a row make one list, and some lists are empty; numbers are of uneven size."""
    if task == "regression":
        return 1000 + 0.37 * i**2 * (-1) ** i
    return [rows[i][1], rows[i - 1][1]] if i % 3 else []


@pytest.mark.parametrize("task", OF_TASKS)
def test_every_task_gives_one_gradient_too(parity_arguments, tmp_path, task):
    for name, seed, count in (("train", 1, 61), ("validation", 3, 13)):
        rows = topic_rows(count, seed)
        content = [{"text": text, "label": label_of(task, rows, i)} for i, (text, _) in enumerate(rows)]
        (tmp_path / f"{name}.json").write_text(json.dumps(content))

    def results(world_size, packed, wrong=None):
        arguments = parity_arguments(
            f"{task}-{world_size}-{packed}-{wrong}", 0.1, *STEP_IS_GRADIENT, "--model.packed", packed,
            "--data.train", tmp_path / "train.json", "--data.validation", tmp_path / "validation.json",
            "--optim.label_smoothing", "0", *OF_TASKS[task],
        )  # fmt: skip
        return call_on_ranks(world_size, gradients, arguments, CASES[:5], wrong)

    whole = results(1, "false")[0][CASES[0]]
    assert len(whole["sizes"]) == 1 and np.abs(whole["gradient"]).max() > 1e-3
    for world_size, packed in ((1, "true"), (2, "true"), (2, "false")):
        for rank in results(world_size, packed):
            assert max(distance(result, whole) for result in rank.values()) < TOLERANCE
            assert all(result["loss"] == pytest.approx(whole["loss"], rel=TOLERANCE) for result in rank.values())
    wrong = results(2, "true", "mean of means")[0]
    assert sum(distance(result, whole) > 1e6 * TOLERANCE for result in wrong.values()) >= 2


def test_all_weights_without_an_adapter_have_one_gradient(parity_arguments):
    def results(world_size, packed, wrong=None):
        arguments = parity_arguments(f"plain-{world_size}-{packed}-{wrong}", 0.1, *STEP_IS_GRADIENT)
        arguments += ["--model.packed", packed, "--peft.peft_type", "none"]
        for option in ("r", "target_modules", "lora_dropout", "init_lora_weights"):
            arguments += [f"--peft.{option}", "null"]
        return call_on_ranks(world_size, gradients, arguments, CASES[:3], wrong)

    whole = results(1, "false")[0][CASES[0]]
    assert len(whole["sizes"]) == 1 and np.abs(whole["gradient"]).max() > 1e-3
    for rank in results(2, "true"):
        assert max(distance(result, whole) for result in rank.values()) < TOLERANCE
    wrong = results(2, "true", "mean of means")[0]
    assert max(distance(result, whole) for result in wrong.values()) > 1e6 * TOLERANCE
