"""Draws the figures and the page of a run from its folder, or compares the adapters of two runs.

python trainer/report.py --run runs/NAME [--against runs/OTHER]
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # a script's own folder comes first on sys.path; there our modules could hide a library's
    sys.path[: not sys.flags.safe_path] = [str(Path(__file__).resolve().parents[1])]

import jsonargparse

from trainer.errors import main_guard
from trainer.reporting.compare import compare_adapters
from trainer.reporting.page import build_report


def main() -> int:
    """Does what the command line asks for; returns the exit code."""
    parser = jsonargparse.ArgumentParser(description="Writes the figures and report.html of a run, or compares two.")
    parser.add_argument("--run", type=Path, required=True, help="the folder of a run, such as runs/quickstart")
    parser.add_argument("--against", type=Path, help="another run: print how far its adapter is from that of --run")
    options = parser.parse_args()
    print(compare_adapters(options.run, options.against) if options.against else build_report(options.run))
    return 0


if __name__ == "__main__":
    sys.exit(main_guard(main))
