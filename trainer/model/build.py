"""Backbone + head + adapter as one model: checked before a weight is read, then built, in the precision of the run.

Always holds: only adapter and head train, in fp32. Frozen matrices are kept in the compute type, norms in fp32, and
input embeddings in fp32 or as stored.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trainer.compat import layer_classes
from trainer.config.schema import NO_ADAPTER, PeftConfig
from trainer.errors import UserError, one_line
from trainer.model.backbone import NARROW_TYPES, Backbone, load_weights
from trainer.model.peft_options import (
    NEEDS_NUMBERS,
    adapter_config,
    add_adapter,
    check_effects,
    check_parameter_budget,
    reads_weights,
)
from trainer.model.plain import train_plainly

MATRIX_MODULES = (nn.Linear, Conv1D)
COMPUTE_TYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""by run.precision"""


def check_fit(backbone: Backbone, settings: PeftConfig, max_length: int, pairs: bool) -> PeftModel:
    """Builds the model without weights, and refuses what cannot train before anything large is read.

    An example has `max_length` tokens at most; with `pairs` it is two texts.
    """
    _check_max_length(backbone, max_length, pairs)
    model = build_without_weights(backbone, settings)
    if settings.peft_type != NO_ADAPTER:
        check_effects(model, settings)
    check_parameter_budget(model, settings)
    return model


def build_without_weights(backbone: Backbone, settings: PeftConfig) -> PeftModel:
    """Builds the model on the meta device: shapes and names, and no numbers where PEFT can do without."""
    with torch.device("cpu" if settings.peft_type in NEEDS_NUMBERS else "meta"), torch.random.fork_rng(devices=[]):
        try:
            # a copy, since PEFT's layer_replication changes the configuration
            model = AutoModelForSequenceClassification.from_config(copy.deepcopy(backbone.config))
        except Exception as error:  # a family's code raises many kinds at sizes that do not fit together
            raise UserError(f"model.name: {backbone.path} cannot be built: {one_line(error)}") from None
        model = prepare_training(model, settings, backbone.path, set())
    widen_trained(model)
    return model


def prepare_training(model: nn.Module, settings: PeftConfig, path: str, new_modules: set[str]) -> PeftModel:
    """Adds the adapter, or lets the model itself train; `new_modules` are those that no weights file filled."""
    if settings.peft_type == NO_ADAPTER:
        return train_plainly(model, settings, path, new_modules)
    return add_adapter(model, adapter_config(settings, path), new_modules)


def widen_trained(model: PeftModel) -> None:
    """Keeps what trains in fp32, in memory of its own, whatever type the file or config.json has."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32, copy=True)


def _check_max_length(backbone: Backbone, max_length: int, pairs: bool) -> None:
    positions = backbone.max_positions
    if positions is not None and max_length > positions:
        raise UserError(f"data.max_length: {max_length} is above the {positions} positions of {backbone.path}")
    num_special = backbone.tokenizer.num_special_tokens_to_add(pair=pairs)
    if max_length <= num_special:
        raise UserError(f"data.max_length: {max_length} leaves no room for text beside {num_special} special tokens")


def build_model(backbone: Backbone, settings: PeftConfig, seed: int) -> tuple[PeftModel, list[str]]:
    """Loads the weights and adds head and adapter, drawn from the seed, in fp32; on the CPU.

    Layers that the weights lack are new and train, so the parameter budget is checked again. Also returns notes on the
    weights for the user.
    """
    torch.manual_seed(seed)
    model, missing, notes = load_weights(backbone)
    new_modules = {name.rpartition(".")[0] for name in missing}
    if reads_weights(settings):
        model.float()
    torch.manual_seed(seed)
    model = prepare_training(model, settings, backbone.path, new_modules)
    model.peft_config["default"].revision = backbone.commit
    check_parameter_budget(model, settings)
    widen_trained(model)
    return model, notes


def set_precision(model: nn.Module, compute_type: torch.dtype) -> None:
    """Gives each frozen tensor the type that it keeps: matrices and their biases the compute type, the others fp32.

    autocast would cast a matrix at every use. Each is copied out of its mapped file: a file aligns memory by chance,
    which changes the last bits of small products. So the host holds one matrix twice, never all.
    Input embeddings stay in a 16-bit type that the file has. What they return is in fp32, where it is the same number.
    An adapter's output gets the type that autocast gives a product. Some methods return fp32, which DeBERTa refuses.
    """
    embeddings = _find_narrow_embeddings(model) if compute_type != torch.float32 else []
    for embedding in embeddings:
        embedding.register_forward_hook(lambda module, ids, output: output.float())
    for module in model.modules():
        # DeBERTa adds the biases of its queries itself
        is_matrix = isinstance(module, MATRIX_MODULES) or hasattr(module, "q_bias")
        for parameter in module.parameters(recurse=False):
            if not parameter.is_floating_point():
                continue  # quantized
            if is_matrix and not parameter.requires_grad:
                parameter.data = parameter.data.to(compute_type, copy=True)
            elif not is_matrix and parameter.dtype in NARROW_TYPES and module not in embeddings:
                parameter.data = parameter.data.float()
        if isinstance(module, BaseTunerLayer) and isinstance(module.get_base_layer(), MATRIX_MODULES):
            module.register_forward_hook(_cast_as_autocast)


def _find_narrow_embeddings(model: nn.Module) -> list[nn.Module]:
    """The embeddings of tokens that are frozen and in 16 bits. A subclass of `nn.Embedding` scales what it reads."""
    backbone = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    vocab_size = getattr(backbone.config.get_text_config(), "vocab_size", None)
    others = {id(getattr(module, "weight", None)) for module in model.modules() if type(module) is not nn.Embedding}
    return [
        module
        for module in model.modules()
        if type(module) is nn.Embedding and module.num_embeddings == vocab_size and id(module.weight) not in others
        if module.weight.dtype in NARROW_TYPES and not module.weight.requires_grad
    ]


def _cast_as_autocast(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    kind = output.device.type
    return output.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else output


def shard_frozen(model: PeftModel, device: torch.device, world_size: int) -> None:
    """Shards the frozen weights over the ranks (FSDP2); each is whole only while its layer computes.

    What trains stays whole on every rank, so gradients, optimizer and checkpoints equal those of an unsharded run.
    In place: moves `model` from the CPU to `device`.
    """
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    if len(trained) == len(list(model.parameters())):
        raise UserError("peft.peft_type none: no weight is frozen, so none can be sharded; start without FSDP")
    mesh = init_device_mesh(device.type, (world_size,))
    layers = layer_classes(model.get_base_model())
    for module in reversed(list(model.modules())):  # innermost first, the model itself last
        if module is model or type(module).__name__ in layers:
            fully_shard(module, mesh=mesh, ignored_params=trained)
    for parameter in trained:
        parameter.data = parameter.data.to(device)
