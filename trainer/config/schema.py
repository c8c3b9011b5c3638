"""The configuration: nine frozen groups, what values they may have, and what makes two of them the same run.

Always holds: these dataclasses and their field docstrings are the option list, its types and its help; nothing else is.
`peft` is open: it takes PEFT's own names, checked against PEFT's own config class in `model.py`. Imports no torch.
"""

from __future__ import annotations

import codecs
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from trainer.config.labels import label_text


@dataclass(frozen=True)
class RunConfig:
    """Name, place and repetition of a run."""

    name: str | None = None
    """folder of the run below output_dir; null = the recipe's name"""
    output_dir: str = "runs"
    """folder that holds the run folders"""
    seed: int = 42
    """fixes the head's initial weights, the order of examples, the validation split and every dropout mask"""
    resume: Literal["auto", "never"] = "auto"
    """auto = continue an unfinished run of the same configuration and data; never = refuse a folder that is in use"""
    precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    """arithmetic of the frozen part; auto = accelerate's own setting, else the device's best, for the whole run"""
    quiet: bool = False
    """true = print nothing but errors"""


NO_COLUMN = "\0none"  # no file has a column of this name


@dataclass(frozen=True)
class Source:
    """One split whose layout differs from the data group's; null fields are taken from there."""

    path: str
    """hub id, file or glob"""
    column_names: list[str] | None = None
    """names of the columns of a file without a header; [] = its first row is the header"""
    delimiter: str | None = None
    """what separates the fields of csv and tsv"""
    encoding: str | None = None
    """encoding of text files"""
    quoting: Literal["single_line", "multi_line", "none"] | None = None
    """what a quote means in csv and tsv"""
    empty_text: Literal["refuse", "skip", "keep"] | None = None
    """what is done with a row without text"""
    text_columns: list[str] | None = None
    """columns that hold the text, joined by a space"""
    text_pair_columns: list[str] | None = None
    """columns that hold the second text of a pair"""
    label_column: str | None = None
    """column that holds the label"""
    label_names: list[str] | dict[str, str] | None = None
    """class names in order, or {value in the file: class name}"""


@dataclass(frozen=True)
class DataConfig:
    """Where the examples are and how to read them."""

    train: str | Source | None = None
    """training split: hub id (owner/name[/config][:split]), or files (csv, tsv, json, jsonl, parquet, ...) or a glob"""
    validation: str | Source | None = None
    """validation split; null = a stratified fraction of train"""
    test: str | Source | None = None
    """test split, scored once at the end with the best adapter; null = none"""
    validation_fraction: float = 0.1
    """fraction of train held out for validation where `validation` is null, in [0, 1); 0 = no validation"""
    column_names: list[str] | None = None
    """names of the columns of files without a header; null = the first row is the header"""
    delimiter: str | None = None
    """what separates the fields of csv and tsv, as ';' or '\\t' (a tab); null = a comma in csv, a tab in tsv"""
    encoding: str = "utf-8"
    """encoding of csv, tsv, json and jsonl files, as utf-8, utf-16 or cp1252"""
    quoting: Literal["single_line", "multi_line", "none"] = "single_line"
    """in csv and tsv: single_line = a quoted field ends in the line where it begins, multi_line = it may go on in the
    next lines, none = quotes are plain characters"""
    empty_text: Literal["refuse", "skip", "keep"] = "refuse"
    """rows whose text is empty or missing: refuse them, skip them, or keep them"""
    text_columns: list[str] = field(default_factory=lambda: ["text"])
    """columns that hold the text, joined by a space"""
    text_pair_columns: list[str] | None = None
    """columns that hold the second text of a pair, joined by a space; null = single texts"""
    label_column: str = "label"
    """column that holds the label, by name or by number"""
    label_names: list[str] | dict[str, str] | None = None
    """class names in order (numbers then count from 0), or {value in the data: class name}; null = as found, sorted"""
    max_length: int = 512
    """longest example in tokens, special tokens included; the rest of a text is cut off"""


@dataclass(frozen=True)
class BatchConfig:
    """How many examples an optimizer step sees, and how they are cut to fit the device."""

    size: int = 32
    """global batch: examples per optimizer step, over all processes"""
    max_tokens: int | None = None
    """tokens of one micro-batch on one process, padding included; null = 2048 on a CPU, what fits on a GPU. Never
    changes the result"""
    eval_max_tokens: int | None = None
    """tokens of one evaluation batch on one process, padding included; null = by the device"""


@dataclass(frozen=True)
class ModelConfig:
    """The backbone."""

    name: str = "FacebookAI/roberta-base"
    """hub id, local folder, or package:NAME/dir (a backbone inside an installed Python package)"""
    revision: str | None = None
    """branch, tag or commit of a hub model; null = main"""
    adapter: str | None = None
    """adapter folder of a finished run (runs/NAME/adapter), to start from its adapter and head; null = from new ones"""
    dropout: float | None = None
    """dropout of the backbone's own layers, in [0, 1); null = the backbone's own"""
    packed: Literal["auto"] | bool = "auto"
    """compute without padding; auto = where this backbone's layers are known (BERT, RoBERTa), true = or refuse"""


@dataclass(frozen=True)
class PeftConfig:
    """The adapter: PEFT's own names (r, lora_alpha, target_modules, ...) beside these two."""

    peft_type: str = "LORA"
    """PEFT method: LORA, IA3, LOHA, LOKR, OFT, VERA, ... (an unknown one lists them)"""
    max_trainable_parameters: int | None = None
    """budget over all that trains, the head included; exceeding it is an error. null = no budget"""
    options: dict[str, Any] = field(default_factory=dict)
    """PEFT's own options of that method, written as peft.NAME; null = PEFT's default, whatever a recipe says"""


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer, its schedule and the loss."""

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    """adamw (decoupled weight decay), adam (weight decay added to the gradient) or sgd (without momentum)"""
    learning_rate: float = 5e-5
    """peak learning rate"""
    weight_decay: float = 0.01
    """weight decay, on all trained weights but biases and norms"""
    betas: tuple[float, float] = (0.9, 0.999)
    """decay rates of Adam's moments, in [0, 1)"""
    eps: float = 1e-8
    """Adam's epsilon"""
    max_grad_norm: float | None = 1.0
    """gradients are scaled down to this global L2 norm; null = no clipping"""
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """after the warm-up: linear or cosine down to final_lr_fraction, or constant"""
    warmup_fraction: float = 0.0
    """fraction of all steps over which the learning rate rises linearly from 0, in [0, 1]"""
    final_lr_fraction: float = 0.0
    """where linear and cosine end, as a fraction of the peak, in [0, 1]"""
    epochs: int = 3
    """passes over the training split"""
    max_steps: int | None = None
    """optimizer steps of the whole run; null = as many as the epochs need. Given, it overrides epochs"""
    label_smoothing: float = 0.0
    """mass of the target spread evenly over all classes, in [0, 1)"""
    class_weights: Literal["balanced"] | dict[str, float] | None = None
    """{class name: weight of its examples} or balanced (inverse frequency in train); null = all 1"""


@dataclass(frozen=True)
class EvaluationConfig:
    """When the validation split is scored, and what counts as better."""

    every_steps: int | None = None
    """steps between evaluations; null = at the end of each epoch"""
    metric: str = "accuracy"
    """picks the best adapter: accuracy, f1_macro, f1_weighted, precision_macro, recall_macro, mcc, loss or f1/CLASS"""
    patience: int | None = None
    """evaluations without a better metric after which training stops; null = off"""


@dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved, and how much of it is kept."""

    every_steps: int | None = None
    """steps between checkpoints; null = at the end of each epoch"""
    keep_last: int = 2
    """newest checkpoints kept; at least 2, so that a damaged one has one before it"""


@dataclass(frozen=True)
class TrackingConfig:
    """What is logged, where."""

    every_steps: int = 10
    """steps between logged values"""
    backends: list[str] = field(default_factory=lambda: ["tensorboard"])
    """trackers of Accelerate (tensorboard, wandb, ...); [] = metrics.jsonl alone"""


@dataclass(frozen=True)
class Config:
    """The whole configuration of a run."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    peft: PeftConfig = field(default_factory=PeftConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    recipe: str | None = field(default=None, compare=False)
    """name of the recipe it was read from; no setting"""


GROUPS: dict[str, Any] = {
    item.name: item.default_factory for item in dataclasses.fields(Config) if item.name != "recipe"
}
SPLITS = ("data.train", "data.validation", "data.test")
# What may differ between a run and its continuation: nothing here changes an example, a gradient or a score. The paths
# of the data, and how files are written, are left out because their content is compared instead (see data.py).
NOT_IDENTITY = {
    "run": {"name", "output_dir", "resume", "quiet"},
    "data": {"train", "validation", "test", "delimiter", "encoding", "quoting"},
    "batch": {"max_tokens", "eval_max_tokens"},
    "model": {"name", "revision", "adapter", "packed"},
    "peft": {"max_trainable_parameters"},
    "checkpoint": {"every_steps", "keep_last"},
    "tracking": {"every_steps", "backends"},
}


AT_LEAST = {
    "run.seed": 0, "data.max_length": 4, "batch.size": 1, "batch.max_tokens": 1, "batch.eval_max_tokens": 1,
    "peft.max_trainable_parameters": 1, "optim.learning_rate": 0, "optim.weight_decay": 0, "optim.eps": 0,
    "optim.epochs": 1, "optim.max_steps": 1, "evaluation.every_steps": 1, "evaluation.patience": 1,
    "checkpoint.every_steps": 1, "checkpoint.keep_last": 2, "tracking.every_steps": 1,
}  # fmt: skip
BELOW_ONE = ("data.validation_fraction", "model.dropout", "optim.label_smoothing")
UP_TO_ONE = ("optim.warmup_fraction", "optim.final_lr_fraction")


def as_dict(config: Config) -> dict[str, dict[str, Any]]:
    """The configuration as plain nested values, PEFT's options beside `peft_type`: what config.yaml holds."""
    groups = {group: dataclasses.asdict(getattr(config, group)) for group in GROUPS}
    groups["peft"].update(groups["peft"].pop("options"))
    groups["optim"]["betas"] = list(config.optim.betas)
    return groups


def identity(config: Config) -> dict[str, dict[str, Any]]:
    """What makes two configurations the same run: `as_dict` without what cannot change the result."""
    groups = as_dict(config)
    return {
        group: {name: value for name, value in values.items() if name not in NOT_IDENTITY.get(group, set())}
        for group, values in groups.items()
    }


def completed(source: str | Source, default: DataConfig | Source) -> Source:
    """A split's own layout, filled up from another."""
    split = source if isinstance(source, Source) else Source(path=source)
    opened = {name: getattr(default, name) for name, value in vars(split).items() if value is None}
    return dataclasses.replace(split, **opened)


def run_name(config: Config) -> str:
    """Name of the run's folder: `run.name`, else the recipe's, else "run"."""
    return config.run.name or config.recipe or "run"


def impossible(config: Config) -> Iterator[str]:
    """Values out of range and combinations that cannot work, a line each."""
    yield from _out_of_range(config)
    data, optim = config.data, config.optim
    if optim.final_lr_fraction and optim.schedule == "constant":
        yield "optim.final_lr_fraction has no effect with optim.schedule constant; use linear or cosine"
    if optim.name == "sgd" and config.run.precision == "fp16":
        yield "optim.name sgd with run.precision fp16: gradients this small are lost; use bf16 or adamw"
    if not data.train:
        yield "data.train is missing: --data.train FILE (csv, tsv, json, jsonl, parquet) or hub id, or a --recipe"
    for key, layout in {"data": data, **{split: getattr(data, split.partition(".")[2]) for split in SPLITS}}.items():
        if layout == "" and key != "data.train":
            yield f"{key} is empty; null = none"
        if isinstance(layout, DataConfig | Source):
            yield from _impossible_layout(key, completed(layout, data) if isinstance(layout, Source) else layout)
    if data.validation is None and data.validation_fraction == 0 and config.evaluation.patience is not None:
        yield "evaluation.patience needs a validation split; data.validation_fraction is 0"
    name = run_name(config)
    if (
        name in {".", ".."}
        or config.run.name == ""
        or set(name) & set("/\\")
        or not name.isprintable()
        or len(name.encode()) > 200
    ):
        yield f"run.name: {config.run.name!r} must be a folder name, not a path (see run.output_dir)"


def _out_of_range(config: Config) -> Iterator[str]:
    def value_of(key: str) -> Any:
        group, _, name = key.partition(".")
        return getattr(getattr(config, group), name)

    for key, least in AT_LEAST.items():
        value = value_of(key)
        if value is not None and not least <= value < float("inf"):
            yield f"{key}: {value} must be at least {least}"
    for key in BELOW_ONE:
        if value_of(key) is not None and not 0 <= value_of(key) < 1:
            yield f"{key}: {value_of(key)} must be in [0, 1)"
    for key in UP_TO_ONE:
        if not 0 <= value_of(key) <= 1:
            yield f"{key}: {value_of(key)} must be in [0, 1]"
    if not all(0 <= beta < 1 for beta in config.optim.betas):
        yield f"optim.betas: {list(config.optim.betas)} must be in [0, 1)"
    limit = config.optim.max_grad_norm
    if limit is not None and not 0 < limit < float("inf"):
        yield f"optim.max_grad_norm: {limit} must be above 0 (null = no clipping)"
    if config.run.seed >= 2**63:
        yield f"run.seed: {config.run.seed} must be below 2**63"


def _impossible_layout(key: str, layout: DataConfig | Source) -> Iterator[str]:
    if layout.text_columns == []:
        yield f"{key}.text_columns is empty: name at least one column"
    if layout.label_column in [*(layout.text_columns or []), *(layout.text_pair_columns or [])]:
        yield f"{key}.label_column {layout.label_column!r} is also a text column"
    yield from impossible_format(f"{key}.", layout.delimiter, layout.encoding)
    names = layout.label_names
    listed = list(names.values()) if isinstance(names, dict) else names or []
    if names is not None and (not listed or not all(str(name).strip() for name in listed)):
        yield f"{key}.label_names: {names!r} has no name, or an empty one"
    first: dict[str | None, int] = {}  # 1 and 1.0 are one label
    twice = [name for i, name in enumerate(names or ()) if first.setdefault(label_text(name), i) != i]
    if twice:
        yield f"{key}.label_names: {twice[0]!r} is given twice"


def impossible_format(prefix: str, delimiter: str | None, encoding: str | None) -> Iterator[str]:
    """A delimiter or encoding of text files that there is not, a line each."""
    if delimiter is not None and (len(delimiter.replace("\\t", "\t")) != 1 or delimiter in '"\r\n'):
        yield f"{prefix}delimiter: {delimiter!r} must be one character, as ';' or '\\t'"
    try:
        known = encoding is None or codecs.lookup(encoding)._is_text_encoding
    except (LookupError, ValueError):
        known = False
    if not known:
        yield f"{prefix}encoding: {encoding!r} is unknown; known: utf-8, utf-16, cp1252, latin-1, gb18030, ..."
