"""One small data set and command line for all parity tests."""

import pytest

from tests.harness.data import topic_rows, write_csv


@pytest.fixture(scope="session")
def parity_arguments(tiny_backbone, tmp_path_factory):
    """Builds command lines: 61 examples of 5 to 42 tokens, class weights and label smoothing on, LoRA not at zero."""
    folder = tmp_path_factory.mktemp("parity")
    write_csv(folder / "train.csv", topic_rows(61, seed=1))
    write_csv(folder / "validation.csv", topic_rows(13, seed=3))

    def arguments(name, dropout, *others):
        return [
            "--model.name", tiny_backbone, "--model.dropout", dropout,
            "--data.train", folder / "train.csv", "--data.validation", folder / "validation.csv",
            "--data.max_length", "48", "--batch.eval_max_tokens", "100",
            "--peft.r", "2", "--peft.target_modules", "[query,value]", "--peft.lora_dropout", dropout,
            "--peft.init_lora_weights", "false", "--optim.label_smoothing", "0.1",
            "--optim.class_weights", "{World: 0.5, Sports: 1.0, Business: 2.0, Sci/Tech: 3.0}",
            "--run.output_dir", folder / "runs", "--run.name", name, "--run.precision", "no", "--run.quiet", "true",
            "--tracking.backends", "[]", "--tracking.every_steps", "1", *others,
        ]  # fmt: skip

    return arguments
