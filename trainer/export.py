"""A finished run as one plain transformers model: the adapter merged into the backbone, with labels and tokenizer.

    python trainer/export.py --run runs/NAME --output DIR

Always holds: the folder appears only after its model, read back from disk, gave the same logits as backbone and adapter
apart. Merging starts from the backbone's original fp32 weights.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # a script's own folder comes first on sys.path; there our modules could hide a library's
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import shutil
from typing import Any

import jsonargparse

from trainer.config.loading import load_finished_run
from trainer.distributed.environment import set_environment
from trainer.errors import UserError, main_guard

PROBES = (
    "The committee met on Tuesday and postponed its decision.",
    "A short one.",
    "Shares of the company fell by a tenth after the match was abandoned, scientists said, in heavy rain.",
)
TOLERANCE = 1e-4  # of logits in fp32: merging adds B A to W before the product with x instead of after it


def main() -> int:
    """Exports what the command line asks for; returns the exit code."""
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
    """Merges, saves, reads back and compares; returns the exit code.

    Raises:
        UserError: no finished run, an output folder in use, or an adapter that cannot be merged.
    """
    output = output.absolute()  # "." has no name to put another beside
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output: {output} exists; give a new folder")
    config, label_names = load_finished_run(run, name, revision)
    set_environment()

    from transformers import AutoModelForSequenceClassification

    from trainer.files import UNFINISHED, publish, writing
    from trainer.model.adapter import find_trained_backbone, load_trained_model
    from trainer.model.backbone import silence_libraries
    from trainer.model.tokenizer import save_tokenizer

    silence_libraries()
    backbone = find_trained_backbone(run, config.model, label_names)
    model = load_trained_model(backbone, run / "adapter")
    wanted = _logits(model, backbone.tokenizer)
    temporary = output.with_name(f"{UNFINISHED}{output.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _unwrap_head(model)
        if config.peft.options.get("layer_replication"):
            _unshare(model)
        try:
            merged: Any = model.merge_and_unload(safe_merge=True)
        except (AttributeError, NotImplementedError, ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"--run: an adapter of type {config.peft.peft_type} cannot be merged: {error}") from None
        with writing(output):
            merged.save_pretrained(temporary)
            for path in temporary.glob("*.safetensors"):  # which safetensors lets nobody else read
                path.chmod((temporary / "config.json").stat().st_mode)
            save_tokenizer(backbone.tokenizer, config.data.max_length, temporary)
        fresh = AutoModelForSequenceClassification.from_pretrained(temporary, trust_remote_code=False).eval()
        difference = (_logits(fresh, backbone.tokenizer) - wanted).abs().max().item()
        if not difference <= TOLERANCE * max(1.0, wanted.abs().max().item()):
            raise UserError(
                f"--run: the merged model's logits differ by {difference:.2g} from the adapter's; not exported"
            )
        publish(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"exported to {output}: logits within {difference:.1e} of the adapter's", file=sys.stderr)
    return 0


def _unwrap_head(model: Any) -> None:
    """Puts the trained head in the place of PEFT's wrapper around it, which PEFT 0.21 merges rightly for LoRA only."""
    from trainer.compat import trained_module

    for name, module in list(model.named_modules()):
        if (trained := trained_module(module)) is not module:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, trained)


def _unshare(model: Any) -> None:
    """Gives each of the layers that PEFT replicated parameters of its own, to merge into."""
    import torch

    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in seen:
                setattr(module, name, torch.nn.Parameter(parameter.detach().clone()))
            seen.add(id(parameter))


def _logits(model: Any, tokenizer: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(**tokenizer(list(PROBES), return_tensors="pt", padding=True)).logits


if __name__ == "__main__":
    sys.exit(main_guard(main))
