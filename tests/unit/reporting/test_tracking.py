"""metrics.jsonl and TensorBoard: each step once, and no tracker stops a run. (Figures: test_page.py.)"""

import contextlib
import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from trainer.reporting.tracking import RunLog, keep_steps

CONFIG = {"run": {"seed": 1, "name": None}, "optim": {"betas": [0.9, 0.999], "class_weights": {"a <b>": 2.0}}}


@pytest.fixture(autouse=True)
def _files_of_one_process_in_order(monkeypatch):
    """TensorBoard reads event files by name; those of one second and one process differ in a number without zeros."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(1000))


def opened(folder, step=0, evaluated=0, backends=("tensorboard",), quiet=True):
    folder.mkdir(exist_ok=True)
    Accelerator(cpu=True)  # its trackers ask whether they are on the main process
    log = RunLog(folder, True, quiet)
    log.open(list(backends), step, evaluated, 12, CONFIG)
    return log


def killed(log):
    """What it has written so far is on the disk, and nothing else happens to it."""
    for tracker in log._trackers:
        tracker.writer.flush()


def board(folder):
    events = EventAccumulator(str(folder), {"scalars": 0, "images": 0, "tensors": 0})
    with contextlib.redirect_stderr(io.StringIO()):
        events.Reload()
    return events


def scalars(folder):
    events = board(folder)
    return {tag: [(e.step, round(e.value, 4)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def train(log, first, last, value):
    for step in range(first, last + 1):
        log.log_scalars({"train/loss": value}, step, step / 6)


def test_metrics_file_and_tensorboard_have_the_same_numbers(tmp_path):
    folder = tmp_path / "run"
    log = opened(folder)
    log.log_scalars({"train/loss": 1.5, "train/learning_rate": 0.1}, 2, 1 / 3)
    log.log_scalars({"validation/loss": 2.5, "validation/f1/a b/c": 0.5}, 2, 1 / 3)
    log.close()
    assert lines(folder) == [
        {"step": 2, "epoch": 0.333333, "train/loss": 1.5, "train/learning_rate": 0.1},
        {"step": 2, "epoch": 0.333333, "validation/loss": 2.5, "validation/f1/a b/c": 0.5},
    ]
    assert scalars(folder) == {
        "train/loss": [(2, 1.5)],
        "train/learning_rate": [(2, 0.1)],
        "validation/loss": [(2, 2.5)],
        "validation/f1/a b/c": [(2, 0.5)],
    }


def test_after_a_resume_each_step_is_logged_once(tmp_path):
    folder = tmp_path / "run"
    log = opened(folder)
    train(log, 1, 5, 1.0)  # killed here; the checkpoint was of step 3
    killed(log)
    log = opened(folder, step=3)
    train(log, 4, 7, 2.0)
    log.close()
    wanted = [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0), (7, 2.0)]
    assert scalars(folder)["train/loss"] == wanted
    assert [(line["step"], line["train/loss"]) for line in lines(folder)] == wanted


def test_repeated_final_metrics_are_logged_once(tmp_path):
    folder = tmp_path / "run"
    for value in (1.0, 2.0):  # killed after the first time, before the summary was written
        log = opened(folder, step=6 if value > 1 else 0, evaluated=6 if value > 1 else 0)
        if value == 1:
            train(log, 1, 6, 1.0)
        log.log_final_metrics(CONFIG, {"final/test_loss": value}, 6, 1.0)
        killed(log)
    assert scalars(folder)["final/test_loss"] == [(7, 2.0)]
    assert len(scalars(folder)["train/loss"]) == 6
    finals = [line for line in lines(folder) if "final/test_loss" in line]
    assert finals == [{"step": 6, "epoch": 1.0, "final/test_loss": 2.0}]


def test_hyperparameters_text_and_figure(tmp_path):
    folder = tmp_path / "run"
    log = opened(folder)
    log.log_confusion_matrix("validation/confusion_matrix", np.array([[3, 1], [0, 2]]), ["a <b>", "$x^"], 4)
    log.log_residuals("validation/residuals", np.ones((3, 1)), np.zeros((3, 1)), ["$x^"], 4)
    log.log_final_metrics(CONFIG, {"final/test_accuracy": 0.75}, 6, 1.0)
    log.close()
    tags = board(folder).Tags()
    assert tags["images"] == ["validation/confusion_matrix", "validation/residuals"]
    (text,) = [tag for tag in tags["tensors"] if tag.startswith("config")]
    said = board(folder).Tensors(text)[0].tensor_proto.string_val[0].decode()
    assert '"class_weights"' in said
    assert all(line.startswith("    ") for line in said.splitlines() if line)  # code, so shown as it is
    content = board(folder).PluginTagToContent("hparams")
    assert b"optim.betas" in content["_hparams_/session_start_info"]
    assert b"[0.9, 0.999]" in content["_hparams_/session_start_info"]
    assert b"final/test_accuracy" in content["_hparams_/experiment"]
    assert scalars(folder) == {"final/test_accuracy": [(7, 0.75)]}


@pytest.mark.parametrize("broken", ["start", "log", "finish"])
def test_a_failing_tracker_is_named_once_and_stops_nothing(tmp_path, monkeypatch, capsys, broken):
    def fails(*arguments, **settings):
        raise RuntimeError("no network")

    monkeypatch.setattr(TensorBoardTracker, broken, fails)
    folder = tmp_path / "run"
    log = opened(folder, quiet=False)
    train(log, 1, 3, 1.0)
    log.log_confusion_matrix("validation/confusion_matrix", np.eye(2, dtype=int), ["a", "b"], 2)
    log.log_final_metrics(CONFIG, {"final/test_loss": 1.0}, 3, 0.5)
    log.close()
    assert len(lines(folder)) == 4
    assert capsys.readouterr().err.count("warning: tensorboard failed and may miss values: no network") == 1


class Service:
    """Stands in for a tracker's package, with the calls that Accelerate makes; `broken` is the one that fails."""

    def __init__(self, name, broken=None, error=RuntimeError):
        self.name, self.broken, self.error, self.calls = name, broken, error, []
        self.id = f"run of {name}"  # of W&B and SwanLab
        self.info = SimpleNamespace(run_id=self.id)  # of MLflow
        self.utils = SimpleNamespace(
            validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100)
        )

    def __getattr__(self, call):
        if call.startswith("__"):
            raise AttributeError(call)
        if self.broken == "import":
            raise ImportError("built for another Python")

        def answer(*arguments, **settings):
            if call == self.broken:
                raise self.error("no network")
            self.calls.append((call, arguments, settings))
            return [] if call == "search_experiments" else self

        return answer if call != "config" else SimpleNamespace(update=answer)

    def made(self, call):
        return [(arguments, settings) for name, arguments, settings in self.calls if name == call]


@pytest.fixture
def service(monkeypatch):
    def install(name, *broken):
        made = Service(name, *broken)
        monkeypatch.setitem(sys.modules, name, made)
        return made

    for name in ("WANDB_PROJECT", "WANDB_NAME", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return install


@pytest.mark.parametrize(("first", "error"), [(True, RuntimeError), (False, SystemExit)])
@pytest.mark.parametrize(
    ("name", "broken"),
    [
        *(("wandb", call) for call in ("import", "init", "config", "log", "finish")),
        *(("mlflow", call) for call in ("import", "start_run", "log_params", "log_metrics", "end_run")),
    ],
)
def test_a_failing_tracker_does_not_affect_others(tmp_path, service, capsys, name, broken, first, error):
    service(name, broken, error)
    folder = tmp_path / "run"
    log = opened(folder, backends=(name, "tensorboard") if first else ("tensorboard", name), quiet=False)
    train(log, 1, 5, 1.0)
    log.log_final_metrics(CONFIG, {"final/test_loss": 2.0}, 5, 1.0)
    log.close()
    assert scalars(folder) == {"train/loss": [(step, 1.0) for step in range(1, 6)], "final/test_loss": [(6, 2.0)]}
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert warning.startswith(f"warning: {name} failed and may miss values: ")


def test_a_tracker_is_skipped_after_repeated_failures_unless_it_recovers(tmp_path, service):
    wandb = service("wandb", "log")
    log = opened(tmp_path / "run", backends=("wandb",))
    train(log, 1, 2, 1.0)
    wandb.broken = None
    train(log, 3, 3, 1.0)
    wandb.broken = "log"
    train(log, 4, 6, 1.0)
    wandb.broken = None
    train(log, 7, 9, 1.0)
    assert [settings["step"] for _, settings in wandb.made("log")] == [3]


def test_wandb_gets_config_and_run_name_and_resumes_its_run(tmp_path, service):
    wandb, folder = service("wandb"), tmp_path / "my run"
    for step in (0, 3):
        log = opened(folder, step=step, backends=("wandb",))
        train(log, step + 1, step + 3, 1.0)
        log.close()
    (_, first), (_, second) = wandb.made("init")
    assert (first["project"], first["name"], first.get("id")) == ("isotrain", "my run", None)
    assert second == {**first, "id": "run of wandb"} and second["resume"] == "allow"
    (values,), _ = wandb.made("config")[0]
    assert values == {
        "run.seed": 1,
        "run.name": "null",
        "optim.betas": "[0.9, 0.999]",
        "optim.class_weights": '{"a <b>": 2.0}',
    }
    assert [settings["step"] for _, settings in wandb.made("log")] == [1, 2, 3, 4, 5, 6]


def test_wandb_variables_set_project_and_run_name(tmp_path, service, monkeypatch):
    wandb = service("wandb")
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    monkeypatch.setenv("WANDB_NAME", "mine")
    opened(tmp_path / "run", backends=("wandb",)).close()
    (_, settings) = wandb.made("init")[0]
    assert (settings["project"], settings["name"]) == ("theirs", "mine")


def test_mlflow_gets_config_and_run_name_and_resumes_its_run(tmp_path, service):
    mlflow, folder = service("mlflow"), tmp_path / "my run"
    for step in (0, 3):
        log = opened(folder, step=step, backends=("mlflow",))
        log.log_scalars({"validation/f1/C++": 1.0}, step + 3, 1.0)
        log.close()
    assert mlflow.made("create_experiment")[0][1]["name"] == "isotrain"
    (_, first), (_, second) = mlflow.made("start_run")
    assert (first["run_name"], first["run_id"], second["run_id"]) == ("my run", None, "run of mlflow")
    ((params,), _), *others = mlflow.made("log_params")
    assert params["optim.betas"] == "[0.9, 0.999]" and not others  # it refuses a parameter that changes
    assert [values for (values,), _ in mlflow.made("log_metrics")] == [{"validation/f1/C__": 1.0}] * 2


@pytest.mark.parametrize("content", ["", "[1]", '{"wandb": '])
def test_a_damaged_trackers_file_starts_a_new_run(tmp_path, service, content):
    wandb, folder = service("wandb"), tmp_path / "run"
    folder.mkdir()
    (folder / "trackers.json").write_text(content)
    opened(folder, backends=("wandb",)).close()
    assert wandb.made("init")[0][1].get("id") is None
    assert json.loads((folder / "trackers.json").read_text()) == {"wandb": "run of wandb"}


def test_a_full_disk_names_the_file(tmp_path):
    log = opened(tmp_path / "run", backends=())
    path = tmp_path / "run" / "metrics.jsonl"
    path.symlink_to("/dev/full")
    with pytest.raises(OSError, match=f"^cannot write {path}: No space left on device$"):
        log.log_scalars({"train/loss": 1.0}, 1, 0.1)


def test_quiet_prints_nothing_and_other_ranks_write_nothing(tmp_path, capsys):
    log = opened(tmp_path / "quiet")
    log.print_line("hello")
    log.advance_bar(1, loss="1.0")
    assert log.bar_label("validation") is None
    log.close()
    other = RunLog(tmp_path / "other", False, False)
    other.open(["tensorboard"], 0, 0, 12, CONFIG)
    other.log_scalars({"train/loss": 1.0}, 1, 0.1)
    other.log_final_metrics(CONFIG, {"final/x": 1.0}, 1, 0.1)
    other.close()
    assert capsys.readouterr() == ("", "")
    assert not (tmp_path / "other").exists()


def test_torn_and_foreign_lines_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = [{"step": 1, "train/loss": 0.1 + 0.2}, {"step": 2, "train/loss": float("inf")}]
    torn = ['{"step": 3, "train/lo', "", "null", "[]", '{"train/loss": 1}', '{"step": "4"}', "\x00\x00"]
    written = "".join(json.dumps(line) + "\n" for line in whole) + "\n".join([*torn[1:], torn[0]])
    path.write_bytes(b'\xff\xfe{"step": 2}\n' + written.encode())
    assert keep_steps(path, 9, 9) == whole
    assert [json.loads(line) for line in path.read_text().splitlines()] == whole
    assert path.read_text().endswith("\n")
    assert keep_steps(tmp_path / "none.jsonl", 9, 9) == []
