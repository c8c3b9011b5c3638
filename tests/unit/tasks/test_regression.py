"""Numbers for a text: how files hold them, when a task is regression, its metrics against scipy, what is refused."""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy import stats
from sklearn import metrics as sklearn_metrics

from tests.harness.data import write_csv, write_labelled
from trainer.config.schema import DataConfig, OptimConfig, Source, TaskConfig
from trainer.data.corpus import load_corpus, load_for_prediction
from trainer.errors import UserError
from trainer.model.adapter import load_task
from trainer.tasks import make_task
from trainer.tasks.regression import fit, ranks, read_number, strata
from trainer.tasks.task import measure

REGRESSION = TaskConfig("regression")
NUMBERS = [3.75, -2.0, 0.001, 1e-7, 250.0]
NAMES = ["price", "depth"]
CONSTANTS = {"mean": {"price": 100.0, "depth": -1.0}, "scale": {"price": 20.0, "depth": 0.25}}


@pytest.fixture(autouse=True)
def own_cache(cache):
    """Each test with its own cache."""


def load(path, task=REGRESSION, **settings):
    config = DataConfig(train=str(path), **{"validation_fraction": 0.0, **settings})
    return load_corpus(config, task, 1, quiet=True)


def refused(path, task=REGRESSION, **settings):
    with pytest.raises(UserError) as refusal:
        load(path, task, **settings)
    assert len(str(refusal.value).splitlines()) == 1
    return str(refusal.value)


def columns(path, rows, names=NAMES):
    return write_csv(path, [(f"text {i}", *row) for i, row in enumerate(rows)], ("text", *names))


# --- targets in files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.csv", "x.json", "x.jsonl", "x.parquet"])
def test_numbers_are_read_exactly(tmp_path, name):
    corpus = load(write_labelled(tmp_path / name, NUMBERS))
    assert corpus.label_names == ["label"] and corpus.splits["train"].targets.tolist() == [[n] for n in NUMBERS]
    assert corpus.constants["mean"]["label"] == pytest.approx(np.mean(NUMBERS), rel=1e-15)
    assert corpus.constants["scale"]["label"] == pytest.approx(np.std(NUMBERS), rel=1e-15)


def test_columns_are_found_by_name_and_else_by_place(tmp_path):
    train = columns(tmp_path / "x.csv", [(1, 0.5), (2, 0.25)])
    turned = Source(str(columns(tmp_path / "y.csv", [(3, 4)], ["depth", "price"])), label_columns=["depth", "price"])
    renamed = Source(str(columns(tmp_path / "z.csv", [(3, 4)], ["p", "d"])), label_columns=["p", "d"])
    corpus = load(train, TaskConfig(), label_columns=NAMES, validation=turned, test=renamed)
    assert corpus.task.type == "regression" and corpus.label_names == NAMES
    assert [split.targets.tolist() for split in corpus.splits.values()] == [[[1, 0.5], [2, 0.25]], [[4, 3]], [[3, 4]]]
    few = Source(str(tmp_path / "y.csv"), label_column="price")
    assert "train has 2" in refused(train, label_columns=NAMES, test=few)


@pytest.mark.parametrize("cell", ["nan", "inf", "-Infinity", "1e999", "1e101", "Sports", "3,7", "1_000", "true", "٣"])
def test_what_is_not_a_finite_number_is_refused_with_its_row(tmp_path, cell):
    said = refused(write_labelled(tmp_path / "x.csv", ["1.5", "2", cell]))
    assert all(word in said for word in ("x.csv", "row 3", "'label'", repr(cell), "finite number"))
    said = refused(columns(tmp_path / "y.csv", [(1, 2), (2, cell)]), label_columns=NAMES)
    assert all(word in said for word in ("row 2", "'depth'", repr(cell)))


def test_missing_numbers_and_lists_are_refused(tmp_path):
    rows = pa.table({"text": ["a", "b"], "label": pa.array([1.5, float("nan")])})
    pq.write_table(rows, tmp_path / "x.parquet")
    for path in (tmp_path / "x.parquet", write_labelled(tmp_path / "x.csv", ["1.5", ""])):
        assert "row 2" in refused(path)
    assert "row 2: column 'depth' holds nothing" in refused(
        columns(tmp_path / "y.csv", [(1, 2), (2, "")]), label_columns=NAMES
    )
    assert "row 1: column 'label' holds a list" in refused(write_labelled(tmp_path / "x.json", [[1.5], [2.5]]))


def test_one_number_in_all_rows_trains_no_model(tmp_path):
    said = refused(write_labelled(tmp_path / "x.csv", [0.1] * 5))
    assert "one number, 0.1" in said and "'label'" in said
    assert "'depth'" in refused(columns(tmp_path / "y.csv", [(1, 2), (2, 2)]), label_columns=NAMES)


def test_names_of_classes_are_refused(tmp_path):
    assert "label_names" in refused(write_labelled(tmp_path / "x.csv", [1, 2]), label_names=["a", "b"])


def test_the_input_of_a_prediction(tmp_path):
    task, run = make_task(REGRESSION), DataConfig(train="x")
    path = write_labelled(tmp_path / "x.csv", ["1.5", "many"])
    with pytest.raises(UserError, match=r"^--input.*row 2.*'many'.*--ignore_labels true"):
        load_for_prediction(Source(str(path)), run, task, ["label"], None)
    split, _, _ = load_for_prediction(Source(str(path)), run, task, ["label"], None, ignore_labels=True)
    assert split.targets is None


@pytest.mark.parametrize(
    ("text", "number"),
    [("1", 1.0), ("-.5", -0.5), ("+2.", 2.0), ("1e-3", 1e-3), ("", None), (".", None), ("0x1", None)],
)
def test_spellings_of_numbers(text, number):
    assert read_number(text) == number


# --- which task the labels show ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        ([i % 4 for i in range(40)], "single_label"),
        ([1 + i % 5 for i in range(40)], "single_label"),
        ([(-1) ** i for i in range(40)], "single_label"),
        ([f"class {i % 30}" for i in range(60)], "single_label"),
        ([i + 0.5 for i in range(30)], "regression"),
        ([round(i * 0.37, 2) for i in range(8)], "regression"),
        ([*(i + 0.5 for i in range(30)), 7, 8], "regression"),
    ],
)
def test_the_labels_show_the_task(tmp_path, labels, found):
    assert load(write_labelled(tmp_path / "x.csv", labels), TaskConfig()).task.type == found


def test_a_cell_without_a_number_does_not_change_the_task(tmp_path):
    assert "row 31: column 'label' holds 'nan'" in refused(
        write_labelled(tmp_path / "x.csv", [*(i + 0.5 for i in range(30)), "nan"]), TaskConfig()
    )


@pytest.mark.parametrize("labels", [[0.5, 1, 1.5, 2, 2.5] * 6, [i % 25 for i in range(60)], list(range(18, 60))])
def test_numbers_that_may_be_classes_need_a_choice(tmp_path, labels):
    path = write_labelled(tmp_path / "x.csv", labels)
    said = refused(path, TaskConfig())
    assert all(f"--task.type {name}" in said for name in ("single_label", "regression")) and "'label'" in said
    assert load(path, TaskConfig("single_label")).task.type == "single_label"
    assert load(path, TaskConfig(loss="huber")).task.type == "regression"
    if len(set(labels)) < len(labels):
        names = {str(label): f"class {label}" for label in labels}
        assert load(path, TaskConfig(), label_names=names).task.type == "single_label"


def test_columns_of_bits_and_of_numbers(tmp_path):
    path = columns(tmp_path / "x.csv", [(1, 0.5), (0, 0.25), (1, 2)])
    said = refused(path, TaskConfig(), label_columns=NAMES)
    assert all(f"--task.type {name}" in said for name in ("multi_label", "regression"))
    assert "row 1: column 'depth' holds '0.5'" in said
    amounts = [(i + 0.5, i / 4) for i in range(1, 30)]
    said = refused(columns(tmp_path / "y.csv", [*amounts, (1.5, "")]), TaskConfig(), label_columns=NAMES)
    assert "row 30: column 'depth' holds nothing; task.type regression" in said
    bits = [(i % 2, 1) for i in range(30)]
    said = refused(columns(tmp_path / "z.csv", [*bits, ("", 0)]), TaskConfig(), label_columns=NAMES)
    assert "row 31: column 'price' holds ''" in said and "0 or 1" in said
    assert load(path, label_columns=NAMES).splits["train"].targets.tolist() == [[1, 0.5], [0, 0.25], [1, 2]]


# --- hold-out ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "fraction"), [(400, 0.1), (41, 0.1), (60, 0.3)])
def test_the_hold_out_has_its_share_of_every_size(tmp_path, count, fraction):
    numbers = np.random.default_rng(0).lognormal(0, 2, count).round(4)
    corpus = load(write_labelled(tmp_path / "x.csv", numbers.tolist()), validation_fraction=fraction)
    held = np.sort(corpus.splits["validation"].targets[:, 0])
    assert len(held) == pytest.approx(fraction * count, abs=1)
    places = np.searchsorted(np.sort(numbers), held) / count
    # in every tenth, as many as its share, up to one
    for tenth in range(1, 11):
        assert (places < tenth / 10).sum() == pytest.approx(fraction * count * tenth / 10, abs=1.5)
    assert corpus.constants == fit(corpus.splits["train"].targets, ["label"]), "of train alone"


def test_the_groups_of_the_hold_out_take_ties_together():
    groups = strata(np.array([[0.0]] * 7 + [[1.0]] * 3))
    assert len({tuple(row) for row in groups[:7].tolist()}) == 1 and groups[:, -1].all()


# --- loss and metrics -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "theirs"),
    [("squared_error", torch.nn.MSELoss(reduction="none")), ("huber", torch.nn.HuberLoss(reduction="none"))],
)
def test_the_loss_is_torchs_in_standardized_units(name, theirs):
    task = make_task(TaskConfig("regression", loss=name), CONSTANTS)
    logits = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    targets = np.array([[100 + 20 * i, -1 + 0.25 * i * i] for i in range(6)])
    wanted = torch.tensor([[i, i * i] for i in range(6)], dtype=torch.float64)
    found = task.make_losses(OptimConfig(), targets, NAMES)(logits, torch.from_numpy(targets))
    assert found.tolist() == pytest.approx(theirs(logits, wanted).mean(dim=1).tolist(), rel=1e-12)
    assert task.metrics["loss"].function(logits.numpy(), targets) == pytest.approx(found.mean().item(), rel=1e-12)


@pytest.mark.parametrize(
    ("optim", "word"), [({"label_smoothing": 0.1}, "label_smoothing: 0.1"), ({"class_weights": "balanced"}, "classes")]
)
def test_options_for_classes_are_refused(optim, word):
    with pytest.raises(UserError, match=word):
        make_task(REGRESSION).make_losses(OptimConfig(**optim), np.zeros((2, 1)), ["x"])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("digits", [0, 9], ids=["ties", "no ties"])
def test_metrics_against_scipy_and_scikit_learn(digits):
    generator = np.random.default_rng(3)
    logits = generator.normal(size=(50, 2)).astype(np.float32)
    targets = (np.array([100, -1]) + np.array([20, 0.25]) * generator.normal(size=(50, 2)) + logits).round(digits)
    predicted = logits.astype(float) * [20, 0.25] + [100, -1]
    measured = measure(make_task(REGRESSION, CONSTANTS), logits, targets, NAMES)
    for i, name in enumerate(NAMES):
        true, ours = targets[:, i], predicted[:, i]
        assert measured["per_class"][name] == pytest.approx(
            {
                "mse": sklearn_metrics.mean_squared_error(true, ours),
                "mae": sklearn_metrics.mean_absolute_error(true, ours),
                "pearson": stats.pearsonr(true, ours).statistic,
                "spearman": stats.spearmanr(true, ours).statistic,
                "r2": sklearn_metrics.r2_score(true, ours),
            },
            rel=1e-9,
        )
    for score in ("mse", "mae", "pearson", "spearman", "r2"):
        assert measured[score] == pytest.approx(np.mean([row[score] for row in measured["per_class"].values()]))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("logits", "targets", "r2"),
    [([1.0], [1.0], 1.0), ([2.0], [1.0], 0.0), ([0.1, 0.1, 0.1], [0.1, 0.2, 0.3], -1.5), ([1.0, 2.0], [3.0, 3.0], 0.0)],
)
def test_what_is_undefined_has_a_value(logits, targets, r2):
    given = np.array(logits)[:, None], np.array(targets)[:, None]
    measured = measure(make_task(REGRESSION), *given, ["x"])
    assert (measured["pearson"], measured["spearman"]) == (0, 0) and measured["r2"] == pytest.approx(r2)


def test_ranks():
    assert ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == stats.rankdata([3, 1, 3, 2]).tolist()


# --- predictions and constants ----------------------------------------------------------------------------------------


def test_predictions_are_in_the_units_of_their_target():
    logits = np.array([[0.1, -2.0], [1 / 3, 0.0]], dtype=np.float32)
    columns = make_task(REGRESSION, CONSTANTS).prediction_columns(logits, NAMES)
    assert columns["prediction:price"] == [102.0, 106.66667] and columns["prediction:depth"] == [-1.5, -1.0]
    assert list(map(json.loads, columns["prediction"])) == [[102.0, -1.5], [106.66667, -1.0]]
    single = {kind: {"x": values["price"]} for kind, values in CONSTANTS.items()}
    assert make_task(REGRESSION, single).prediction_columns(logits[:, :1], ["x"]) == {"prediction": [102.0, 106.66667]}
    tiny = {"mean": {"x": 0.0}, "scale": {"x": 1e-9}}
    assert make_task(REGRESSION, tiny).prediction_columns(logits[:, :1], ["x"])["prediction"] == [1e-10, 3.33333e-10]


@pytest.mark.parametrize(
    ("task", "content", "words"),
    [
        ("regression", None, ["'mean' is missing"]),
        ("regression", {"mean": {"price": 1, "depth": 1}}, ["'scale' is missing"]),
        ("regression", {**CONSTANTS, "scale": {"price": 0, "depth": 1}}, ["'scale' of 'price' is 0", "above 0"]),
        ("regression", {**CONSTANTS, "mean": {"price": "1", "depth": 1}}, ["'mean' of 'price' is '1'"]),
        ("regression", {**CONSTANTS, "mean": [1, 2]}, ["'mean'", "'price', 'depth'"]),
        ("multi_label", {"thresholds": {"price": 0.5}}, ["'thresholds'", "'price', 'depth'"]),
        ("multi_label", {"thresholds": {"price": 0.5, "depth": 1.5}}, ["of 'depth' is 1.5", "in [0, 1]"]),
        ("multi_label", {"thresholds": {"price": 0.5, "depth": True}}, ["of 'depth' is True"]),
        ("multi_label", ["thresholds"], ["cannot be read"]),
    ],
)
def test_a_changed_file_of_constants_is_refused(tmp_path, task, content, words):
    if content is not None:
        (tmp_path / "task.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as refusal:
        load_task(tmp_path, TaskConfig(task), NAMES)
    said = str(refusal.value)
    assert re.match(f"--run: {re.escape(str(tmp_path))}/task.json", said) and len(said.splitlines()) == 1
    assert [word for word in words if word not in said] == [], said


def test_constants_are_found_by_name(tmp_path):
    turned = {kind: dict(reversed(values.items())) for kind, values in CONSTANTS.items()}
    (tmp_path / "task.json").write_text(json.dumps(turned))
    factor, shift = load_task(tmp_path, REGRESSION, NAMES).affine
    assert (factor.tolist(), shift.tolist()) == ([20.0, 0.25], [100.0, -1.0])
    assert load_task(tmp_path / "none", TaskConfig("multi_label"), NAMES).metrics, "thresholds of 0.5"
