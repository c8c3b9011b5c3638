"""Checks the promise of this project on this machine: `./launch.sh --verify [--topology NAME] [--processes N]`.

It trains only tiny random models in a temporary folder, and needs no network.
"""

import dataclasses
import json
import os
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":  # a script's own folder comes first on sys.path; there our modules could hide a library's
    sys.path[: not sys.flags.safe_path] = [str(Path(__file__).resolve().parents[2])]

import jsonargparse

from trainer.errors import UserError, main_guard
from trainer.files import write_atomic

TOPOLOGIES = ("cpu", "cpu_multi", "gpu", "multi_gpu")


def main() -> int:
    """Runs all checks; returns 0 if none failed, else 1."""
    parser = jsonargparse.ArgumentParser(description="Checks exactness, resume, memory and speed on this machine.")
    parser.add_argument("--topology", choices=TOPOLOGIES, required=True, help="where the processes run")
    parser.add_argument("--processes", type=int, required=True, help="processes of the group; 1 = no group")
    parser.add_argument("--output", type=Path, default=Path("verify.json"), help="the file with all figures")
    parser.add_argument("--folder", type=Path, help="keep the runs and figures of the processes here")
    options = parser.parse_args()
    if not os.access(options.output.absolute().parent, os.W_OK):
        raise UserError(f"--output: {options.output.absolute()} cannot be written; name a file in another folder")

    if options.folder and options.folder.is_dir() and any(options.folder.iterdir()):
        raise UserError(f"--folder: {options.folder} is not empty; name a new folder")
    if options.topology.startswith("cpu"):
        os.environ["ACCELERATE_USE_CPU"] = "true"

    from trainer.model.backbone import silence_libraries
    from trainer.verification.checks import Evidence, fill_rows
    from trainer.verification.environment import one_line_summary, read_facts

    silence_libraries()
    began, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="isotrain-verify-") as temporary:
        folder = options.folder or Path(temporary)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")  # of the processes that the checks start
        for row in fill_rows(Evidence(folder, options.topology, options.processes)):
            rows.append(row)
            bound = f"  (bound {row.bound})" if row.bound else ""
            print(f"{row.verdict:<8} {row.check:<28} {row.figure}{bound}", flush=True)
            if row.advice:
                print(f"{'':<8} {row.advice}", flush=True)
    seconds, facts = time.monotonic() - began, read_facts()
    counts = {verdict: sum(row.verdict == verdict for row in rows) for verdict in ("ok", "FAILED", "skipped")}
    content = {
        "topology": options.topology,
        "processes": options.processes,
        "seconds": seconds,
        "environment": facts,
        "checks": [dataclasses.asdict(row) for row in rows],
    }
    write_atomic(options.output, json.dumps(content, indent=2) + "\n")
    shown = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    print(f"{shown} in {seconds:.0f} s on {options.topology} x {options.processes}; figures: {options.output}")
    print(one_line_summary(facts))
    return int(counts["FAILED"] > 0)


if __name__ == "__main__":
    sys.exit(main_guard(main))
