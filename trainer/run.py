"""`accelerate launch trainer/run.py`: reads the configuration and starts the run, unless it is finished.

Always holds: a finished run is not touched, and a folder with another run is refused.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # a script's own folder comes first on sys.path; there our modules could hide a library's
    sys.path[: not sys.flags.safe_path] = [str(Path(__file__).resolve().parents[1])]

import os

from trainer.collector import frozen_imports
from trainer.config.loading import load_config, parse_config
from trainer.config.schema import Config, find_differences, run_name
from trainer.distributed.environment import read_environment, set_environment
from trainer.errors import UserError, main_guard, quote_path


def main(arguments: list[str] | None = None) -> int:
    """Runs what the command line describes; returns the exit code: 0, or 128 + signal."""
    arguments = sys.argv[1:] if arguments is None else arguments
    config = parse_config([word for word in arguments if word != "--plan"])
    if "--plan" in arguments:
        return _print_plan(config)
    read_environment()
    folder = _find_output(config.run.output_dir) / run_name(config)
    # on several hosts rank 0 decides for all, since the others may not see the folder
    one_host = os.environ.get("WORLD_SIZE", "1") == os.environ.get("LOCAL_WORLD_SIZE", "1")
    if one_host and _check_folder(folder, config):
        return 0
    # loading torch and the hub's libraries takes seconds, so --help and most mistakes are answered before
    from trainer.data.sources import check_paths

    if one_host:
        check_paths({name: getattr(config.data, name) for name in ("train", "validation", "test")})
    set_environment()
    with frozen_imports():
        from trainer.training.pipeline import train_and_report

    return train_and_report(config, folder, None if one_host else lambda: _check_folder(folder, config))


def _print_plan(config: Config) -> int:
    """Prints what the run would take; makes no folder, and looks at none."""
    from trainer.data.sources import check_paths

    check_paths({name: getattr(config.data, name) for name in ("train", "validation", "test")})
    set_environment()
    with frozen_imports():
        from trainer.training.estimate import print_plan

    return print_plan(config)


def _find_output(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise UserError(f"run.output_dir: {name}: there is no such user") from None


def _check_folder(folder: Path, config: Config) -> bool:
    """Checks that the run may use its folder. If the run is finished, says so and returns True.

    Raises:
        UserError: the folder has a run of another configuration or something else, or must not be used again.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        return False
    if not (folder / "config.yaml").is_file():
        # config.yaml is the first file of a run: a start that was killed before leaves only these
        if any(path.name not in {".lock", ".lock-file", ".unfinished-config.yaml"} for path in folder.iterdir()):
            raise UserError(f"{folder} is not a run folder; choose another --run.name or --run.output_dir")
        return False
    if config.run.resume == "never":
        raise UserError(f"{folder} is in use and run.resume is never; choose another --run.name, or remove the folder")
    finished = (folder / "summary.json").is_file()
    # the content of data and backbone is only compared on a resume
    differing = find_differences(load_config(folder / "config.yaml"), config, by_name=finished)
    if differing:
        shown = ", ".join(differing[:3]) + (f" and {len(differing) - 3} more" if len(differing) > 3 else "")
        hint = "For a new run: --run.name NAME"
        if finished:
            hint += f"; to train this adapter further: --run.name NAME --model.adapter {quote_path(folder / 'adapter')}"
        raise UserError(f"{folder} has a run with another configuration: {shown}\n{hint}")
    if finished and os.environ.get("RANK", "0") == "0" and not config.run.quiet:
        done = "is finished; nothing to do, and its data was not looked at"
        print(f"{quote_path(folder)} {done}. For another run: --run.name NAME", file=sys.stderr)
    return finished


if __name__ == "__main__":
    sys.exit(main_guard(main))
