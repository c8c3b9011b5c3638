"""The accepted options, each with help, and docs/options.md, which is generated from them.

To write the page: WRITE_OPTIONS=1 python -m pytest tests/contracts/test_options.py
"""

import dataclasses
import json
import os

import docstring_parser

from tests.harness.commands import run_script
from tests.harness.processes import ROOT
from trainer.config import loading as options
from trainer.config.loading import option_names
from trainer.config.schema import CHANGEABLE_OPTIONS, GROUPS, Source

PAGE = ROOT / "docs" / "options.md"

OPTIONS = """
run.name run.output_dir run.seed run.resume run.precision run.quiet
data.train data.validation data.test data.validation_fraction data.column_names data.delimiter
data.encoding data.quoting data.empty_text data.text_columns
data.text_pair_columns data.label_column data.label_columns data.label_names data.max_length
data.long_documents data.window_overlap
task.type task.separator task.loss
batch.size batch.max_tokens batch.eval_max_tokens
model.name model.revision model.adapter model.dropout model.packed model.gradient_checkpointing model.quantization
peft.peft_type peft.train peft.max_trainable_parameters peft.fit_budget
optim.name optim.learning_rate optim.lora_b_lr_ratio optim.weight_decay optim.betas optim.eps optim.max_grad_norm
optim.schedule optim.warmup_fraction optim.final_lr_fraction optim.epochs optim.max_steps optim.label_smoothing
optim.class_weights
evaluation.every_steps evaluation.metric evaluation.patience
checkpoint.every_steps checkpoint.keep_last
tracking.every_steps tracking.backends
"""


def test_options_are_exactly_these():
    assert option_names() == OPTIONS.split()


def test_help_names_every_option():
    done = run_script("run.py", ["--help"])
    assert done.returncode == 0, done.stderr
    assert [name for name in option_names() if f"--{name}" not in done.stdout] == []


# --- docs/options.md ---

INTRODUCTION = """# Options

After this page you can set every option of a run.

- On the command line: `--group.option value`. In a recipe: `group: {{option: value}}`.
- The command line overrides the recipe, and the recipe overrides the defaults.
- After the first start, `./launch.sh --help` prints the same list.
- An unknown option is refused, with the nearest known one.
- These options may change when a run resumes, because they do not change the result:
  {may_change}. `peft.max_trainable_parameters` may not with `peft.fit_budget`.
- This page is generated from `trainer/config/schema.py` by `tests/contracts/test_options.py`.
"""
SPLIT_FORM = """
A split is a path, or a path with settings of its own:
`--data.test x.csv --data.test.label_column y`, or `test: {path: x.csv, label_column: y}` in a recipe.
"""


def render_page():
    changeable = [f"`{group}.{name}`" for group, names in CHANGEABLE_OPTIONS.items() for name in sorted(names)]
    parts = [
        INTRODUCTION.format(may_change=", ".join(changeable)),
        *(render_group(f"`{group}`", kind) for group, kind in GROUPS.items()),
    ]
    return "".join([*parts, render_group("`data.train`, `data.validation`, `data.test`", Source, SPLIT_FORM)])


def render_group(title, kind, more=""):
    doc = docstring_parser.parse_from_object(kind)
    docs = [docstring_parser.parse_from_object(base) for base in kind.__mro__[:-1]]  # a base declares some options
    help_of = {param.arg_name: " ".join(param.description.split()) for part in docs for param in part.params}
    rows = [
        [f"`{'NAME' if item.name == 'options' else item.name}`", values_of(item), default_of(item), help_of[item.name]]
        for item in sorted(dataclasses.fields(kind), key=lambda item: bool(item.kw_only))
    ]
    table = [["option", "values", "default", "meaning"], ["---"] * 4, *rows]
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n" for row in table]
    return f"\n## {title}\n\n{doc.short_description}\n{more}\n{''.join(lines)}"


def values_of(item):
    if item.name == "options":
        return "see PEFT"
    kind = options._describe_type(item.type).replace("'", "")
    return f"{kind}, {item.metadata['range']}" if "range" in item.metadata else kind


def default_of(item):
    if item.default is dataclasses.MISSING:
        return "" if item.default_factory is dataclasses.MISSING else f"`{json.dumps(item.default_factory())}`"
    return f"`{item.default if isinstance(item.default, str) else json.dumps(item.default)}`"


def test_the_page_of_options_is_up_to_date():
    if os.environ.get("WRITE_OPTIONS"):
        PAGE.write_text(render_page(), encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == render_page(), "run with WRITE_OPTIONS=1 to write the page"
