"""Exports a finished run as one plain transformers model: adapter merged into backbone, with labels and tokenizer.

    python trainer/export.py --run runs/NAME --output DIR

Parses and checks the options; model/adapter.py does the work.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # a script's own folder comes first on sys.path; there our modules could hide a library's
    sys.path[: not sys.flags.safe_path] = [str(Path(__file__).resolve().parents[1])]

import jsonargparse

from trainer.collector import frozen_imports
from trainer.config.loading import load_finished_run
from trainer.config.schema import chosen_overlap
from trainer.distributed.environment import set_environment
from trainer.errors import UserError, main_guard


def main() -> int:
    """Exports as the command line says; returns the exit code."""
    parser = jsonargparse.ArgumentParser(
        prog="export.py",
        description="Merges a run's adapter into its backbone.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--model.name", help="unchanged copy of the backbone: folder or hub id; null = as in training")
    parser.add_argument("--model.revision", help="branch, tag or commit of a hub model; null = as in training")
    try:
        options = parser.parse_args()
    except jsonargparse.ArgumentError as error:
        raise UserError(" ".join(str(error).split())) from None
    return export(options.run, options.output, options.model.name, options.model.revision)


def export(run: Path, output: Path, name: str | None = None, revision: str | None = None) -> int:
    """Checks the options and exports; returns the exit code.

    Raises:
        UserError: the run is not finished, the output exists, or the adapter cannot be merged.
    """
    output = output.absolute()  # "." has no name to put another beside
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output: {output} exists; give a new folder")
    config, label_names = load_finished_run(run, name, revision)
    set_environment()
    with frozen_imports():  # they take seconds; --help needs none of them
        from trainer.model.adapter import export_merged, find_trained_backbone, load_task
        from trainer.model.backbone import silence_libraries

    silence_libraries()
    task = load_task(run / "adapter", config.task, label_names)
    backbone = find_trained_backbone(run, config.model, label_names, task.problem_type)
    difference = export_merged(run / "adapter", backbone, config, output, task)
    print(f"exported to {output}: logits within {difference:.1e} of the adapter's", file=sys.stderr)
    if config.data.long_documents == "windows":
        length, overlap = config.data.max_length, chosen_overlap(config.data)
        line = (
            f"transformers.pipeline reads the first {length} tokens of a text; average the logits of windows yourself"
        )
        print(f"note: {line} (stride={overlap}, as in {run / 'adapter' / 'README.md'})", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main_guard(main))
