"""The configuration: nine frozen groups, read from a recipe and the command line.

Always holds: a `Config` that left `parse_config` has only known keys, right types and possible combinations; whatever
is wrong with it is reported at once, every problem on a line of its own. Imports no torch, so `--help` is quick.

The option list, its types and its help text are these dataclasses and their field docstrings; jsonargparse does the
reading. `peft` is open: it takes PEFT's own names, checked against PEFT's own config class in `model.py`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import glob
import json
import os
import re
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
    recipe: str | None = field(default=None, compare=False)
    """name of the recipe it was read from; no setting"""


GROUPS: dict[str, Any] = {
    item.name: item.default_factory for item in dataclasses.fields(Config) if item.name != "recipe"
}
SPLITS = ("data.train", "data.validation", "data.test")
# The type of each option, as written above; a split may have fields of its own (`data.test.label_names`).
_TYPES: dict[str, str] = {
    f"{prefix}.{item.name}": str(item.type)
    for prefix, kind in (*GROUPS.items(), *((split, Source) for split in SPLITS))
    for item in dataclasses.fields(kind)
    if item.name != "options"
}

# What may differ between a run and its continuation: nothing here changes an example, a gradient or a score. The paths
# of the data are left out because the content they lead to is compared instead (see data.py).
NOT_IDENTITY = {
    "run": {"name", "output_dir", "resume", "quiet"},
    "data": {"train", "validation", "test"},
    "batch": {"max_tokens", "eval_max_tokens"},
    "model": {"name", "revision"},
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


def option_names() -> list[str]:
    """All accepted options but PEFT's own, as `group.field`, in the order of the groups."""
    return [key for key in _TYPES if key.count(".") == 1]


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
    given = _command_line(argv, problems)
    recipe = given.pop("recipe", None)
    settings = [
        *((key, value, f"in {recipe}") for key, value in _recipe_settings(recipe, problems).items()),
        *((key, value, "on the command line") for key, value in _flat(given).items()),
    ]
    pairs = [(key, value) for key, value, _ in settings]
    if not _fit(parser, pairs):  # one by one is slow, and needed only to say what is wrong
        found = ((_problem_of(parser, key, value), origin) for key, value, origin in settings)
        problems += [f"{problem} ({origin})" for problem, origin in found if problem]
    _refuse(problems)
    config = _built(parser, pairs, Path(recipe).stem if recipe else None)
    _refuse(list(_impossible(config)))
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
    text = yaml.dump(as_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    path.write_text(text, encoding="utf-8")


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


@functools.cache
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


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))


def _built(parser: jsonargparse.ArgumentParser, settings: Sequence[tuple[str, Any]], recipe: str | None) -> Config:
    """The configuration from settings that are right one by one; a later one stands over an earlier one.

    Raises:
        UserError: a split's layout without a path.
    """
    nested = _nested([(key, value) for key, value in settings if not _is_peft_option(key)])
    for split in SPLITS:
        layout = nested.get("data", {}).get(split.partition(".")[2])
        if isinstance(layout, dict) and not layout.get("path"):
            raise UserError(f"{split} has a layout and no path: --{split} FILE")
    namespace = parser.instantiate(parser.parse_object(nested))
    config = Config(**{group: namespace[group] for group in GROUPS}, recipe=recipe)
    options = {key.removeprefix("peft."): value for key, value in settings if _is_peft_option(key)}
    peft = dataclasses.replace(config.peft, options=options, peft_type=config.peft.peft_type.upper())
    return dataclasses.replace(config, peft=peft, data=_with_text_labels(config.data))


def _command_line(argv: Sequence[str], problems: list[str]) -> dict[str, Any]:
    """Values of `--key value` and `--key=value`, the last of each; what is neither is added to `problems`."""
    given: dict[str, Any] = {}
    words = list(argv)
    while words:
        key, equals, value = words.pop(0).partition("=")
        if not key.startswith("--"):
            problems.append(f"unexpected argument {key!r}: options are written --group.field value")
            continue
        if not equals:
            if not words or words[0].startswith("--"):
                problems.append(f"{key} needs a value")
                continue
            value = words.pop(0)
        key = key.removeprefix("--")
        if key == "recipe" and "recipe" in given:
            problems.append("--recipe is given twice")
        try:
            value.encode()
            given[key] = _value(key, value)
        except UnicodeEncodeError:
            problems.append(f"{key}: {value!r} is not UTF-8")
        except UserError as error:
            problems.append(f"{key}: {error}")
    # a split's path first: `--data.test.label_column y --data.test x.csv` belongs together in either order
    return dict(sorted(given.items(), key=lambda item: item[0].count(".") > 1))


def _value(key: str, text: str) -> Any:
    """A value of the command line. PEFT's options, lists and mappings are YAML; the rest is read by its type."""
    kind = _TYPES.get(key, "")
    opening = ("{",) if "Source" in kind else ("{", "[") if "[" in kind else ()
    return _yaml(text) if _is_peft_option(key) or (opening and text.startswith(opening)) else text


def _is_peft_option(key: str) -> bool:
    return key.startswith("peft.") and key not in _TYPES and key not in {"peft.", "peft.options"}


def _fit(parser: jsonargparse.ArgumentParser, settings: Sequence[tuple[str, Any]]) -> bool:
    """Whether settings have known names and right types. PEFT's are checked against its own class in model.py."""
    ours = [(key, value) for key, value in settings if not _is_peft_option(key)]
    if not all(key in _TYPES for key, _ in ours):
        return False
    try:
        parser.parse_object(_nested(ours))
    except (jsonargparse.ArgumentError, ValueError, TypeError):
        return False
    return True


def _problem_of(parser: jsonargparse.ArgumentParser, key: str, value: Any) -> str | None:
    """What is wrong with one setting, or None."""
    # one field of a split's own layout is no Source by itself: the path that completes it stands elsewhere
    context = [(key.rpartition(".")[0] + ".path", "file")] if key.count(".") == 2 else []
    if _fit(parser, [*context, (key, value)]):
        return None
    if key not in _TYPES:
        return f"unknown option {key!r}; {_nearest(key)}"
    hint = f"; write [{value}]" if _TYPES[key].startswith("list") and isinstance(value, str) else ""
    return f"{key}: {value!r} does not fit; wanted {_in_words(_TYPES[key])}{hint}"


def _nearest(key: str) -> str:
    """The option most like an unknown one, by its whole name, else by its last part."""
    options = list(_TYPES) if key.count(".") > 1 else option_names()
    last_parts = {option.rpartition(".")[2]: option for option in reversed(options)}
    near = difflib.get_close_matches(key, options, n=1, cutoff=0.8)
    near = near or difflib.get_close_matches(key.rpartition(".")[2], last_parts, n=1)
    if near:
        return f"nearest: {last_parts.get(near[0], near[0])}"
    group = key.partition(".")[0]
    fields = [option.partition(".")[2] for option in option_names() if option.startswith(f"{group}.")]
    return f"{group} has {', '.join(fields)}" if fields else f"groups: {', '.join(GROUPS)}"


def _in_words(kind: str) -> str:
    """'Literal["a", "b"] | None' -> 'a or b or null'"""
    choices = re.sub(r"Literal\[(.*?)\]", lambda match: match[1].replace('"', "").replace(", ", " | "), kind)
    return choices.replace(" | Source", "").replace(" | ", " or ").replace("None", "null")


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """{"data.test": {"path": "x.csv"}} -> {"data.test.path": "x.csv"}; other settings stay as they are."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if key in SPLITS and isinstance(value, dict):
            flat |= {f"{key}.{name}": item for name, item in value.items()}
        else:
            flat[key] = value
    return flat


def _nested(flat: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """[("a.b", 1)] -> {"a": {"b": 1}}"""
    nested: dict[str, Any] = {}
    for key, value in flat:
        *parents, last = key.split(".")
        level = nested
        for parent in parents:
            inner = level.get(parent, {})
            # `data.test: x.csv` in a recipe, then `--data.test.label_column y`: the recipe's path stays
            level[parent] = inner if isinstance(inner, dict) else {"path": inner}
            level = level[parent]
        level[last] = value
    return nested


def _recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def _recipe_path(recipe: str) -> Path:
    path = Path(recipe)
    if path.suffix in {".yaml", ".yml"} or path.is_file():
        if not path.is_file():
            raise UserError("no such file")
        return path.resolve()
    if recipe not in _recipe_names():
        near = difflib.get_close_matches(recipe, _recipe_names(), n=1, cutoff=0.4)
        hint = f"nearest: {near[0]}" if near else f"shipped: {', '.join(_recipe_names())}"
        raise UserError(f"no such recipe; {hint} (or give the path of a .yaml file)")
    return RECIPES / f"{recipe}.yaml"


def _recipe_settings(recipe: str | None, problems: list[str]) -> dict[str, Any]:
    """A recipe's settings as {"group.field": value}; its relative paths that exist beside it are made absolute."""
    if recipe is None:
        return {}
    try:
        path = _recipe_path(recipe)
        groups = _yaml(path.read_text(encoding="utf-8-sig"))
        if not isinstance(groups, dict) or not all(isinstance(values, dict | None) for values in groups.values()):
            raise UserError(f"it must hold groups of settings ({', '.join(GROUPS)})")
    except (OSError, UnicodeDecodeError, UserError) as error:
        problems.append(f"--recipe {recipe}: {error}")
        return {}
    flat = _flat(
        {f"{group}.{name}": value for group, values in groups.items() for name, value in (values or {}).items()}
    )
    for key in ("model.name", *SPLITS, *(f"{split}.path" for split in SPLITS)):
        if isinstance(flat.get(key), str):
            flat[key] = _beside(path, flat[key])
    return flat


def _beside(recipe: Path, value: str) -> str:
    here = recipe.parent / value
    if value and not Path(value).is_absolute() and (here.exists() or glob.glob(str(here))):
        return str(here)
    return value


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: `no` is a word and `1e-4` a number. A key twice in one mapping is an error."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in pairs if tag.endswith((":null", ":merge"))]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [str(key.value) for key, _ in node.value]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"{twice!r} stands twice in line {node.start_mark.line + 1} and below")
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes whatever some YAML reader could take for a number or a truth value: "1e-4", "no"."""


_FLOAT = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$|[-+]?\.(inf|nan)$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(true|True|false|False)$"), list("tTfF"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def _yaml(text: str) -> Any:
    """YAML text -> plain values.

    Raises:
        UserError: not YAML, or nothing a setting could hold.
    """
    try:
        value = yaml.load(text, Loader=_Loader)
        json.dumps(value, default=str)  # refuses an alias that leads back to itself
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"not readable as YAML: {' '.join(str(error).split())[:200]}") from None
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
    yield from _out_of_range(config)
    data, optim = config.data, config.optim
    if optim.final_lr_fraction and optim.schedule != "cosine_annealing":
        yield f"optim.final_lr_fraction belongs to schedule cosine_annealing, not to {optim.schedule}"
    if optim.name == "sgd" and config.run.precision == "fp16":
        yield "optim.name sgd with run.precision fp16: gradients this small are lost; use bf16 or adamw"
    if not data.train:
        yield "data.train is missing: --data.train FILE (csv, tsv, json, jsonl, parquet) or hub id, or a --recipe"
    for key, layout in {"data": data, **{split: getattr(data, split.partition(".")[2]) for split in SPLITS}}.items():
        if layout == "" and key != "data.train":
            yield f"{key} is empty; null = none"
        if isinstance(layout, DataConfig | Source):
            yield from _impossible_layout(key, layout)
    if data.validation is None and data.validation_fraction == 0 and config.evaluation.patience is not None:
        yield "evaluation.patience needs a validation split; data.validation_fraction is 0"
    name = run_name(config)
    if name in {".", ".."} or config.run.name == "" or set(name) & set("/\\\0\n") or len(name.encode()) > 200:
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
    names = layout.label_names
    listed = list(names.values()) if isinstance(names, dict) else names or []
    if names is not None and (not listed or not all(str(name).strip() for name in listed)):
        yield f"{key}.label_names: {names!r} has no name, or an empty one"
    if isinstance(names, list) and len(set(names)) < len(names):
        yield f"{key}.label_names: {next(n for n in names if names.count(n) > 1)!r} stands twice"
