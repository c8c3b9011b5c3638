"""What a run would take, for `--plan`: parameters, steps, tokens, padding, memory and FLOPs. It trains nothing.

Always holds: parameters, adapter bytes, steps, tokens and padding are those of the run itself, by its own code. EVA
alone divides its ranks later, by the data. Memory and FLOPs are estimates from shapes; docs/performance.md compares
them with measurements. No weights are read.
"""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from trainer.batching.plan import Plan
from trainer.config.schema import Config, PeftConfig, fill_task
from trainer.data.tokens import Examples
from trainer.distributed.environment import read_number
from trainer.distributed.session import choose_precision, is_on_cpu
from trainer.model.backbone import silence_libraries
from trainer.model.budget import count_adapter_bytes
from trainer.model.build import COMPUTE_TYPES, MATRIX_MODULES, set_precision
from trainer.model.lora_start import start_of
from trainer.model.peft_options import parameter_table
from trainer.packed.families import why_not_packed
from trainer.training.adalora import set_total_steps
from trainer.training.pipeline import describe_data
from trainer.training.setup import CPU_TOKENS, GPU_TOKENS, count_steps, draft_run, tokenize_splits

OPTIMIZER_COPIES = {"adamw": 2, "adam": 2, "sgd": 0}
"""by optim.name: numbers that it keeps for each trained one"""
NF4_BYTES = 0.5 + 4 / 64
"""of a weight, with its share of the scale of 64 weights"""
LIBRARIES = {True: "0.7 GB for Python and its libraries", False: "0.5 GB for CUDA and its libraries"}
"""by whether the run is on a CPU"""


@dataclass(frozen=True)
class Place:
    """Where the run would be."""

    world_size: int
    on_cpu: bool
    sharded: bool
    """the frozen weights are sharded over the processes"""


def print_plan(config: Config) -> int:
    """Prints what a run would take, on stdout; returns the exit code. Only the first of several processes prints."""
    if os.environ.get("RANK", "0") not in ("", "0"):
        return 0
    silence_libraries()
    world_size = read_number("ISOTRAIN_NUM_PROCESSES", read_number("WORLD_SIZE"))
    sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true" and world_size > 1
    place = Place(world_size, is_on_cpu(), sharded)
    precision: Any = choose_precision(config.run.precision)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, precision=precision))
    draft = draft_run(config, needs_weights=False)
    examples = tokenize_splits(config, draft)
    config = dataclasses.replace(fill_task(config, draft.corpus.task), peft=draft.peft)
    padded_because = "the frozen weights are sharded" if sharded else why_not_packed(draft.twin)
    if config.model.packed is False:
        padded_because = "model.packed is false"
    plan = make_plan(config, examples["train"], place.on_cpu, packed=padded_because is None)
    set_total_steps(draft.twin, count_steps(config.optim, plan))  # a run that AdaLoRA refuses has no plan either
    set_precision(draft.twin, COMPUTE_TYPES[config.run.precision])
    sizes = [plan.sizes(step, world_size) for step in range(plan.steps_per_epoch)]
    lines = [
        *describe_data(config, draft.corpus, examples),
        *describe_steps(config, plan, place.world_size, padded_because),
        *describe_parameters(draft.twin, draft.peft),
        *describe_memory(config, draft.twin, plan, sizes, place),
        *describe_flops(config, draft.twin, plan, sizes),
    ]
    print(*lines, sep="\n")
    return 0


def make_plan(config: Config, train: Examples, on_cpu: bool, packed: bool) -> Plan:
    """The run's plan, all examples with weight 1. Only the weights can show that padding changes a family's logits."""
    return Plan(
        lengths=train.lengths,
        weights=np.ones(len(train)),
        batch_size=config.batch.size,
        seed=config.run.seed,
        max_tokens=config.batch.max_tokens or (CPU_TOKENS if on_cpu else GPU_TOKENS),
        packed=packed,
        window_length=train.window_length,
    )


# --- steps and parameters: exact ---


def describe_steps(config: Config, plan: Plan, world_size: int, padded_because: str | None) -> list[str]:
    """Lines about steps, tokens and padding."""
    lengths, steps, total = plan.lengths, plan.steps_per_epoch, count_steps(config.optim, plan)
    padding = f"{padding_fraction(dataclasses.replace(plan, packed=False), world_size):.1%}"
    how = f"0.0%: examples are packed; in padded batches it would be {padding}"
    return [
        f"steps       {total:,} of {plan.batch_size} examples: {total / steps:.4g} epochs of {steps:,} steps",
        f"tokens      {lengths.sum():,} an epoch; {lengths.mean():.1f} an example, {lengths.max()} in the longest",
        f"padding     {how if padded_because is None else f'{padding}: {padded_because}'}",
    ]


def padding_fraction(plan: Plan, world_size: int) -> float:
    """Padding as a fraction of all tokens that the first epoch computes."""
    computed = sum(size for step in range(plan.steps_per_epoch) for size, _ in plan.sizes(step, world_size))
    return 1 - int(plan.lengths.sum()) / computed


def describe_parameters(twin: PeftModel, settings: PeftConfig) -> list[str]:
    """A table of what trains, by module, and of what is frozen, by part; then the size of the adapter."""
    frozen: dict[str, int] = {}
    lines = [f"parameters  {'trained':>12}  {'in all':>14}"]
    for row in parameter_table(twin):
        if row["trainable"]:
            lines.append(f"{'':10}  {row['trainable']:>12,}  {row['total']:>14,}  {row['module']}")
        else:
            part = re.match(r"[^*]*\.\*|[^.]*\.?[^.]*", row["module"])[0]  # type: ignore[index]
            frozen[part] = frozen.get(part, 0) + row["total"]
    lines += [f"{'':10}  {0:>12}  {total:>14,}  other parts of {part}" for part, total in frozen.items()]
    trainable, total = twin.get_nb_trainable_parameters()
    lines.append(f"{'':10}  {trainable:>12,}  {total:>14,}  together: {trainable / total:.2%} train")
    moved = "; eva divides the ranks by the data, which changes this" if start_of(settings) == "eva" else ""
    return [*lines, f"adapter     {count_adapter_bytes(twin, settings):,} bytes{moved}"]


# --- memory and FLOPs: estimates ---


Sizes = list[list[tuple[int, int]]]
"""of each step of an epoch, by `Plan.sizes`"""


def describe_memory(config: Config, twin: PeftModel, plan: Plan, sizes: Sizes, place: Place) -> list[str]:
    """Lines about the memory of one process in training, at its largest micro-batch."""
    frozen = count_frozen_bytes(config, twin) // (place.world_size if place.sharded else 1)
    copies = 2 + OPTIMIZER_COPIES[config.optim.name]  # with the gradient
    trained = sum(p.numel() * p.itemsize * copies for p in twin.parameters() if p.requires_grad)
    step = max(range(len(sizes)), key=lambda step: max(sizes[step]))
    ranks = range(place.world_size)
    batches = [plan.lengths[part.ids] for rank in ranks for part in plan.micro_batches(step, rank, place.world_size)]
    activations = max(count_activation_bytes(config, twin, plan, lengths) for lengths in batches)
    return [
        f"memory      about {shorten(frozen + trained + activations)}B a process ({config.run.precision}), and "
        f"{LIBRARIES[place.on_cpu]}",
        f"            frozen weights {shorten(frozen)}B, trained ones with gradient and optimizer {shorten(trained)}B, "
        f"activations {shorten(activations)}B",
    ]


def count_frozen_bytes(config: Config, twin: PeftModel) -> int:
    """Bytes of the weights that do not train; quantized ones have 4 bits, and a scale in fp32 for each block."""
    body: Any = twin.get_base_model().base_model
    matrices = {id(m.weight) for name, m in body.named_modules() if isinstance(m, nn.Linear) and "pool" not in name}
    quantized = matrices if config.model.quantization else set()
    frozen = [parameter for parameter in twin.parameters() if not parameter.requires_grad]
    return int(sum(p.numel() * (NF4_BYTES if id(p) in quantized else p.itemsize) for p in frozen))


def count_activation_bytes(config: Config, twin: PeftModel, plan: Plan, lengths: np.ndarray) -> int:
    """Estimates what a micro-batch of examples of these lengths [B] keeps for its backward.

    A product keeps its output, and its input if its weight or an adapter trains. A norm keeps its input in fp32.
    Attention with dropout, or packed, keeps its shares and masks. Checkpointing keeps the input of each layer, and one
    layer.
    """
    model: Any = twin.get_base_model()
    num_layers, hidden_size, num_heads = _shape(twin)
    per_token, item = 0, COMPUTE_TYPES[config.run.precision].itemsize
    for module in _without_adapters(model.base_model):
        if isinstance(module, MATRIX_MODULES):
            inputs, outputs = _widths(module)
            per_token += (inputs * module.weight.requires_grad + outputs) * item
        elif isinstance(module, BaseTunerLayer) and isinstance(module.get_base_layer(), MATRIX_MODULES):
            per_token += _widths(module.get_base_layer())[0] * item
        elif type(module).__name__.endswith("Norm"):
            per_token += 4 * max((parameter.numel() for parameter in module.parameters()), default=hidden_size)
    window = min(plan.window_length, lengths.max())
    if not plan.packed:
        lengths = -(-lengths // window) * window
    squares = (lengths // window * window**2 + (lengths % window) ** 2).sum()
    drops = any("att" in name and "drop" in name and value for name, value in model.config.to_dict().items())
    shares = num_layers * num_heads * int(squares) * (item + 1) if plan.packed or drops else 0
    kept, num_tokens = per_token * int(lengths.sum()) + shares, int(lengths.sum())
    if config.model.gradient_checkpointing and num_layers:
        return kept // num_layers + num_layers * hidden_size * item * num_tokens
    return kept


def describe_flops(config: Config, twin: PeftModel, plan: Plan, sizes: Sizes) -> list[str]:
    """Lines about the floating-point operations of training, without head and evaluation."""
    frozen, trained = count_products(twin)
    num_layers, hidden_size, _ = _shape(twin)
    computed = sum(size for step in sizes for size, _ in step)
    window = min(plan.window_length, int(plan.lengths.max()))
    squares = (plan.lengths // window * window**2 + (plan.lengths % window) ** 2).sum()
    again = 2 if config.model.gradient_checkpointing else 0  # each layer is computed twice
    products = ((4 + again) * frozen + (6 + again) * trained) * computed
    attention = (12 + 2 * again) * num_layers * hidden_size * int(squares)
    steps = count_steps(config.optim, plan)
    epoch = products + attention
    return [
        f"FLOPs       about {shorten(epoch * steps / plan.steps_per_epoch)} in all, "
        f"{shorten(epoch / plan.steps_per_epoch)} a step, {attention / epoch:.1%} of them for attention",
        f"            a token takes {4 + again} for each of {frozen:,} frozen weights outside the embeddings, and "
        f"{6 + again} for each of {trained:,} trained ones",
    ]


def count_products(twin: PeftModel) -> tuple[int, int]:
    """Weights that multiply each token outside the head and the embeddings: those that are frozen, and that train."""
    body: Any = twin.get_base_model().base_model
    embeddings = {id(p) for m in body.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    matrices = [m.weight for m in _without_adapters(body) if isinstance(m, MATRIX_MODULES)]
    trained = sum(p.numel() for p in body.parameters() if p.requires_grad and id(p) not in embeddings)
    return sum(weight.numel() for weight in matrices if not weight.requires_grad), trained


def _without_adapters(body: nn.Module) -> list[nn.Module]:
    """The modules of a backbone, without those inside of adapters."""
    layers = [module for module in body.modules() if isinstance(module, BaseTunerLayer)]
    bases = {id(inner) for layer in layers for inner in layer.get_base_layer().modules()}
    inside = {id(inner) for layer in layers for inner in layer.modules() if inner is not layer} - bases
    return [module for module in body.modules() if id(module) not in inside]


def _widths(module: nn.Module) -> tuple[int, int]:
    """Width of a matrix's input, and of its output."""
    first, second = module.get_parameter("weight").shape
    return (second, first) if isinstance(module, nn.Linear) else (first, second)


def _shape(twin: PeftModel) -> tuple[int, int, int]:
    """Number of layers, hidden size, number of heads; 0 where a family's configuration has none."""
    config: Any = twin.get_base_model().config
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads")
    layers, width, heads = (int(getattr(config.get_text_config(), name, 0) or 0) for name in names)
    return layers, width, heads


def shorten(number: float) -> str:
    """12345678 -> 12.3 M"""
    for unit in ("", "k", "M", "G", "T"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.4g} P"
