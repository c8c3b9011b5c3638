"""Methods of PEFT x families, tiny and random: train, resume, save, predict, export, and load through plain PEFT.

    python -m tests.matrix [METHOD ...]     fills tests/matrix.tsv, and from it the table in docs/backbones.md

A cell is one run of three steps, interrupted after the first. Another process loads its adapter, and its export, with
nothing of Isotrain. Their probabilities must be those of predict.py.
"""

import csv
import dataclasses
import functools
import signal
import sys
import tempfile
from pathlib import Path

from tests.families import WORDS, tiny_classifier, tokenizer
from tests.harness.data import write_csv
from tests.harness.processes import ROOT, start_process

LIST, PAGE = Path(__file__).with_suffix(".tsv"), ROOT / "docs" / "backbones.md"
BEGIN, END = "<!-- python -m tests.matrix -->\n", "<!-- end -->\n"
BERT, DECODER = (["query", "value"], "LayerNorm"), (["q_proj", "v_proj"], "input_layernorm")
FAMILIES = {
    "bert": BERT, "roberta": BERT, "xlm-roberta": BERT, "distilbert": (["q_lin", "v_lin"], "sa_layer_norm"),
    "electra": BERT, "mpnet": (["q", "v"], "LayerNorm"), "deberta-v2": (["query_proj", "value_proj"], "LayerNorm"),
    "modernbert": (["Wqkv"], "mlp_norm"), "albert": BERT, "gpt2": (["c_attn"], "ln_1"), "llama": DECODER,
    "qwen2": DECODER, "qwen3": DECODER, "gemma": DECODER, "mistral": DECODER,
}  # fmt: skip
"""by family: names of the attention's projections, and of a norm"""
R4 = {"r": 4}
METHODS = {
    "LORA": R4, "LORA dora": R4 | {"use_dora": True}, "LORA rslora": R4 | {"use_rslora": True},
    "LORA pissa": R4 | {"init_lora_weights": "pissa"}, "LORA olora": R4 | {"init_lora_weights": "olora"},
    "LORA eva": R4 | {"init_lora_weights": "eva"},
    "ADALORA": {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1, "deltaT": 1}, "BEFT": {},
    "BOFT": {"boft_block_size": 4}, "C3A": {"block_size": 16}, "DEFT": R4, "DELORA": R4,
    "FOURIERFT": {"n_frequency": 20}, "GLORA": R4, "GRALORA": R4, "HIRA": R4, "HRA": R4,
    "IA3": {"feedforward_modules": []}, "LN_TUNING": {}, "LOHA": R4, "LOKR": R4, "MISS": R4,
    "OFT": {"oft_block_size": 4}, "OSF": {}, "PEANUT": R4, "RANDLORA": {"r": 8}, "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2}, "SUPERTUNING": {}, "TINYLORA": {}, "UNILORA": R4,
    "VBLORA": {"r": 4, "vector_length": 16, "num_vectors": 8}, "VERA": {"r": 8}, "WAVEFT": {"n_frequency": 20},
    "NONE all": {}, "NONE bias": {},
}  # fmt: skip
"""by method, perhaps with a variant: its options"""
TRAINS = {"NONE all": "all", "NONE bias": "bias"}
"""by method: peft.train"""
CELLS = [(method, family) for method in METHODS for family in FAMILIES]
TEXTS = [" ".join(WORDS[i : i + 3 + i % 7]) for i in range(24)]
SAME = 2e-5
"""largest difference of a probability"""


@functools.cache
def base_config(place):
    """The options that all cells share."""
    from trainer.config.loading import parse_config

    words = [
        "--data.train", place / "train.csv", "--data.max_length", "16", "--data.validation_fraction", "0",
        "--batch.size", "4", "--optim.max_steps", "3", "--optim.learning_rate", "2e-2", "--optim.schedule", "constant",
        "--run.precision", "no", "--run.output_dir", place / "runs", "--run.quiet", "true",
        "--checkpoint.every_steps", "9", "--tracking.backends", "[]", "--task.type", "single_label",
    ]  # fmt: skip
    return parse_config([str(word) for word in words])


def config_of(method, family, place):
    """The configuration of a cell."""
    config, (projections, norm), peft_type = base_config(place), FAMILIES[family], method.partition(" ")[0]
    options = {"target_modules": [norm] if peft_type == "LN_TUNING" else projections, **METHODS[method]}
    if peft_type == "NONE":
        options = {}
    return dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, name=folder_name(method, family)),
        model=dataclasses.replace(config.model, name=str(place / family)),
        peft=dataclasses.replace(config.peft, peft_type=peft_type, options=options, train=TRAINS.get(method)),
    )


def folder_name(method, family):
    """Name of a cell's run folder."""
    return f"{method}-{family}".replace(" ", "-")


def first_line(error, place):
    """Of a message, without the place of this run."""
    return str(error).splitlines()[0].replace(f"{place}/", "")


def train_cell(method, family, place):
    """Trains, resumes, saves, predicts and exports; returns what does not work, "" if all does."""
    import trainer.reporting.page
    from trainer.config.predict_options import FinishedRun, Options
    from trainer.config.schema import fill_task
    from trainer.distributed.session import StopRequest, join_processes
    from trainer.distributed.watch import Watch
    from trainer.errors import UserError
    from trainer.model.adapter import export_merged, find_trained_backbone, load_task
    from trainer.training.loop import train
    from trainer.training.pipeline import train_and_report
    from trainer.training.prediction import predict_file
    from trainer.training.scoring import Stopped
    from trainer.training.setup import build, prepare
    from trainer.training.state import TrainState

    trainer.reporting.page.build_report = lambda folder, summary: folder / "report.html"  # its figures take seconds
    config, folder, stop = config_of(method, family, place), place / "runs" / folder_name(method, family), StopRequest()
    stop.signal = signal.SIGTERM  # it stops after a step
    try:
        with join_processes("no", {}) as (accelerator, _):
            run = build(config, folder, prepare(config, folder), accelerator, stop, Watch())
            try:
                train(run, TrainState(), None)
            except Stopped as stopped:
                assert stopped.step == 1
        assert train_and_report(config, folder) == 0
    except UserError as error:
        return f"refused: {first_line(error, place)}"
    assert (folder / "checkpoints" / "step-00000003").is_dir()
    config, names = fill_task(config, config.task), list("abc")
    task = load_task(folder / "adapter", config.task, names)
    options = Options([str(folder)], str(place / "train.csv"), str(folder / "predictions.csv"), ignore_labels=True)
    predict_file(dataclasses.replace(options, quiet=True), [FinishedRun(folder, config, names)])
    backbone = find_trained_backbone(folder, config.model, names, task.problem_type)
    try:
        export_merged(folder / "adapter", backbone, config, folder / "merged", task)
    except UserError as error:
        return f"no export: {first_line(error, place)}"
    return ""


def load_cell(folder, backbone):
    """Compares predict.py's probabilities with those of plain PEFT, and of the export in plain transformers."""
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    with (folder / "predictions.csv").open(newline="") as file:
        expected = torch.tensor([[float(value) for value in row[3:]] for row in list(csv.reader(file))[1:7]])
    config = AutoConfig.from_pretrained(folder / "adapter", subfolder="backbone")
    plain = AutoModelForSequenceClassification.from_pretrained(backbone, config=config, ignore_mismatched_sizes=True)
    if (folder / "adapter" / "adapter_config.json").is_file():
        models = [PeftModel.from_pretrained(plain, folder / "adapter")]
    else:
        plain.load_state_dict(load_file(folder / "adapter" / "adapter_model.safetensors"), strict=False)
        models = [plain]
    if (folder / "merged").is_dir():
        models.append(AutoModelForSequenceClassification.from_pretrained(folder / "merged"))
    words = AutoTokenizer.from_pretrained(folder / "adapter")
    for model in models:
        with torch.no_grad():
            logits = [model.eval()(**words(text, return_tensors="pt")).logits[0] for text in TEXTS[:6]]
        difference = (torch.stack(logits).softmax(-1) - expected).abs().max().item()
        assert difference < SAME, f"probabilities differ by {difference:.1e}"
    return ""


def call_cells(end, function, calls):
    """In a process of its own: what the function returns for each cell, or why it failed."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for call in calls:
        try:
            end.send(function(*call))
        except Exception as error:
            end.send(f"fails: {type(error).__name__}: {error}")
    return 0


def find_verdicts(cells, place):
    """What does not work, by cell; "" where all does."""

    def call(function, calls):
        process = start_process(call_cells, function, calls)
        found = [process.answer() for _ in calls]
        assert process.code() == 0
        return found

    for family in dict.fromkeys(family for _, family in cells):
        tiny_classifier(family).save_pretrained(place / family)
        tokenizer().save_pretrained(place / family)
    write_csv(place / "train.csv", [(text, "abc"[i % 3]) for i, text in enumerate(TEXTS)])
    verdicts = dict(zip(cells, call(train_cell, [(*cell, place) for cell in cells]), strict=True))
    saved = [cell for cell in cells if not verdicts[cell].startswith(("refused", "fails"))]
    folders = [(place / "runs" / folder_name(*cell), place / cell[1]) for cell in saved]
    for cell, failure in zip(saved, call(load_cell, folders), strict=True):
        verdicts[cell] = failure or verdicts[cell]
    return verdicts


def listed():
    """The kept list: {(method, family): verdict}."""
    lines = LIST.read_text().splitlines() if LIST.is_file() else []
    return {tuple(line.split("\t")[:2]): line.split("\t")[2] for line in lines}


def render(verdicts):
    """The table, with a footnote for each reason."""
    reasons, rows = {}, []
    for method in METHODS:
        shown = []
        for family in FAMILIES:
            reason = verdicts[method, family]
            shown.append(f"[{reasons.setdefault(reason, len(reasons) + 1)}]" if reason else "yes")
        rows.append(f"| {method} | {' | '.join(shown)} |")
    head = [f"| | {' | '.join(FAMILIES)} |", "|---" * (len(FAMILIES) + 1) + "|"]
    notes = [f"{number}. {reason}".replace("<", "&lt;") for reason, number in reasons.items()]
    return "\n".join([*head, *rows, "", *notes, ""])


def main(names):
    """Fills the rows of these methods, or all, and writes the page."""
    verdicts = listed()
    for family in FAMILIES:
        cells = [(method, family) for method in METHODS if not names or method in names]
        with tempfile.TemporaryDirectory() as place:
            verdicts |= find_verdicts(cells, Path(place))
        print(family, [cell for cell in cells if verdicts[cell]], flush=True)
        lines = ["\t".join((*cell, verdicts[cell])) for cell in CELLS if cell in verdicts]
        LIST.write_text("\n".join(lines) + "\n")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(before + BEGIN + render(verdicts) + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    from tests import matrix  # another process could not import the functions of __main__

    matrix.main(sys.argv[1:])
