"""Draws the figures and the page of a run again, from the files of its run folder.

python trainer/report.py --run runs/NAME
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # a script's own folder comes first on sys.path; there our modules could hide a library's
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import jsonargparse

from trainer.errors import main_guard
from trainer.reporting.page import build_report


def main() -> int:
    """Builds the report that the command line asks for; returns the exit code."""
    parser = jsonargparse.ArgumentParser(description="Writes the figures and report.html of a run folder.")
    parser.add_argument("--run", type=Path, required=True, help="the folder of a run, such as runs/quickstart")
    print(build_report(parser.parse_args().run))
    return 0


if __name__ == "__main__":
    sys.exit(main_guard(main))
