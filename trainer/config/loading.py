"""Reads recipes and the command line into a `Config`, and writes a `Config` to a file.

A `Config` from `parse_config` has only known keys, valid types and valid combinations. All problems are reported at
once, each on its own line. jsonargparse checks the types. Recipes are YAML 1.2: `1e-4` is a number and `no` is text.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import glob
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from trainer.config.schema import GROUPS, SPLITS, Config, Source, as_dict, fill_recorded, find_problems
from trainer.errors import UserError, one_line

RECIPES = Path(__file__).resolve().parents[1] / "recipes"

# The type of each option, as declared in the schema. A split may have its own settings (`data.test.label_names`).
_TYPES: dict[str, str] = {
    f"{prefix}.{item.name}": str(item.type)
    for prefix, kind in (*GROUPS.items(), *((split, Source) for split in SPLITS))
    for item in dataclasses.fields(kind)
    if item.name != "options"
}


def option_names() -> list[str]:
    """Returns all options except those of PEFT, as `group.field`, in the order of the groups."""
    return [key for key in _TYPES if key.count(".") == 1]


def parse_config(argv: Sequence[str]) -> Config:
    """Parses `--recipe NAME-or-PATH` and `--group.field value`. Order: defaults < recipe < command line.

    Example: ["--recipe", "quickstart", "--optim.learning_rate", "1e-4"]
    """
    parser = _build_parser()
    if {"-h", "--help"} & set(argv):
        parser.print_help()
        raise SystemExit(0)
    problems: list[str] = []
    given = _parse_command_line(argv, problems)
    recipe = given.pop("recipe", None)
    settings = [
        *((key, value, f"in {recipe}") for key, value in _read_recipe(recipe, problems).items()),
        *((key, value, "on the command line") for key, value in _flatten_splits(given).items()),
    ]
    pairs = [(key, value) for key, value, _ in settings]
    if not _is_valid(parser, pairs):  # checking one by one is slow, so it is only done to find the problem
        found = ((_describe_problem(parser, key, value), origin) for key, value, origin in settings)
        problems += [f"{problem} ({origin})" for problem, origin in found if problem]
    _raise_problems(problems)
    config = _build_config(parser, pairs, Path(recipe).stem if recipe else None)
    _raise_problems(list(find_problems(config)))
    return config


def config_text(config: Config) -> str:
    """Returns the configuration as a recipe: the text of config.yaml."""
    return str(yaml.dump(as_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True))


def load_config(path: Path) -> Config:
    """Loads a configuration from a file with a `config_text`."""
    return parse_config(["--recipe", str(path)])


def load_finished_run(folder: Path, name: str | None = None, revision: str | None = None) -> tuple[Config, list[str]]:
    """Loads the configuration and the class names of a finished run.

    `name` and `revision` replace those of the model, if the backbone has moved.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(f"--run: {folder} is not a run folder (no config.yaml)")
    if not (folder / "summary.json").is_file():
        raise UserError(f"--run: {folder} is not finished; run its training command again to finish it")
    try:
        labels = json.loads((folder / "adapter" / "labels.json").read_text(encoding="utf-8"))
        label_names = [str(label) for label in labels]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--run: {folder}: adapter/labels.json cannot be read: {error}") from None
    config = fill_recorded(load_config(folder / "config.yaml"))
    model = config.model if name is None else dataclasses.replace(config.model, name=name, revision=None)
    model = model if revision is None else dataclasses.replace(model, revision=revision)
    return dataclasses.replace(config, model=model), label_names


@functools.cache
def _build_parser() -> jsonargparse.ArgumentParser:
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog="run.py",
        exit_on_error=False,
        description="Fine-tunes a text classifier. Order: defaults < recipe < command line.",
        epilog=f"Recipes: {', '.join(_recipe_names())}. PEFT's own options are written --peft.NAME, as --peft.r 16. "
        "--plan prints parameters, steps, tokens, memory and FLOPs of the run, and trains nothing.",
    )
    parser.add_argument("--recipe", type=str | None, help="name of a shipped recipe, or path of a yaml file")
    for group, kind in GROUPS.items():
        if group == "peft":  # PEFT's options are written as peft.NAME
            parser.add_class_arguments(kind, group, skip={"options"})
        else:
            parser.add_argument(f"--{group}", type=kind)
    ranges = {f"{g}.{item.name}": item.metadata for g, kind in GROUPS.items() for item in dataclasses.fields(kind)}
    for action in parser._actions:
        if "range" in ranges.get(action.dest, {}):
            action.help = f"{action.help}; {ranges[action.dest]['range']}"
    return parser


def _raise_problems(problems: Sequence[str]) -> None:
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))


def _build_config(
    parser: jsonargparse.ArgumentParser, settings: Sequence[tuple[str, Any]], recipe: str | None
) -> Config:
    """Builds the configuration from valid settings. A later setting overrides an earlier one."""
    nested = _nest([(key, value) for key, value in settings if not _is_peft_option(key)])
    for split in SPLITS:
        source = nested.get("data", {}).get(split.partition(".")[2])
        if isinstance(source, dict) and not source.get("path"):
            raise UserError(f"{split} has settings but no path; add --{split} FILE")
    namespace = parser.instantiate(parser.parse_object(nested))
    config = Config(**{group: namespace[group] for group in GROUPS}, recipe=recipe)
    given = {key.removeprefix("peft."): value for key, value in settings if _is_peft_option(key)}
    options = {name: value for name, value in given.items() if value is not None}
    peft = dataclasses.replace(config.peft, options=options, peft_type=config.peft.peft_type.upper())
    model = dataclasses.replace(config.model, name=_make_absolute(config.model.name))
    if model.adapter is not None:
        model = dataclasses.replace(model, adapter=_make_absolute(model.adapter))
    return dataclasses.replace(config, peft=peft, model=model)


def _make_absolute(path: str) -> str:
    """Makes the path of a local folder absolute, because later commands may run in another folder."""
    return str(Path(path).absolute()) if Path(path).is_dir() else path


def _parse_command_line(argv: Sequence[str], problems: list[str]) -> dict[str, Any]:
    """Parses `--key value` and `--key=value`. The last value of a key counts. Adds other words to `problems`."""
    given: dict[str, Any] = {}
    words = list(argv)
    while words:
        key, equals, value = words.pop(0).partition("=")
        if not key.startswith("--"):
            problems.append(f"unexpected argument {key!r}; write options as --group.field value")
            continue
        if not equals:
            if not words or words[0].startswith("--"):
                problems.append(f"{key} needs a value")
                continue
            value = words.pop(0)
        key = key.removeprefix("--")
        try:
            given[key] = _parse_value(key, value)
        except UserError as error:
            problems.append(f"{key}: {error}")
    # the path of a split goes first, so that `--data.test.label_column y --data.test x.csv` works in either order
    return dict(sorted(given.items(), key=lambda item: item[0].count(".") > 1))


def _parse_value(key: str, text: str) -> Any:
    """Parses a value of the command line: PEFT's options and the settings of a split. The rest stays text."""
    if _is_peft_option(key):
        return _parse_yaml(text)
    return _parse_yaml(text, keep_text=True) if key in SPLITS and text.startswith("{") else text


def _is_peft_option(key: str) -> bool:
    return key.startswith("peft.") and key not in _TYPES and key not in {"peft.", "peft.options"}


def _is_valid(parser: jsonargparse.ArgumentParser, settings: Sequence[tuple[str, Any]]) -> bool:
    """Whether all keys are known and all types are right. model/build.py checks PEFT's options."""
    ours = [(key, value) for key, value in settings if not _is_peft_option(key)]
    if not all(key in _TYPES for key, _ in ours):
        return False
    try:
        parser.parse_object(_nest(ours))
    except (jsonargparse.ArgumentError, ValueError, TypeError):
        return False
    return True


def _describe_problem(parser: jsonargparse.ArgumentParser, key: str, value: Any) -> str | None:
    """Says what is wrong with one setting, or returns None."""
    # a single setting of a split is not a valid Source, because the path is a setting of its own
    context = [(key.rpartition(".")[0] + ".path", "file")] if key.count(".") == 2 else []
    if _is_valid(parser, [*context, (key, value)]):
        return None
    if key not in _TYPES:
        return f"unknown option {key!r}; {_suggest_option(key)}"
    is_word = isinstance(value, str) and not value.startswith(("[", "{"))
    hint = f"; write [{value}]" if _TYPES[key].startswith("list") and is_word else ""
    return f"{key}: {value!r} is not valid; expected {_describe_type(_TYPES[key])}{hint}"


def _suggest_option(key: str) -> str:
    """Names the option most similar to an unknown one: by the whole name, or by its last part."""
    options = list(_TYPES) if key.count(".") > 1 else option_names()
    last_parts = {option.rpartition(".")[2]: option for option in reversed(options)}
    near = difflib.get_close_matches(key, options, n=1, cutoff=0.8)
    near = near or difflib.get_close_matches(key.rpartition(".")[2], last_parts, n=1)
    if near:
        return f"nearest: {last_parts.get(near[0], near[0])}"
    group = key.partition(".")[0]
    fields = [option.partition(".")[2] for option in option_names() if option.startswith(f"{group}.")]
    return f"{group} has {', '.join(fields)}" if fields else f"groups: {', '.join(GROUPS)}"


def _describe_type(kind: str) -> str:
    """Literal['a', 'b'] | bool | None -> 'a' or 'b' or true or false or null."""
    choices = re.sub(r"Literal\[(.*?)\]", lambda match: match[1].replace(", ", " | "), kind)
    words = {" | Source": "", "bool": "true | false", "None": "null", " | ": " or "}
    return functools.reduce(lambda text, word: text.replace(word, words[word]), words, choices)


def _flatten_splits(settings: Mapping[str, Any]) -> dict[str, Any]:
    """{"data.test": {"path": "x.csv"}} -> {"data.test.path": "x.csv"}. Other settings do not change."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if key in SPLITS and isinstance(value, dict):
            flat |= {f"{key}.{name}": item for name, item in value.items()}
        else:
            flat[key] = value
    return flat


def _nest(flat: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """[("a.b", 1)] -> {"a": {"b": 1}}"""
    nested: dict[str, Any] = {}
    for key, value in flat:
        *parents, last = key.split(".")
        level = nested
        for parent in parents:
            inner = level.get(parent, {})
            # after `data.test: x.csv` in a recipe, `--data.test.label_column y` keeps that path
            level[parent] = inner if isinstance(inner, dict) else {"path": inner}
            level = level[parent]
        level[last] = value
    return nested


def _recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def _recipe_path(recipe: str) -> Path:
    if Path(recipe).suffix in {".yaml", ".yml"} or Path(recipe).is_file():
        return Path(recipe).resolve()
    if recipe not in _recipe_names():
        near = difflib.get_close_matches(recipe, _recipe_names(), n=1, cutoff=0.4)
        hint = f"nearest: {near[0]}" if near else f"shipped: {', '.join(_recipe_names())}"
        raise UserError(f"no such recipe; {hint} (or give the path of a .yaml file)")
    return RECIPES / f"{recipe}.yaml"


def _read_recipe(recipe: str | None, problems: list[str]) -> dict[str, Any]:
    """Reads a recipe as {"group.field": value}. Makes relative paths absolute if they exist next to the recipe."""
    if recipe is None:
        return {}
    try:
        path = _recipe_path(recipe)
        groups = _parse_yaml(path.read_text(encoding="utf-8-sig"))
        if not isinstance(groups, dict) or not all(isinstance(values, dict | None) for values in groups.values()):
            raise UserError(f"the file must contain groups of settings ({', '.join(GROUPS)})")
    except (OSError, UnicodeDecodeError, UserError) as error:
        problems.append(f"--recipe {recipe}: {error}")
        return {}
    flat = _flatten_splits(
        {f"{group}.{name}": value for group, values in groups.items() for name, value in (values or {}).items()}
    )
    for key in ("model.name", "model.adapter", *SPLITS, *(f"{split}.path" for split in SPLITS)):
        if isinstance(value := flat.get(key), str) and value:
            beside = path.parent / value  # an absolute value replaces the folder
            flat[key] = str(beside) if beside.exists() or glob.glob(str(beside), recursive=True) else value
    # settings of earlier versions
    flat.pop("model.compile", None)
    if flat.get("optim.schedule") == "cosine_annealing":
        flat["optim.schedule"] = "cosine"
    return flat


class _Loader(yaml.SafeLoader):
    """Reads scalars as YAML 1.2 does: `no` is text, `1e-4` is a number. A repeated key is an error.

    Keys and class names are always text, even `1.0`, `true` and `null`.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in pairs if tag.endswith((":null", ":merge"))]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [str(key.value) for key, _ in node.value]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"{twice!r} is given twice in line {node.start_mark.line + 1} and below")
        self.flatten_mapping(node)
        for key, value in node.value:
            if key.value == "label_names":
                _tag_as_text(value)
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}


class _Dumper(yaml.SafeDumper):
    """Quotes text that another YAML reader could read as a number or a boolean, such as "1e-4" or "no"."""


_FLOAT = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$|[-+]?\.(inf|nan)$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(true|True|false|False)$"), list("tTfF"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def _tag_as_text(node: yaml.Node) -> None:
    """Marks all scalars in a list or a mapping as text."""
    children = node.value if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        children = [value for _, value in node.value]
    for child in children:
        if isinstance(child, yaml.ScalarNode):
            child.tag = "tag:yaml.org,2002:str"
        else:
            _tag_as_text(child)


def _parse_yaml(text: str, keep_text: bool = False) -> Any:
    """Parses YAML. With `keep_text`, the scalars in a list or a mapping stay text."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if keep_text:
            _tag_as_text(node)
        value = loader.construct_document(node)
        json.dumps(value, default=str)  # fails if an alias refers to itself
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise UserError(f"not valid YAML: {one_line(error)}") from None
    return value


def _load_value(text: str) -> Any:
    """Parses a value of the command line. YAML reads '#1', '~' and '&x' as null; here only null is null."""
    value = _parse_yaml(text, keep_text=True)
    return text if value is None and text.strip().lower() != "null" else value


jsonargparse.set_loader("yaml", _load_value, exceptions=(UserError,))  # predict.py uses it too
