"""The configuration: nine frozen groups, read from a recipe and the command line.

Always holds: a `Config` that left `parse_config` has only known keys, right types and possible combinations; whatever
is wrong with it is reported at once, every problem on a line of its own. Imports no torch, so `--help` is quick.

The option list, its types and its help text are these dataclasses and their field docstrings; jsonargparse does the
reading. `peft` is open: it takes PEFT's own names, checked against PEFT's own config class in `model.py`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import yaml

RECIPES = Path(__file__).resolve().parent / "recipes"


class UserError(Exception):
    """A mistake the user can mend: one or two lines, shown without a traceback; the program ends with exit code 2."""


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
    """arithmetic of the frozen part; auto = what accelerate was launched with, else the device's best"""
    quiet: bool = False
    """true = print nothing but errors"""


@dataclass(frozen=True)
class Source:
    """One split whose layout differs from the data group's; null fields are taken from there."""

    path: str
    """hub id, file or glob"""
    column_names: list[str] | None = None
    """names of the columns of a file without a header"""
    text_columns: list[str] | None = None
    """columns that hold the text, joined by a space"""
    text_pair_columns: list[str] | None = None
    """columns that hold the second text of a pair"""
    label_column: str | None = None
    """column that holds the label"""
    label_names: list[str | int] | dict[str, str | int] | None = None
    """class names in order, or {value in the file: class name}"""


@dataclass(frozen=True)
class DataConfig:
    """Where the examples are and how to read them."""

    train: str | Source | None = None
    """training split: hub id (owner/name[/config][:split]), or csv, tsv, json, jsonl, parquet file or glob"""
    validation: str | Source | None = None
    """validation split; null = a stratified fraction of train"""
    test: str | Source | None = None
    """test split, scored once at the end with the best adapter; null = none"""
    validation_fraction: float = 0.1
    """fraction of train held out for validation where `validation` is null, in [0, 1); 0 = no validation"""
    column_names: list[str] | None = None
    """names of the columns of files without a header; null = the first row is the header"""
    text_columns: list[str] = field(default_factory=lambda: ["text"])
    """columns that hold the text, joined by a space"""
    text_pair_columns: list[str] | None = None
    """columns that hold the second text of a pair, joined by a space; null = single texts"""
    label_column: str = "label"
    """column that holds the label, by name or by number"""
    label_names: list[str | int] | dict[str, str | int] | None = None
    """class names in order (numbers then count from 0), or {value in the data: class name}; null = as found, sorted"""
    max_length: int = 512
    """longest example in tokens, special tokens included; the rest of a text is cut off"""


@dataclass(frozen=True)
class BatchConfig:
    """How many examples an optimizer step sees, and how they are cut to fit the device."""

    size: int = 32
    """global batch: examples per optimizer step, over all processes"""
    max_tokens: int | None = None
    """padded tokens of one micro-batch on one process; null = chosen for the device. Never changes the result"""
    eval_max_tokens: int | None = None
    """padded tokens of one evaluation batch on one process; null = chosen for the device"""


@dataclass(frozen=True)
class ModelConfig:
    """The backbone."""

    name: str = "FacebookAI/roberta-base"
    """hub id, local folder, or package:NAME/dir (a backbone inside an installed Python package)"""
    revision: str | None = None
    """branch, tag or commit of a hub model; null = main"""
    dropout: float | None = None
    """dropout of the backbone's own layers, in [0, 1); null = the backbone's own"""


@dataclass(frozen=True)
class PeftConfig:
    """The adapter: PEFT's own names (r, lora_alpha, target_modules, ...) beside these two."""

    peft_type: str = "LORA"
    """PEFT method: LORA, IA3, LOHA, LOKR, OFT, BOFT, VERA, ... (PEFT's own list)"""
    max_trainable_parameters: int | None = None
    """budget over all that trains, the head included; exceeding it is an error. null = no budget"""
    options: dict[str, Any] = field(default_factory=dict)
    """PEFT's own options of that method, written as peft.NAME"""


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
    schedule: Literal["linear", "cosine", "cosine_annealing", "constant"] = "cosine"
    """after the warm-up: linear or cosine to 0, cosine_annealing to final_lr_fraction, or constant"""
    warmup_fraction: float = 0.0
    """fraction of all steps over which the learning rate rises linearly from 0, in [0, 1]"""
    final_lr_fraction: float = 0.0
    """floor of cosine_annealing as a fraction of the peak, in [0, 1]"""
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
    recipe: str | None = None


GROUPS: dict[str, type] = {
    "run": RunConfig,
    "data": DataConfig,
    "batch": BatchConfig,
    "model": ModelConfig,
    "peft": PeftConfig,
    "optim": OptimConfig,
    "evaluation": EvaluationConfig,
    "checkpoint": CheckpointConfig,
    "tracking": TrackingConfig,
}

# What may differ between a run and its continuation: nothing here changes an example, a gradient or a score. The paths
# of the data are left out because the content they lead to is compared instead (see data.py).
NOT_IDENTITY = {
    "run": {"name", "output_dir", "resume", "quiet"},
    "data": {"train", "validation", "test"},
    "batch": {"max_tokens", "eval_max_tokens"},
    "model": {"name", "revision"},
    "checkpoint": {"every_steps", "keep_last"},
    "tracking": {"every_steps", "backends"},
}


def option_names() -> list[str]:
    """All accepted options but PEFT's own, as `group.field`, in the order of the groups."""
    return [
        f"{group}.{item.name}"
        for group, kind in GROUPS.items()
        for item in dataclasses.fields(kind)
        if f"{group}.{item.name}" != "peft.options"
    ]


def parse_config(argv: Sequence[str]) -> Config:
    """Reads `--recipe NAME-or-PATH` and `--group.field value` overrides.

    Order: defaults < recipe < command line.

    Example: ["--recipe", "quickstart", "--optim.learning_rate", "1e-4"]

    Raises:
        UserError: every problem found, one line each.
        SystemExit: after `--help`.
    """
    parser = _parser()
    if {"-h", "--help"} & set(argv):
        parser.print_help()
        raise SystemExit(0)
    problems: list[str] = []
    overrides = dict(_command_line(argv, problems))
    recipe = overrides.pop("recipe", None)
    settings = _recipe_settings(_recipe_path(recipe)) if recipe else {}
    peft_options: dict[str, Any] = {}
    accepted: dict[str, Any] = {}
    for key, value, origin in [
        *((key, value, f"in {recipe}") for key, value in settings.items()),
        *((key, value, "on the command line") for key, value in overrides.items()),
    ]:
        group, _, name = key.partition(".")
        if group == "peft" and name and name not in {"peft_type", "max_trainable_parameters", "options"}:
            peft_options[name] = _yaml(value) if isinstance(value, str) and origin == "on the command line" else value
            continue
        problem = _problem_of(parser, key, value)
        if problem:
            problems.append(f"{problem} ({origin})")
        else:
            accepted[key] = value
    if problems:
        raise UserError("\n".join(problems))
    namespace = parser.instantiate(parser.parse_object(_nested(accepted)))
    config = Config(**{group: namespace[group] for group in GROUPS}, recipe=_recipe_name(recipe))
    peft = dataclasses.replace(config.peft, options=peft_options, peft_type=config.peft.peft_type.upper())
    config = dataclasses.replace(config, peft=peft, data=_with_text_labels(config.data))
    if problems := list(_impossible(config)):
        raise UserError("\n".join(problems))
    return config


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


def save_config(config: Config, path: Path) -> None:
    """Writes a recipe that gives this very configuration again."""
    path.write_text(yaml.safe_dump(as_dict(config), sort_keys=False, allow_unicode=True), encoding="utf-8")


def load_config(path: Path) -> Config:
    """The configuration that `save_config` wrote.

    Raises:
        UserError: the file is missing or not a configuration.
    """
    return parse_config(["--recipe", str(path)])


def load_finished_run(folder: Path) -> tuple[Config, list[str]]:
    """Configuration and class names of a run with a saved adapter.

    Raises:
        UserError: the folder is no run, or the run is not finished.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(f"--run: {folder} is not a run folder (no config.yaml)")
    if not (folder / "summary.json").is_file():
        raise UserError(f"--run: {folder} is not finished; type its training command again to finish it")
    try:
        label_names = json.loads((folder / "adapter" / "labels.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--run: {folder}: adapter/labels.json cannot be read: {error}") from None
    return load_config(folder / "config.yaml"), [str(name) for name in label_names]


def run_name(config: Config) -> str:
    """Name of the run's folder: `run.name`, else the recipe's, else "run"."""
    return config.run.name or config.recipe or "run"


def main_guard(main: Any) -> int:
    """Calls an entry point; a `UserError`, or a disk's, becomes its lines on stderr and exit code 2.

    Only the first process of a machine prints, since all of them meet the same mistake.
    """
    try:
        return int(main() or 0)
    except BrokenPipeError:  # the reader of our output has seen enough, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, OSError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


def _parser() -> jsonargparse.ArgumentParser:
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog="run.py",
        exit_on_error=False,
        description="Fine-tunes a text classifier. Order: defaults < recipe < command line.",
        epilog=f"Recipes: {', '.join(_recipe_names())}. PEFT's own options are written --peft.NAME, as --peft.r 16.",
    )
    parser.add_argument("--recipe", type=str | None, help="name of a shipped recipe, or path of a yaml file")
    for group, kind in GROUPS.items():
        parser.add_argument(f"--{group}", type=kind)
    return parser


def _command_line(argv: Sequence[str], problems: list[str]) -> Iterator[tuple[str, str]]:
    """Pairs of `--key value` and `--key=value`; what is neither is added to `problems`."""
    words = iter(argv)
    for word in words:
        if not word.startswith("--"):
            problems.append(f"unexpected argument {word!r}: options are written --group.field value")
            continue
        key, equals, value = word[2:].partition("=")
        if not equals:
            following = next(words, None)
            if following is None:
                problems.append(f"--{key} needs a value")
                continue
            value = following
        yield key, value


def _problem_of(parser: jsonargparse.ArgumentParser, key: str, value: Any) -> str | None:
    """What is wrong with one setting, or None."""
    known = option_names()
    group, _, name = key.partition(".")
    is_source_field = group == "data" and name.split(".")[0] in {"train", "validation", "test"}
    if key not in known and not is_source_field:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5) or difflib.get_close_matches(
            name or key, [option.partition(".")[2] for option in known], n=1
        )
        full = [option for option in known if near and (option == near[0] or option.endswith("." + near[0]))]
        hint = f"; nearest: {full[0]}" if full else f"; groups: {', '.join(GROUPS)}"
        return f"unknown option {key!r}{hint}"
    # one field of a split's own layout is no Source by itself: the path that completes it stands elsewhere
    context = {key.rpartition(".")[0] + ".path": "file"} if key.count(".") == 2 else {}
    try:
        parser.parse_object(_nested({**context, key: value}))
    except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
        expected = [line.strip(" -") for line in str(error).splitlines() if "xpected" in line or "accept" in line]
        wanted = " or ".join(line.split("Got value")[0].replace("Expected a ", "").strip(" .") for line in expected)
        return f"{key}: {value!r} does not fit; wanted {_plain_type(wanted) or str(error).splitlines()[0]}"
    return None


def _plain_type(text: str) -> str:
    """jsonargparse's words for a type, without the Python around it."""
    for old, new in (("<class '", ""), ("'>", ""), ("typing.", ""), ("NoneType", "null"), ("Literal", "one of ")):
        text = text.replace(old, new)
    return text


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} -> {"a": {"b": 1}}"""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = key.split(".")
        level = nested
        for parent in parents:
            inner = level.setdefault(parent, {})
            # `data.test: x.csv` in a recipe, then `--data.test.label_column y`: the recipe's path stays
            level[parent] = {"path": inner} if isinstance(inner, str) else inner
            level = level[parent]
        level[last] = value
    return nested


def _recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def _recipe_name(recipe: str | None) -> str | None:
    return Path(recipe).stem if recipe else None


def _recipe_path(recipe: str) -> Path:
    path = Path(recipe)
    if path.suffix in {".yaml", ".yml"} or path.is_file():
        if not path.is_file():
            raise UserError(f"--recipe: no file {recipe!r}")
        return path.resolve()
    if recipe not in _recipe_names():
        near = difflib.get_close_matches(recipe, _recipe_names(), n=1, cutoff=0.4)
        hint = f"nearest: {near[0]}" if near else f"shipped: {', '.join(_recipe_names())}"
        raise UserError(f"--recipe: unknown recipe {recipe!r}; {hint} (or give the path of a .yaml file)")
    return RECIPES / f"{recipe}.yaml"


def _yaml(text: str) -> Any:
    """YAML as jsonargparse reads it: `1e-4` is a number and `no` a word, unlike in plain PyYAML.

    Raises:
        UserError: not YAML.
    """
    try:
        return jsonargparse.get_loader("yaml")(text)
    except Exception as error:
        raise UserError(f"not readable as YAML: {' '.join(str(error).split())[:200]}") from None


def _recipe_settings(path: Path) -> dict[str, Any]:
    """A recipe's settings as {"group.field": value}; its relative paths that exist beside it are made absolute."""
    try:
        groups = _yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, UserError) as error:
        raise UserError(f"--recipe: cannot read {path}: {error}") from None
    if not isinstance(groups, dict) or not all(isinstance(values, dict) for values in groups.values()):
        raise UserError(f"--recipe: {path} must hold groups of settings ({', '.join(GROUPS)})")
    flat = {f"{group}.{name}": value for group, values in groups.items() for name, value in values.items()}
    for key in ("data.train", "data.validation", "data.test", "model.name"):
        value = flat.get(key)
        if isinstance(value, str):
            flat[key] = _beside(path, value)
        elif isinstance(value, dict) and isinstance(value.get("path"), str):
            flat[key] = {**value, "path": _beside(path, value["path"])}
    return flat


def _beside(recipe: Path, value: str) -> str:
    if not Path(value).is_absolute() and next(recipe.parent.glob(value), None) is not None:
        return str(recipe.parent / value)
    return value


def _with_text_labels(data: DataConfig) -> DataConfig:
    """YAML reads 1 in {1: World} and [1, 2] as a number; labels are compared as text."""

    def as_text(names: Any) -> Any:
        if isinstance(names, dict):
            return {str(value): str(name) for value, name in names.items()}
        return [str(name) for name in names] if names is not None else None

    def split_as_text(split: Any) -> Any:
        return (
            dataclasses.replace(split, label_names=as_text(split.label_names)) if isinstance(split, Source) else split
        )

    splits = {name: split_as_text(getattr(data, name)) for name in ("train", "validation", "test")}
    return dataclasses.replace(data, label_names=as_text(data.label_names), **splits)


def _impossible(config: Config) -> Iterator[str]:
    """Values out of range and combinations that cannot work, a line each."""
    data, optim, evaluation = config.data, config.optim, config.evaluation
    at_least = {
        "run.seed": (config.run.seed, 0),
        "data.max_length": (data.max_length, 4),
        "batch.size": (config.batch.size, 1),
        "batch.max_tokens": (config.batch.max_tokens, 1),
        "batch.eval_max_tokens": (config.batch.eval_max_tokens, 1),
        "peft.max_trainable_parameters": (config.peft.max_trainable_parameters, 1),
        "optim.learning_rate": (optim.learning_rate, 0),
        "optim.weight_decay": (optim.weight_decay, 0),
        "optim.eps": (optim.eps, 0),
        "optim.epochs": (optim.epochs, 1),
        "optim.max_steps": (optim.max_steps, 1),
        "evaluation.every_steps": (evaluation.every_steps, 1),
        "evaluation.patience": (evaluation.patience, 1),
        "checkpoint.every_steps": (config.checkpoint.every_steps, 1),
        "checkpoint.keep_last": (config.checkpoint.keep_last, 2),
        "tracking.every_steps": (config.tracking.every_steps, 1),
    }
    for key, (value, least) in at_least.items():
        if value is not None and not (least <= value < float("inf")):
            yield f"{key}: {value} must be at least {least}"
    below_one = {
        "data.validation_fraction": data.validation_fraction,
        "model.dropout": config.model.dropout,
        "optim.label_smoothing": optim.label_smoothing,
        "optim.betas": max(optim.betas),
        "optim.betas ": min(optim.betas),
    }
    for key, fraction in below_one.items():
        if fraction is not None and not 0 <= fraction < 1:
            yield f"{key.strip()}: {fraction} must be in [0, 1)"
    for key, fraction in {
        "optim.warmup_fraction": optim.warmup_fraction,
        "optim.final_lr_fraction": optim.final_lr_fraction,
    }.items():
        if not 0 <= fraction <= 1:
            yield f"{key}: {fraction} must be in [0, 1]"
    if optim.max_grad_norm is not None and not 0 < optim.max_grad_norm < float("inf"):
        yield f"optim.max_grad_norm: {optim.max_grad_norm} must be above 0 (null = no clipping)"
    if optim.final_lr_fraction and optim.schedule != "cosine_annealing":
        yield f"optim.final_lr_fraction belongs to schedule cosine_annealing, not to {optim.schedule}"
    if optim.name == "sgd" and config.run.precision == "fp16":
        yield "optim.name sgd with run.precision fp16: gradients this small are lost; use bf16 or adamw"
    if data.train is None:
        yield "data.train is missing: --data.train FILE (csv, tsv, json, jsonl, parquet) or hub id, or a --recipe"
    if not data.text_columns:
        yield "data.text_columns is empty: name at least one column"
    texts = [*data.text_columns, *(data.text_pair_columns or [])]
    if data.label_column in texts:
        yield f"data.label_column {data.label_column!r} is also a text column"
    if data.validation is None and data.validation_fraction == 0 and evaluation.patience is not None:
        yield "evaluation.patience needs a validation split; data.validation_fraction is 0"
    name = run_name(config)
    if name in {".", ".."} or "/" in name or "\\" in name or "\0" in name:
        yield f"run.name: {name!r} must be a folder name, not a path (see run.output_dir)"
