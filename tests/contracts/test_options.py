"""The accepted options: a new one is added here on purpose, with its line of help."""

import dataclasses

from jsonargparse import set_parsing_settings

from trainer.config import loading as options
from trainer.config import schema as config
from trainer.config.loading import option_names
from trainer.config.schema import GROUPS

OPTIONS = """
run.name run.output_dir run.seed run.resume run.precision run.quiet
data.train data.validation data.test data.validation_fraction data.column_names data.delimiter
data.encoding data.quoting data.empty_text data.text_columns
data.text_pair_columns data.label_column data.label_names data.max_length
batch.size batch.max_tokens batch.eval_max_tokens
model.name model.revision model.adapter model.dropout model.packed
peft.peft_type peft.max_trainable_parameters
optim.name optim.learning_rate optim.weight_decay optim.betas optim.eps optim.max_grad_norm optim.schedule
optim.warmup_fraction optim.final_lr_fraction optim.epochs optim.max_steps optim.label_smoothing optim.class_weights
evaluation.every_steps evaluation.metric evaluation.patience
checkpoint.every_steps checkpoint.keep_last
tracking.every_steps tracking.backends
"""


def test_options_are_exactly_these():
    assert option_names() == OPTIONS.split()


def test_each_option_has_help():
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    text = " ".join(options._parser().format_help().split())
    for group, kind in GROUPS.items():
        for item in dataclasses.fields(kind):
            key = f"--{group}.{item.name}"
            _metavar, _, entry = text.replace(f"{key}+ ", f"{key} ").rpartition(f"{key} ")[2].partition(" ")
            assert entry.find("(type:") > 10 or item.name == "options", f"{key} has no help"


def test_what_may_differ_between_start_and_continuation():
    kept = {f"{group}.{name}" for group, values in config.identity(config.Config()).items() for name in values}
    assert set(option_names()) - kept == {
        "run.name", "run.output_dir", "run.resume", "run.quiet",
        "data.train", "data.validation", "data.test", "data.delimiter", "data.encoding", "data.quoting",
        "batch.max_tokens", "batch.eval_max_tokens",
        "model.name", "model.revision", "model.adapter", "model.packed",
        "peft.max_trainable_parameters",
        "checkpoint.every_steps", "checkpoint.keep_last",
        "tracking.every_steps", "tracking.backends",
    }  # fmt: skip
