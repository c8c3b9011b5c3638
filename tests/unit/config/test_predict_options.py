"""Which runs predict.py may average."""

from pathlib import Path

import pytest

from trainer.config.loading import parse_config
from trainer.config.predict_options import FinishedRun, Options, check_runs_agree
from trainer.config.schema import fill_recorded
from trainer.errors import UserError


def run_of(name, labels=("a", "b"), **options):
    given = {"data.train": "x.csv", **{key.replace("__", "."): value for key, value in options.items()}}
    words = [word for key, value in given.items() for word in (f"--{key}", value)]
    return FinishedRun(Path(name), fill_recorded(parse_config(words)), list(labels))


def check(*runs, **options):
    check_runs_agree(list(runs), Options(run=[], input="x.csv", output="y.csv", **options))


def test_runs_that_agree():
    title = run_of("C", data__text_columns="[title]")
    check(run_of("A"))
    check(run_of("A"), run_of("B", "ba", model__name="other", data__max_length="32"), run_of("C", data__train="y.csv"))
    check(run_of("A"), title, text_columns=["text"])


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (run_of("B", "abc"), ["B has 'c'", "A does not"]),
        (run_of("B", "a"), ["A has 'b'", "B does not"]),
        (run_of("B", ["a", "B"]), ["differ only in case"]),
        (run_of("B", task__type="multi_label"), ["single_label and multi_label", "one task"]),
        (run_of("B", data__text_columns="[title]"), ["['text'] and ['title']", "--text_columns"]),
        (run_of("B", data__text_pair_columns="[more]"), ["[] and ['more']", "--text_pair_columns"]),
        (run_of("B", data__train__path="x.csv", data__train__text_columns="[t]"), ["['text'] and ['t']"]),
    ],
)
def test_runs_that_differ(other, words):
    with pytest.raises(UserError) as error:
        check(run_of("A"), other)
    said = str(error.value)
    assert said.startswith("--run: ") and "\n" not in said
    assert [word for word in words if word not in said] == []
    with pytest.raises(UserError):
        check(run_of("A"), run_of("C"), other)


def test_pairs_and_single_texts_are_not_averaged():
    pairs = run_of("B", data__text_pair_columns="[more]")
    with pytest.raises(UserError, match="one has pairs of texts"):
        check(run_of("A"), pairs, text_columns=["text"], text_pair_columns=["more"])
