"""Predicts the labels of a file with the adapter of a finished run.

    python trainer/predict.py --run runs/NAME --input FILE.csv --output PREDICTIONS.csv

Several --run average their predictions. Parses and checks the options; training/prediction.py does the work.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # a script's own folder comes first on sys.path; there our modules could hide a library's
    sys.path[: not sys.flags.safe_path] = [str(Path(__file__).resolve().parents[1])]

import contextlib
import os
import re

import jsonargparse

from trainer.collector import frozen_imports
from trainer.config.loading import load_finished_run
from trainer.config.predict_options import FinishedRun, Options, check_runs_agree, source_of
from trainer.config.schema import find_source_problems, resolve
from trainer.distributed.environment import read_environment, set_environment
from trainer.errors import UserError, main_guard

OUTPUT_TYPES = (".csv", ".jsonl")


def main() -> int:
    """Predicts as the command line says; returns the exit code."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog="predict.py", description="Predicts the labels of a file.", exit_on_error=False, allow_abbrev=False
    )
    about_runs = "folder of a finished run; --run A --run B averages their probabilities, or their values"
    parser.add_argument("--run", action="append", required=True, metavar="RUN", help=about_runs)
    parser.add_class_arguments(Options, as_group=False, skip={"run"})
    try:
        options = Options(**vars(parser.instantiate(parser.parse_args())))
    except jsonargparse.ArgumentError as error:
        message = re.sub('Parser key "([^"]*)":', r"--\1:", " ".join(str(error).split()))
        word = r"Does not validate .*\[list\[str\].* <class 'str'> Given value: (.*)"
        raise UserError(re.sub(word, r"'\1' is not a list; write [\1]", message)) from None
    read_environment()
    return predict(options)


def predict(options: Options) -> int:
    """Checks the options, then scores the input and writes the output; returns the exit code.

    Raises:
        UserError: a run is not finished, the runs cannot be averaged, the input cannot be read, or the output cannot be
            written.
    """
    runs = [
        FinishedRun(Path(folder), *load_finished_run(Path(folder), options.model.name, options.model.revision))
        for folder in options.run
    ]
    check_runs_agree(runs, options)
    data = runs[0].config.data
    source = resolve(source_of(options), resolve(data.train or "", data))
    if problems := list(find_source_problems("--", source)):
        raise UserError("\n".join(problems))
    from trainer.data.sources import check_paths  # this import and those below take seconds; --help needs none

    check_paths({"input": options.input})
    _check_output(options, runs)
    set_environment()
    with frozen_imports():
        from trainer.training.prediction import predict_file

    predict_file(options, runs)
    return 0


def _check_output(options: Options, runs: list[FinishedRun]) -> None:
    """The output must not be the input, data of a run, or in a run's folder."""
    output = Path(options.output)
    if output.suffix.lower() not in OUTPUT_TYPES:
        raise UserError(f"--output: {output} must end in {' or '.join(OUTPUT_TYPES)}")
    if not output.parent.is_dir():
        raise UserError(f"--output: no folder {output.parent}")
    if output.is_dir() or not os.access(output.parent, os.W_OK):
        raise UserError(f"--output: {output} cannot be written")
    if any(run.folder.resolve() in output.resolve().parents for run in runs):
        raise UserError(f"--output: {output} is in the run's folder; give another file")
    if not output.exists():
        return
    from trainer.data.sources import list_files

    data = [run.config.data for run in runs]
    splits = [(split, each) for each in data for split in (each.train, each.validation, each.test) if split]
    for pattern in (options.input, *(resolve(split, each).path for split, each in splits)):
        with contextlib.suppress(ValueError, KeyError):  # the folder of a split may hold no table any more
            if any(Path(path).exists() and output.samefile(path) for path in list_files(pattern)):
                raise UserError(f"--output: {output} is the input or data of the run; give another file")


if __name__ == "__main__":
    sys.exit(main_guard(main, result_on_stdout=True))
