"""One change, one place: each test adds a task, a metric, an optimizer, a schedule or a family, and trains with it."""

import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
import torch
from accelerate.state import AcceleratorState, GradientState
from transformers import Data2VecTextForSequenceClassification

from tests.harness.data import TOPICS, topic_rows, write_csv
from trainer.config.loading import parse_config
from trainer.config.schema import FINITE
from trainer.errors import UserError
from trainer.packed.encoder import encoder_layers, modules_of_bert
from trainer.packed.families import FAMILIES, Family, embed_from_padding
from trainer.tasks import TASKS
from trainer.tasks.single_label import METRICS
from trainer.tasks.task import Metric, Task
from trainer.training.optim import OPTIMIZERS, SCHEDULES
from trainer.training.pipeline import train_and_report

RATE = 2**-8  # a power of 2, so that sums of steps are exact


@pytest.fixture
def train(tiny_arguments, tmp_path, monkeypatch):
    """Trains 8 steps in this process and returns the run folder; keyword arguments replace fields of a group."""
    monkeypatch.setattr("trainer.training.pipeline.StopRequest.listen", lambda _: None)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    arguments = [*tiny_arguments, "--run.quiet", "true", "--optim.max_steps", "8", "--evaluation.every_steps", "2"]

    def run(*more, **groups):
        config = parse_config([*arguments, *map(str, more)])
        for group, values in groups.items():
            config = dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **values)})
        assert train_and_report(config, tmp_path / "runs" / "tiny") == 0
        return tmp_path / "runs" / "tiny"

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def records(run, tag):
    """{step: value} of a tag of metrics.jsonl."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[tag] for line in lines if tag in line}


def adapter(run):
    return safetensors.numpy.load_file(run / "adapter" / "adapter_model.safetensors")


# --- a task: the label is an amount, and the model's one logit predicts it ---


def mean_error(logits, targets):
    return float(np.abs(logits[:, 0] - targets).mean())


AMOUNT = Task(
    problem_type="regression",
    name_labels=lambda train: (train.columns, None),
    encode=lambda column, names: (np.array([float(value) for value in column.texts()])[column.codes], []),
    make_losses=lambda optim, targets, names: lambda logits, targets: (logits[:, 0] - targets) ** 2,
    metrics={"mean_error": Metric(mean_error, higher_is_better=False)},
    files=lambda logits, targets, names: {"range.txt": f"{targets.min()} to {targets.max()}\n"},
    prediction_columns=lambda logits, names: {"prediction": logits[:, 0].astype(float).tolist()},
    format_targets=lambda targets, names: targets.tolist(),
)


def test_a_task(train, tmp_path, monkeypatch):
    learned_with = []

    def make_task(config, constants):
        losses = AMOUNT.make_losses
        return dataclasses.replace(
            AMOUNT, make_losses=lambda *given: learned_with.append(constants) or losses(*given),
            constants={"largest": FINITE}, fit=lambda targets, names: {"largest": {names[0]: float(targets.max())}},
        )  # fmt: skip

    monkeypatch.setitem(TASKS, "amount", make_task)
    amounts = {topic: 0.5 * i for i, topic in enumerate(TOPICS)}
    for name, count in (("train", 61), ("test", 23)):
        rows = [(text, amounts[topic]) for text, topic in topic_rows(count, seed=count)]
        write_csv(tmp_path / "data" / f"{name}.csv", rows, ("text", "stars"))
    run = train(
        "--data.label_column", "stars", "--optim.learning_rate", "1e-2", "--evaluation.metric", "mean_error",
        task={"type": "amount"},
    )  # fmt: skip
    with (run / "evaluation" / "test" / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["id", "label", "prediction", "text"]
    errors = [abs(float(row["label"]) - float(row["prediction"])) for row in rows]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["test"] == {"mean_error": pytest.approx(np.mean(errors), abs=1e-6), "num_examples": 23}
    assert json.loads((run / "adapter" / "task.json").read_text()) == {"largest": {"stars": 1.5}} == learned_with[-1]
    assert (run / "evaluation" / "test" / "range.txt").read_text() == "0.0 to 1.5\n"
    assert [tensor.shape for name, tensor in adapter(run).items() if "out_proj.bias" in name] == [(1,)]
    losses = list(records(run, "train/loss").values())
    assert losses[-1] < losses[0], "the loss of the task is what the optimizer lowers"
    assert json.loads((run / "adapter" / "backbone" / "config.json").read_text())["problem_type"] == "regression"
    assert "<h3>test mean_error</h3>" in (run / "report.html").read_text()


# --- a task: the label is a list of bits in JSON, and a logit predicts each ---


def wrong_bits(logits, targets):
    return float(((logits > 0) != targets).mean())


def encode_bits(column, names):
    return np.array([[float(bit) for bit in value] for value in column.values], dtype=np.float32)[column.codes], []


def bits_loss(logits, targets):
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=1)


def show_bits(targets, names):
    return [json.dumps(row) for row in targets.astype(int).tolist()]


BITS = dataclasses.replace(
    AMOUNT,
    problem_type="multi_label_classification",
    name_labels=lambda train: (["early", "late", "even"], None),
    encode=encode_bits,
    make_losses=lambda optim, targets, names: bits_loss,
    metrics={"wrong_bits": Metric(wrong_bits, higher_is_better=False)},
    prediction_columns=lambda logits, names: {"prediction": show_bits(logits > 0, names)},
    format_targets=show_bits,
)


def test_a_task_with_several_targets(train, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "bits", lambda config, constants: BITS)
    bits = {topic: [int(i < 2), int(i >= 2), int(i % 2 == 0)] for i, topic in enumerate(TOPICS)}
    files = {name: tmp_path / "data" / f"{name}.json" for name in ("train", "test")}
    for path, count in zip(files.values(), (61, 23), strict=True):
        rows = [{"text": text, "label": bits[topic]} for text, topic in topic_rows(count, seed=count)]
        path.write_text(json.dumps(rows))
    run = train(
        "--data.train", files["train"], "--data.test", files["test"], "--optim.learning_rate", "1e-2",
        "--evaluation.metric", "wrong_bits", task={"type": "bits"},
    )  # fmt: skip
    with (run / "evaluation" / "test" / "predictions.csv").open(newline="") as file:
        pairs = [(json.loads(row["label"]), json.loads(row["prediction"])) for row in csv.DictReader(file)]
    wrong = np.mean([np.not_equal(*pair) for pair in pairs])
    assert json.loads((run / "summary.json").read_text())["test"] == {"wrong_bits": wrong, "num_examples": 23}
    assert [tensor.shape for name, tensor in adapter(run).items() if "out_proj.bias" in name] == [(3,)]


# --- a metric ---


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_a_metric(train, monkeypatch, higher_is_better):
    spread = Metric(lambda logits, targets: float(logits.std()), higher_is_better)
    monkeypatch.setitem(METRICS, "spread", spread)
    run = train("--evaluation.metric", "spread", "--optim.learning_rate", "1e-2")
    found = records(run, "validation/spread")
    assert len(set(found.values())) == len(found) == 4
    best = (max if higher_is_better else min)(found, key=found.get)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["best_step"] == best and "spread" in summary["test"]
    assert "<h3>test spread</h3>" in (run / "report.html").read_text()


# --- an optimizer and a schedule ---


class Signs(torch.optim.Optimizer):
    """Moves each weight by the learning rate against the sign of its gradient."""

    def __init__(self, groups):
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter -= group["lr"] * parameter.grad.sign()


def test_an_optimizer_and_a_schedule(train, monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "signs", lambda groups, config: Signs(groups))
    monkeypatch.setitem(SCHEDULES, "stairs", lambda progress: 1.0 if progress < 0.5 else 0.25)
    settings = {"name": "signs", "schedule": "stairs", "learning_rate": RATE}
    run = train("--tracking.every_steps", 1, "--evaluation.metric", "loss", optim=settings)
    assert records(run, "train/learning_rate") == {step: RATE if step <= 4 else RATE / 4 for step in range(1, 9)}
    summary = json.loads((run / "summary.json").read_text())
    farthest = sum(records(run, "train/learning_rate")[step] for step in range(1, summary["best_step"] + 1))
    for name, tensor in adapter(run).items():
        if "lora_B" in name:  # it begins at 0
            steps = tensor / (RATE / 4)
            assert np.array_equal(steps, steps.round()) and 0 < np.abs(tensor).max() <= farthest, name


# --- a family for the forward without padding ---


def test_a_family(train, tiny_backbone, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny_backbone, tmp_path / "data2vec")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "data2vec-text", "architectures": ["Data2VecTextModel"]}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors = {name.removeprefix("roberta."): tensor for name, tensor in tensors.items()}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"model\.packed: true is not supported here: data2vec-text"):
        train("--model.name", folder, "--model.packed", "true")
    family = Family(
        embed=embed_from_padding,
        layers=lambda model, trains: encoder_layers(model.base_model.encoder.layer, modules_of_bert, trains),
        classify=lambda model, x, layout: model.classifier(x),
    )
    monkeypatch.setitem(FAMILIES, Data2VecTextForSequenceClassification, family)
    run = train("--model.name", folder, "--model.packed", "true")
    assert json.loads((run / "summary.json").read_text())["padding_fraction"] == 0
