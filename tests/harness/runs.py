"""What a run leaves, and whether two runs left the same."""

import contextlib
import csv
import io
import json

import numpy as np
import safetensors.numpy
from tensorboard.backend.event_processing import event_accumulator

UNREPEATABLE = ("speed/", "memory/")


def records(folder):
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: v for key, v in line.items() if not key.startswith(UNREPEATABLE)} for line in lines]


def checkpoints(folder):
    """Checkpoint folders, oldest first."""
    return sorted((folder / "checkpoints").glob("step-*"))


def tensorboard(folder):
    """All scalars of the run's event files as TensorBoard shows them: {tag: [(step, value)]}."""
    events = event_accumulator.EventAccumulator(str(folder), {event_accumulator.SCALARS: 0})
    with contextlib.redirect_stderr(io.StringIO()):
        events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def outcome(folder):
    """All of a finished run that must not depend on how it was interrupted."""
    newest = checkpoints(folder)[-1]
    state = json.loads((newest / "trainer_state.json").read_text())["train"]
    for name in ("resumed_from", "world_sizes"):
        state.pop(name)
    for name in ("total", "epoch", "window"):
        state[name].pop("seconds")
    summary = json.loads((folder / "summary.json").read_text())
    keys = ("steps", "epochs", "best_step", "validation", "test", "adapter_bytes", "padding_fraction", "stopped_early")
    return {
        "adapter": (folder / "adapter" / "adapter_model.safetensors").read_bytes(),
        "adapter_config": (folder / "adapter" / "adapter_config.json").read_bytes(),
        "newest": newest.name,
        "weights": (newest / "adapter_model.safetensors").read_bytes(),
        "optimizer": (newest / "optimizer.safetensors").read_bytes(),
        "state": state,
        "records": records(folder),
        "tensorboard": {k: v for k, v in tensorboard(folder).items() if not k.startswith(UNREPEATABLE)},
        "predictions": (folder / "evaluation" / "test" / "predictions.csv").read_bytes(),
        "summary": {key: summary.get(key) for key in keys},
    }


def assert_same(folder, reference):
    """`folder` holds what the uninterrupted run left, to the last bit."""
    found = outcome(folder)
    for name, value in reference.items():
        assert found[name] == value, f"{name} differs from the uninterrupted run's"
    steps = [(line["step"], sorted(line)) for line in found["records"]]
    assert len({json.dumps(step) for step in steps}) == len(steps), "a step's numbers stand twice"
    for tag, values in tensorboard(folder).items():
        assert len({step for step, _ in values}) == len(values) or tag.startswith("final/"), (
            f"{tag}: a step is given twice"
        )
    left = [path for path in folder.rglob("*") if "unfinished" in path.name or "pending" in path.name]
    assert not left, "leftovers of a killed writer"


def tensors(path):
    return safetensors.numpy.load_file(path)


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def adapters(folder):
    """All tensors a run has learned, by name: those of the best adapter and those of the newest checkpoint."""
    places = {"best": folder / "adapter", "last": checkpoints(folder)[-1]}
    return {
        f"{which} {name}": tensor
        for which, place in places.items()
        for name, tensor in tensors(place / "adapter_model.safetensors").items()
    }


def distance(folder, other):
    """The largest difference between what two runs have learned."""
    ours, theirs = adapters(folder), adapters(other)
    assert ours.keys() == theirs.keys()
    return max(np.abs(ours[name] - theirs[name]).max() for name in ours)


def trained_ids(starts):
    """The ids each step has trained on, from the folders of `log_ids`, one for each start, in their order.

    A step done again counts as done the last time: it is the time whose gradient was applied.
    """
    latest, ids = {}, {}
    for number, folder in enumerate(starts):
        for path in folder.glob("*.jsonl"):
            for line in map(json.loads, path.read_text().splitlines()):
                step, attempt = line["step"], (number, line["attempt"])
                if attempt > latest.get(step, (-1, 0)):
                    latest[step], ids[step] = attempt, []
                if attempt == latest[step]:
                    ids[step] += line["ids"]
    return ids


def assert_each_once(ids, folder):
    """Each example of the training split was computed once in each epoch."""
    summary = json.loads((folder / "summary.json").read_text())
    num_examples = summary["data"]["train"]["num_examples"]
    assert sorted(ids) == list(range(summary["steps"]))
    steps_per_epoch = round(summary["steps"] / summary["epochs"])
    for first in range(0, summary["steps"], steps_per_epoch):
        epoch = [id for step in range(first, first + steps_per_epoch) for id in ids[step]]
        assert sorted(epoch) == list(range(num_examples)), f"epoch of steps {first + 1} to {first + steps_per_epoch}"
