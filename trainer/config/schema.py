"""The options: ten frozen groups, their ranges and help, and which of them make two runs the same.

Each field declares its type, default, range and help in one place. `--help`, docs/options.md and all checks are made
from it. `peft` also takes PEFT's own names, checked in model/build.py. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from trainer.config.labels import label_text

Range = Mapping[str, Any]


def _range(text: str, accepts: Callable[[float], bool]) -> Range:
    """Metadata of a field: which numbers it accepts, and how help and messages say it."""
    return {"range": text, "accepts": accepts}


def at_least(low: int) -> Range:
    """Metadata of a field that accepts finite numbers from `low`."""
    return _range(f"at least {low}", lambda value: low <= value < float("inf"))


ABOVE_ZERO = _range("above 0", lambda value: 0 < value < float("inf"))
BELOW_ONE = _range("in [0, 1)", lambda value: 0 <= value < 1)
FINITE = _range("a finite number", math.isfinite)
FRACTION = _range("in [0, 1]", lambda value: 0 <= value <= 1)
SEED = _range("from 0 to 2**63 - 1", lambda value: 0 <= value < 2**63)


@dataclass(frozen=True)
class RunConfig:
    """The run: its name, folder, seed and precision."""

    name: str | None = None
    """name of the run folder in output_dir; null = the recipe's name"""
    output_dir: str = "runs"
    """folder that holds all run folders"""
    seed: int = field(default=42, metadata=SEED)
    """seed of the head's initial weights, the example order, the validation split and all dropout masks"""
    resume: Literal["auto", "never"] = "auto"
    """auto = resume an unfinished run of the same configuration and data; never = refuse an existing run folder"""
    precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    """precision of the frozen weights; auto = accelerate's setting, or else the fastest that the device supports"""
    quiet: bool = False
    """true = print errors only"""


@dataclass(frozen=True, kw_only=True)
class Format:
    """How a file is read; null = another default."""

    column_names: list[str] | None = None
    """column names of a file without a header; [] = the first row is the header"""
    delimiter: str | None = None
    """field separator of csv and tsv files"""
    encoding: str | None = None
    """encoding of csv, tsv, json and jsonl files"""
    quoting: Literal["single_line", "multi_line", "none"] | None = None
    """meaning of quotes in csv and tsv files (see data.quoting)"""
    text_columns: list[str] | None = None
    """columns with the text, joined by a space"""
    text_pair_columns: list[str] | None = None
    """columns with the second text of a pair"""
    label_column: str | None = None
    """column with the label"""
    label_columns: list[str] | None = None
    """columns of 0 and 1, one for each label; [] = read label_column"""
    label_names: list[str] | dict[str, str] | None = None
    """class names in order (labels count from 0), or {value in the file: class name}"""


@dataclass(frozen=True)
class Source(Format):
    """A split with settings of its own; null = the setting of the data group."""

    path: str
    """hub id, file or glob"""
    empty_text: Literal["refuse", "skip", "keep"] | None = None
    """what to do with rows that have no text"""


@dataclass(frozen=True)
class ResolvedSource:
    """Where one split is and how it is read, with nothing left to another default."""

    path: str
    column_names: list[str] | None
    """None: the first row is the header"""
    delimiter: str | None
    """None: by the type of the file"""
    encoding: str
    quoting: Literal["single_line", "multi_line", "none"]
    empty_text: Literal["refuse", "skip", "keep"]
    text_columns: list[str]
    text_pair_columns: list[str]
    """empty for single texts"""
    label_column: str | None
    """None: no labels are read"""
    label_columns: list[str]
    """columns that are read instead; empty for a label column"""
    label_names: list[str] | dict[str, str] | None


@dataclass(frozen=True)
class DataConfig:
    """The examples: files or hub data sets, and how to read them."""

    train: str | Source | None = None
    """training split: a hub id (owner/name[/config][:split]), a file (csv, tsv, json, jsonl, parquet, ...) or a glob"""
    validation: str | Source | None = None
    """validation split; null = a stratified fraction of the training split"""
    test: str | Source | None = None
    """test split, scored once at the end with the best adapter; null = no test split"""
    validation_fraction: float = field(default=0.1, metadata=BELOW_ONE)
    """fraction of the training split held out if `validation` is null; 0 = no validation split"""
    column_names: list[str] | None = None
    """column names of files without a header; null = the first row is the header"""
    delimiter: str | None = None
    """field separator, such as ';' or '\\t' (a tab); null = a comma in csv files, a tab in tsv files"""
    encoding: str = "utf-8"
    """encoding of csv, tsv, json and jsonl files, such as utf-8, utf-16 or cp1252"""
    quoting: Literal["single_line", "multi_line", "none"] = "single_line"
    """quotes in csv and tsv files: single_line = a quoted field ends on its line, multi_line = it may span lines,
    none = quotes are plain characters"""
    empty_text: Literal["refuse", "skip", "keep"] = "refuse"
    """rows with empty or missing text: refuse the file, skip the rows, or keep them"""
    text_columns: list[str] = field(default_factory=lambda: ["text"])
    """columns with the text, joined by a space"""
    text_pair_columns: list[str] | None = None
    """columns with the second text of a pair, joined by a space; null = single texts"""
    label_column: str = "label"
    """column with the label: a name or a number; for multi_label a list of them, or text with task.separator"""
    label_columns: list[str] | None = None
    """several columns instead of label_column: of 0 and 1, one for each label (multi_label), or of numbers
    (regression); null = read label_column"""
    label_names: list[str] | dict[str, str] | None = None
    """class names in order (labels count from 0), or {value in the data: class name}; null = the names
    stored in the data, or else the sorted labels found"""
    max_length: int = field(default=512, metadata=at_least(4))
    """maximum tokens per example, with special tokens; see long_documents for longer texts"""
    long_documents: Literal["cut", "windows"] = "cut"
    """texts of more than max_length tokens: cut = keep the first tokens; windows = read overlapping windows of
    max_length tokens and average their logits (single texts)"""
    window_overlap: int | None = field(default=None, metadata=at_least(0))
    """tokens that two windows share; null = a quarter of max_length"""


@dataclass(frozen=True)
class TaskConfig:
    """What a label is."""

    type: Literal["single_label", "multi_label", "regression"] | None = None
    """single_label = each example has one class; multi_label = any number of labels; regression = a number, or one in
    each of label_columns; null = what the labels show"""
    separator: str | None = None
    """what separates the labels in a text (multi_label), such as '|'; it joins the labels of a prediction too;
    null = the labels are no text, and '|' joins predictions"""
    loss: Literal["squared_error", "huber"] = "squared_error"
    """loss of regression, in standard deviations of the target in train; huber grows linearly for errors above one"""


@dataclass(frozen=True)
class BatchConfig:
    """The global batch, and its split into micro-batches that fit the device."""

    size: int = field(default=32, metadata=at_least(1))
    """global batch: examples per optimizer step over all processes"""
    max_tokens: int | None = field(default=None, metadata=at_least(1))
    """token budget of a micro-batch, with padding; null = 2048 on a CPU, what fits on a GPU; never changes results"""
    eval_max_tokens: int | None = field(default=None, metadata=at_least(1))
    """token budget of an evaluation batch, with padding; null = chosen for the device"""


@dataclass(frozen=True)
class ModelConfig:
    """The backbone and how to compute it."""

    name: str = "FacebookAI/roberta-base"
    """hub id, local folder, or package:NAME/dir (a folder in an installed Python package)"""
    revision: str | None = None
    """branch, tag or commit of a hub model; null = main"""
    adapter: str | None = None
    """adapter folder of a finished run (runs/NAME/adapter) to start from; classes of the same name keep their rows of
    the head; null = new adapter and head"""
    dropout: float | None = field(default=None, metadata=BELOW_ONE)
    """dropout probability of the backbone's layers; null = the backbone's setting"""
    packed: Literal["auto"] | bool = "auto"
    """compute without padding; auto = if the family is packed (docs/backbones.md), true = refuse if it is not"""
    gradient_checkpointing: bool = False
    """true = keep no activations inside a layer, and compute them again for the gradient: less memory, more time; never
    changes results"""
    quantization: Literal["nf4"] | None = None
    """nf4 = keep the frozen matrices in 4 bits, through bitsandbytes, for peft_type LORA; null = in run.precision"""


@dataclass(frozen=True)
class PeftConfig:
    """The adapter: these four and the options of the PEFT method (r, lora_alpha, target_modules, ...)."""

    peft_type: str = "LORA"
    """PEFT method: LORA, IA3, LOHA, LOKR, OFT, VERA, ... (an unknown name lists all), or none = no adapter"""
    train: Literal["all", "bias"] | None = None
    """what trains with peft_type none: all = every weight (null too), bias = biases and head (BitFit)"""
    max_trainable_parameters: int | None = field(default=None, metadata=at_least(1))
    """maximum number of trained parameters, with the head; null = no limit"""
    fit_budget: bool = False
    """true = choose the largest rank r within max_trainable_parameters; it keeps lora_alpha / r as given (rounded), or
    lora_alpha itself with use_rslora"""
    options: dict[str, Any] = field(default_factory=dict)
    """options of the PEFT method, written as peft.NAME; null = PEFT's default, even if the recipe sets another"""


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer, the learning rate schedule and the loss."""

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    """adamw (decoupled weight decay), adam (weight decay added to the gradient) or sgd (no momentum)"""
    learning_rate: float = field(default=5e-5, metadata=at_least(0))
    """peak learning rate"""
    lora_b_lr_ratio: float | None = field(default=None, metadata=ABOVE_ZERO)
    """learning rate of LoRA's B as a multiple of learning_rate (LoRA+, with about 16); null = 1"""
    weight_decay: float = field(default=0.01, metadata=at_least(0))
    """weight decay of all trained weights except biases and norms"""
    betas: tuple[float, float] = field(default=(0.9, 0.999), metadata=BELOW_ONE)
    """decay rates of Adam's moments"""
    eps: float = field(default=1e-8, metadata=at_least(0))
    """Adam's epsilon"""
    max_grad_norm: float | None = field(default=1.0, metadata=ABOVE_ZERO)
    """gradients are clipped to this global L2 norm; null = no clipping"""
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """after the warm-up: linear or cosine down to final_lr_fraction, or constant"""
    warmup_fraction: float = field(default=0.0, metadata=FRACTION)
    """fraction of all steps in which the learning rate rises linearly from 0"""
    final_lr_fraction: float = field(default=0.0, metadata=FRACTION)
    """where linear and cosine end, as a fraction of the peak"""
    epochs: int = field(default=3, metadata=at_least(1))
    """passes over the training split"""
    max_steps: int | None = field(default=None, metadata=at_least(1))
    """optimizer steps of the whole run, overrides epochs; null = as many as the epochs need"""
    label_smoothing: float = field(default=0.0, metadata=BELOW_ONE)
    """probability mass of the target that is spread evenly over all classes (single_label)"""
    class_weights: Literal["balanced"] | dict[str, float] | None = None
    """{class name: weight} or balanced; null = 1 for all. single_label: weight of the examples of a class, balanced =
    inverse frequency. multi_label: weight of a label where it holds, balanced = negatives / positives"""


@dataclass(frozen=True)
class EvaluationConfig:
    """When the validation split is scored, and which score is better."""

    every_steps: int | None = field(default=None, metadata=at_least(1))
    """steps between evaluations; null = at the end of each epoch"""
    metric: str | None = None
    """what selects the best adapter: a metric of the task, such as accuracy, f1_macro, mcc, loss or f1/CLASS
    (an unknown name lists all). null = accuracy; multi_label: average_precision_macro; regression: loss"""
    patience: int | None = field(default=None, metadata=at_least(1))
    """evaluations without improvement after which training stops; null = never"""


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are saved, and how many are kept."""

    every_steps: int | None = field(default=None, metadata=at_least(1))
    """steps between checkpoints; null = at the end of each epoch"""
    keep_last: int = field(default=2, metadata=at_least(2))
    """number of checkpoints kept: if the newest is damaged, the one before it is used"""


@dataclass(frozen=True)
class TrackingConfig:
    """What is logged, and where."""

    every_steps: int = field(default=10, metadata=at_least(1))
    """steps between logged values"""
    backends: list[str] = field(default_factory=lambda: ["tensorboard"])
    """trackers of Accelerate (tensorboard, wandb, ...); [] = metrics.jsonl only"""


@dataclass(frozen=True)
class Config:
    """All options of a run."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    peft: PeftConfig = field(default_factory=PeftConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    recipe: str | None = field(default=None, compare=False)
    """name of the recipe; not an option"""


GROUPS: dict[str, Any] = {
    item.name: item.default_factory for item in dataclasses.fields(Config) if item.name != "recipe"
}
SPLITS = ("data.train", "data.validation", "data.test")
# Options that may change when a run resumes: none of them changes an example, a gradient or a score. The paths and the
# format of data files are here because the content of the data is compared instead (data/corpus.py).
CHANGEABLE_OPTIONS = {
    "run": {"name", "output_dir", "resume", "quiet"},
    "data": {"train", "validation", "test", "delimiter", "encoding", "quoting"},
    "batch": {"max_tokens", "eval_max_tokens"},
    "model": {"name", "revision", "adapter", "packed", "gradient_checkpointing"},
    "peft": {"max_trainable_parameters"},
    "checkpoint": {"every_steps", "keep_last"},
    "tracking": {"every_steps", "backends"},
}
RANKED_METHODS = {"LORA": "lora_alpha", "LOHA": "alpha", "HRA": None, "MISS": None, "VERA": None}
"""methods that train more parameters the higher r is; by method: the option that is divided by r"""
DEFAULT_RANK = DEFAULT_ALPHA = 8  # PEFT's, of the methods with an option that is divided by r
BY_CONTENT = ("data", "model")
NO_ADAPTER = "NONE"
"""peft.peft_type of a run without adapter"""
LORA_TYPES = ("LORA", "ADALORA")
"""methods of PEFT whose matrices are called lora_A and lora_B"""
DEFAULT_METRICS = {"single_label": "accuracy", "multi_label": "average_precision_macro", "regression": "loss"}
"""by task: evaluation.metric if it is null"""


def as_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Converts a configuration to plain nested values, as in config.yaml. PEFT's options are beside `peft_type`."""
    groups = {group: dataclasses.asdict(getattr(config, group)) for group in GROUPS}
    groups["peft"].update(groups["peft"].pop("options"))
    groups["optim"]["betas"] = list(config.optim.betas)
    return groups


def identity(config: Config, by_name: bool = False) -> dict[str, dict[str, Any]]:
    """Returns the options that change the result. Two runs are the same if these are equal.

    `by_name` keeps all options of data and model. A resume compares their content instead.
    """
    changeable = {group: names for group, names in CHANGEABLE_OPTIONS.items() if not by_name or group not in BY_CONTENT}
    return {
        group: {name: value for name, value in values.items() if name not in changeable.get(group, ())}
        for group, values in as_dict(config).items()
    }


def find_differences(before: Config, now: Config, by_name: bool) -> list[str]:
    """Names the options that make two runs different, each with both values."""
    there, here = identity(fill_recorded(before), by_name), identity(now, by_name)
    if now.run.precision == "auto":  # it keeps what it chose when the run began
        here["run"]["precision"] = there["run"]["precision"]
    if now.task.type is None:  # the run found it in its labels, which are compared too
        here["task"]["type"] = there["task"]["type"]
    if now.evaluation.metric is None:
        here["evaluation"]["metric"] = DEFAULT_METRICS.get(there["task"]["type"])
    if now.peft.fit_budget and before.peft.fit_budget and now.peft.peft_type == before.peft.peft_type:
        # the rank that the run chose; what it follows from is compared, the budget too
        here["peft"].update(with_rank(now.peft, before.peft.options.get("r", DEFAULT_RANK)).options)
        for side, settings in ((there, before.peft), (here, now.peft)):
            side["peft"]["max_trainable_parameters"] = settings.max_trainable_parameters
    return [
        f"{group}.{name} (there {there[group].get(name)!r}, now {here[group].get(name)!r})"
        for group in here
        for name in {**there[group], **here[group]}
        if there[group].get(name) != here[group].get(name)
    ]


def with_rank(settings: PeftConfig, rank: int) -> PeftConfig:
    """Options with this rank, for `peft.fit_budget`: the scale of the adapter's output stays as given.

    PEFT takes whole numbers, so lora_alpha is rounded. With use_rslora the scale hardly depends on r.
    """
    options, alpha = {**settings.options, "r": rank}, RANKED_METHODS[settings.peft_type]
    if alpha and options.get("use_rslora") is not True:
        ratio = options.get(alpha, DEFAULT_ALPHA) / settings.options.get("r", DEFAULT_RANK)
        options[alpha] = max(1, round(ratio * rank))
    return dataclasses.replace(settings, options=options)


def fill_task(config: Config, task: TaskConfig) -> Config:
    """Fills in the task that the labels showed, and its metric."""
    metric = config.evaluation.metric or DEFAULT_METRICS.get(task.type or "")
    return dataclasses.replace(config, task=task, evaluation=dataclasses.replace(config.evaluation, metric=metric))


def fill_recorded(config: Config) -> Config:
    """Fills in the task of a recorded run; where earlier versions recorded none, it is single_label."""
    return fill_task(config, dataclasses.replace(config.task, type=config.task.type or "single_label"))


def chosen_metric(config: Config) -> str:
    """The metric of a configuration with a task, see `fill_task`."""
    assert config.evaluation.metric is not None, "a task without a default is refused before"
    return config.evaluation.metric


def chosen_overlap(data: DataConfig) -> int | None:
    """The tokens that two windows of a long document share; None if it is cut."""
    if data.long_documents == "cut":
        return None
    return data.max_length // 4 if data.window_overlap is None else data.window_overlap


def resolve(source: str | Source, default: DataConfig | ResolvedSource) -> ResolvedSource:
    """Fills the null fields of a split from a default."""
    split = source if isinstance(source, Source) else Source(path=source)
    values = {name: getattr(default, name) if value is None else value for name, value in vars(split).items()}
    values["column_names"] = values["column_names"] or None
    values["text_pair_columns"] = values["text_pair_columns"] or []
    if split.label_column is not None and split.label_columns is None:
        values["label_columns"] = []  # the split's own column, not the columns of the default
    values["label_columns"] = values["label_columns"] or []
    return ResolvedSource(**values)


def run_name(config: Config) -> str:
    """Returns the name of the run folder: `run.name`, or the recipe's name, or "run"."""
    return config.run.name or config.recipe or "run"


def find_problems(config: Config) -> Iterator[str]:
    """Yields one line for each value out of range and each combination that cannot work."""
    yield from _find_values_out_of_range(config)
    data, optim = config.data, config.optim
    if optim.final_lr_fraction and optim.schedule == "constant":
        yield "optim.final_lr_fraction has no effect with optim.schedule constant; use linear or cosine"
    if config.peft.train is not None and config.peft.peft_type != NO_ADAPTER:
        yield f"peft.train {config.peft.train} is for peft.peft_type none; leave one of them out"
    if optim.lora_b_lr_ratio is not None and config.peft.peft_type not in LORA_TYPES:
        yield f"optim.lora_b_lr_ratio has no effect with peft.peft_type {config.peft.peft_type}; leave it out"
    if optim.name == "sgd" and config.peft.peft_type == "ADALORA":
        yield "optim.name sgd does not keep what peft.peft_type ADALORA learns of its ranks; use adamw or adam"
    if optim.name == "sgd" and config.run.precision == "fp16":
        yield "optim.name sgd with run.precision fp16: small gradients are lost; use bf16 or adamw"
    if not data.train:
        yield "data.train is missing: --data.train FILE (csv, tsv, json, jsonl, parquet) or hub id, or a --recipe"
    sources = {"data.": resolve("", data)}
    for key in SPLITS:
        source = getattr(data, key.partition(".")[2])
        if source == "" and key != "data.train":
            yield f"{key} is empty; use null for no split"
        if isinstance(source, Source):
            sources[f"{key}."] = resolve(source, data)
    for prefix, resolved in sources.items():
        yield from find_source_problems(prefix, resolved)
        if resolved.label_columns and config.task.type == "single_label":
            yield f"{prefix}label_columns: for task.type single_label use label_column, with one column"
        if resolved.text_pair_columns and data.long_documents == "windows":
            yield f"{prefix}text_pair_columns: data.long_documents windows is for single texts; for pairs use cut"
    yield from _find_task_problems(config.task)
    if config.peft.fit_budget:
        yield from _find_budget_problems(config.peft)
    if data.window_overlap is not None and data.long_documents == "cut":
        yield "data.window_overlap has no effect with data.long_documents cut; use windows"
    if data.validation is None and data.validation_fraction == 0 and config.evaluation.patience is not None:
        yield "evaluation.patience needs a validation split, but data.validation_fraction is 0"
    name = run_name(config)
    is_folder_name = re.fullmatch(r"(?!\.\.?$)[^/\\]+", name) and name.isprintable() and len(name.encode()) <= 200
    if config.run.name == "" or not is_folder_name:
        yield f"run.name: {config.run.name!r} must be a folder name, not a path (see run.output_dir)"


def _find_budget_problems(peft: PeftConfig) -> Iterator[str]:
    if peft.max_trainable_parameters is None:
        yield "peft.fit_budget needs a budget; add --peft.max_trainable_parameters NUMBER"
    if peft.peft_type not in RANKED_METHODS:
        known = ", ".join(RANKED_METHODS)
        yield f"peft.fit_budget: {peft.peft_type} has no rank to choose, or is not supported; supported: {known}"
    for name in ("r", "lora_alpha", "alpha"):
        value = peft.options.get(name, 1)
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            yield f"peft.{name}: {value!r} must be a number above 0"
    for name in ("rank_pattern", "alpha_pattern"):
        if peft.options.get(name):
            yield f"peft.{name}: peft.fit_budget chooses one rank for all modules; leave one of them out"


def _find_task_problems(task: TaskConfig) -> Iterator[str]:
    if task.separator == "":
        yield "task.separator is empty; use null for none, or a text such as '|'"
    elif task.separator is not None and task.type not in (None, "multi_label"):
        yield f"task.separator {task.separator!r} is for task.type multi_label; leave one of them out"
    elif task.loss != TaskConfig.loss and (task.separator is not None or task.type not in (None, "regression")):
        yield f"task.loss {task.loss} is for task.type regression; leave it out"


def _find_values_out_of_range(config: Config) -> Iterator[str]:
    for group, kind in GROUPS.items():
        for item in dataclasses.fields(kind):
            value = getattr(getattr(config, group), item.name)
            numbers = value if isinstance(value, tuple) else (value,)
            accepts = item.metadata.get("accepts")
            if accepts and value is not None and not all(map(accepts, numbers)):
                shown = list(value) if isinstance(value, tuple) else value
                yield f"{group}.{item.name}: {shown} must be {item.metadata['range']}"


def find_source_problems(prefix: str, source: ResolvedSource) -> Iterator[str]:
    """Yields one line for each invalid setting of a source. The prefix begins its options."""
    if source.text_columns == []:
        yield f"{prefix}text_columns is empty: name at least one column"
    texts = {*source.text_columns, *source.text_pair_columns}
    if source.label_column in texts and not source.label_columns:
        yield f"{prefix}label_column {source.label_column!r} is also a text column"
    if both := [column for column in source.label_columns if column in texts]:
        yield f"{prefix}label_columns: {both[0]!r} is also a text column"
    if len(source.label_columns) == 1 or len(set(source.label_columns)) < len(source.label_columns):
        yield f"{prefix}label_columns: {source.label_columns} must name at least two columns, each once"
    delimiter, encoding = source.delimiter, source.encoding
    if delimiter is not None and (len(delimiter.replace("\\t", "\t")) != 1 or delimiter in '"\r\n'):
        yield f"{prefix}delimiter: {delimiter!r} must be one character, such as ';' or '\\t'"
    try:
        "".encode(encoding)
    except (LookupError, ValueError):  # unknown, or not for text
        yield f"{prefix}encoding: {encoding!r} is unknown; known: utf-8, utf-16, cp1252, latin-1, gb18030, ..."
    names = source.label_names
    listed = list(names.values()) if isinstance(names, dict) else names or []
    if names is not None and (not listed or not all(str(name).strip() for name in listed)):
        yield f"{prefix}label_names: {names!r} has no name, or an empty one"
    first: dict[str | None, int] = {}  # 1 and 1.0 are the same label
    twice = [name for i, name in enumerate(names or ()) if first.setdefault(label_text(name), i) != i]
    if twice:
        yield f"{prefix}label_names: {twice[0]!r} is given twice"
