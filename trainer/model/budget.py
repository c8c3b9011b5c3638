"""The largest rank within a budget of trained parameters, found before a weight is read.

Always holds: the rank is a function of the configuration and of the backbone's shapes. So every process and every
resume chooses the same.
"""

from __future__ import annotations

import json
import math

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from trainer.compat import adapter_state
from trainer.config.schema import RANKED_METHODS, PeftConfig, with_rank
from trainer.errors import UserError
from trainer.model.backbone import Backbone
from trainer.model.build import build_without_weights
from trainer.model.lora_start import changes_backbone

SAFETENSORS_NAMES = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


def fit_budget(backbone: Backbone, settings: PeftConfig) -> tuple[PeftConfig, list[str]]:
    """Chooses the largest rank whose model trains at most `peft.max_trainable_parameters` parameters.

    A rank above the smaller side of every target adds nothing and is not chosen. Also returns a table for the user.
    """
    budget, unit = settings.max_trainable_parameters, 2 if settings.peft_type == "HRA" else 1  # HRA starts with pairs
    assert budget is not None, "find_problems refuses it"
    least = build_without_weights(backbone, with_rank(settings, unit))
    counts = [count_trained(least), count_trained(build_without_weights(backbone, with_rank(settings, 2 * unit)))]
    if counts[0] > budget:
        fix = "raise it, name fewer peft.target_modules, or choose a smaller backbone"
        raise UserError(
            f"peft.max_trainable_parameters: {budget:,} is below the {counts[0]:,} that rank {unit} trains; {fix}"
        )
    # parameters are linear in the rank, for each of RANKED_METHODS
    rank = unit * min(1 + (budget - counts[0]) // (counts[1] - counts[0]), max(1, _full_rank(least) // unit))
    around = sorted({max(unit, rank // 2 // unit * unit), max(unit, rank - unit), rank, rank + unit, 2 * rank})
    chosen = with_rank(settings, rank)
    alpha = RANKED_METHODS[settings.peft_type]
    kept = f" with {alpha} {chosen.options[alpha]}" if alpha in chosen.options else ""
    lines = [f"peft.fit_budget: rank {rank}{kept} is the largest within {budget:,} trained parameters"]
    lines.append(f"  {'rank':>6}  {'parameters':>14}  {'adapter bytes':>14}")
    for row in around:
        model = build_without_weights(backbone, with_rank(settings, row))
        mark = ">" if row == rank else " "
        lines.append(f"{mark} {row:>6}  {count_trained(model):>14,}  {count_adapter_bytes(model, settings):>14,}")
    return chosen, lines


def count_trained(model: PeftModel) -> int:
    """The number of parameters that train."""
    return model.get_nb_trainable_parameters()[0]


def count_adapter_bytes(model: PeftModel, settings: PeftConfig) -> int:
    """The size of the file of adapter and head; the model may be without numbers."""
    doubled = (".lora_A.weight", ".lora_B.weight") if changes_backbone(settings) else ()  # as `as_plain_lora` does
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in sorted(adapter_state(model).items()):
        shape = list(tensor.shape)
        if name.endswith(doubled):
            shape[0 if ".lora_A." in name else 1] *= 2
        start, end = end, end + math.prod(shape) * tensor.itemsize
        kind = SAFETENSORS_NAMES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8 + end


def _full_rank(model: PeftModel) -> int:
    """The largest rank that a product of the adapted matrices can have."""
    layers = [module.get_base_layer() for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return max(sorted(p.shape)[-2] for layer in layers for p in layer.parameters(recurse=False) if p.ndim > 1)
