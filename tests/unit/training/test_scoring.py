"""Scoring a split: every example once, in order, without a trace in the model; and the files it leaves."""

import csv
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from trainer.data.tokens import Examples
from trainer.distributed.session import start_accelerator
from trainer.errors import UserError
from trainer.files import csv_text
from trainer.packed.forward import PaddedForward
from trainer.tasks import single_label
from trainer.training import scoring as evaluation
from trainer.training.scoring import score_split, write_evaluation

PAD = 0


@pytest.fixture
def accelerator(unlaunched):
    return start_accelerator("no")


class Summing(torch.nn.Module):
    """Logits that name the example: [sum of its tokens, its length, its first token], and noise while training."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.shapes = []

    def forward(self, input_ids, attention_mask):
        self.shapes.append(tuple(input_ids.shape))
        tokens = input_ids * attention_mask
        logits = torch.stack([tokens.sum(1), attention_mask.sum(1), tokens[:, 0]], dim=1).float() * self.weight
        return SimpleNamespace(logits=logits + (torch.rand(()) if self.training else 0))


def examples_of(count, seed=0):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 30, count)
    return Examples(
        tokens=generator.integers(1, 100, lengths.sum()).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        token_types=None,
        targets=generator.integers(0, 3, count),
        lengths=lengths,
    )


def score(model, examples, accelerator, **settings):
    settings = {"max_tokens": 64, "num_labels": 3, **settings}
    return score_split(PaddedForward(model, PAD), examples, accelerator, **settings)


@pytest.mark.parametrize("count", [1, 2, 7, 53])
@pytest.mark.parametrize("max_tokens", [1, 64, 10**6])
def test_every_example_is_scored_once_in_the_order_of_the_split(accelerator, count, max_tokens):
    examples, model = examples_of(count), Summing()
    found = score(model, examples, accelerator, max_tokens=max_tokens)
    texts = np.split(examples.tokens, examples.offsets[1:-1])
    assert found.tolist() == [[text.sum(), len(text), text[0]] for text in texts]
    assert found.dtype == np.float32
    assert sum(rows for rows, _ in model.shapes) == count
    assert all(rows == 1 or rows * length <= max_tokens for rows, length in model.shapes)


def test_an_example_scored_twice_or_never_is_noticed(accelerator, monkeypatch):
    split = evaluation.split_by_tokens
    monkeypatch.setattr(evaluation, "split_by_tokens", lambda *given: [*split(*given), [0]])
    with pytest.raises(AssertionError, match="twice or not at all"):
        score(Summing(), examples_of(5), accelerator)
    monkeypatch.setattr(evaluation, "split_by_tokens", lambda *given: split(*given)[1:])
    with pytest.raises(AssertionError, match="twice or not at all"):
        score(Summing(), examples_of(5), accelerator)


class Stop(Exception):
    pass


def test_a_stop_leaves_no_scores_and_the_mode_as_it_was(accelerator):
    model, answers = Summing().train(), iter([None, None, Stop])

    def check_round(is_full):
        assert not is_full
        if error := next(answers):
            raise error

    with pytest.raises(Stop):
        score(model, examples_of(20), accelerator, max_tokens=30, check_round=check_round)
    assert model.training
    assert len(model.shapes) == 3


class Greedy(Summing):
    """Runs out of memory with more than 40 padded tokens."""

    def forward(self, input_ids, attention_mask):
        if input_ids.numel() > 40:
            raise torch.OutOfMemoryError
        return super().forward(input_ids, attention_mask)


def test_a_lack_of_memory_names_the_option(accelerator):
    model = Greedy().train()
    with pytest.raises(UserError, match=r"while scoring 64 tokens .*batch\.eval_max_tokens.*--max_tokens"):
        score(model, examples_of(20), accelerator, max_tokens=64)
    assert model.training
    score(model, examples_of(20), accelerator, max_tokens=40)


def test_logits_that_are_not_finite_are_refused_with_their_rows():
    rows = np.array([0, 2, 5])
    evaluation.refuse_broken_logits(np.zeros((3, 2)), rows, "input", "--precision no")
    with pytest.raises(UserError, match=r"^input: the logits of 2 examples are not finite: id 0, 5 .*--precision no"):
        evaluation.refuse_broken_logits(np.array([[0, np.nan], [0, 0], [np.inf, 1]]), rows, "input", "--precision no")


# --- files ---


NAMES = ["a, b", 'say "c"']
LOGITS = np.log(np.array([[0.75, 0.25], [0.5, 0.5], [0.125, 0.875]], dtype=np.float32))


@pytest.mark.parametrize("pairs", [None, ["x", "", "z,z"]])
def test_the_files_of_an_evaluation(tmp_path, pairs):
    texts = ["one", "two\nlines", '=1+"1"']
    split = SimpleNamespace(rows=np.array([4, 5, 9]), texts=texts, text_pairs=pairs)
    targets, train = np.array([0, 1, 1]), {"num_examples": 4, "label_counts": dict(zip(NAMES, [1, 3], strict=True))}
    metrics = write_evaluation(tmp_path / "test", single_label.TASK, LOGITS, targets, NAMES, split, train)
    with (tmp_path / "test" / "predictions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == ["4", "5", "9"]
    assert [row["label"] for row in rows] == [NAMES[0], NAMES[1], NAMES[1]]
    assert [row["prediction"] for row in rows] == [NAMES[0], NAMES[0], NAMES[1]]
    assert [row["text"] for row in rows] == texts
    assert [row.get("text_pair") for row in rows] == (pairs or [None] * 3)
    assert [float(row["confidence"]) for row in rows] == [0.75, 0.5, 0.875]
    assert [float(row[f"probability:{NAMES[1]}"]) for row in rows] == [0.25, 0.5, 0.875]
    assert json.loads((tmp_path / "test" / "metrics.json").read_text()) == metrics
    assert metrics["accuracy"] == pytest.approx(2 / 3)
    assert metrics["class_shares"][NAMES[0]] == {"predicted": 2 / 3, "train": 0.25}
    with (tmp_path / "test" / "confusion_matrix.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["true \\ predicted", *NAMES], [NAMES[0], "1", "0"], [NAMES[1], "1", "1"]]
    report = (tmp_path / "test" / "classification_report.txt").read_text()
    assert all(name in report for name in NAMES)


def test_rows_survive_csv():
    table = [["a", 'q"', "l\nl"], ["", "é", "c,c"], ["r\rr", "\r", "rn\r\nrn"]]
    assert list(csv.reader(io.StringIO(csv_text(table), newline=""))) == table
    assert csv_text([["a", "b c"], ["1", "2"]]) == "a,b c\n1,2\n"
