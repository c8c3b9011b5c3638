"""Products with frozen weights and LoRA: all linear modules of one input in a single product.

Always holds: outputs and gradients are those of the modules one by one, up to rounding. The gradients are written out.
So a frozen weight can be prepacked for the processor, and no product is computed that nothing reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

from trainer.compat import has_fast_bf16, has_reordered_weights, reorder_weight, reordered_linear
from trainer.dropout.masks import Mask, masked
from trainer.dropout.sites import draw_mask

PREPACKED_FOR = 1024  # rows of a product; oneDNN packs alike for most numbers


class FrozenWeight:
    """A weight [O, H] and its bias [O], if it has one, that never change.

    On a CPU with bf16 instructions it is also prepacked by oneDNN, once for each direction. Otherwise oneDNN would pack
    it in every product, which costs a tenth of the time. The price is the weight's memory once more for each.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, trains: bool) -> None:
        """`trains`: whether `multiply_back` is called."""
        self.weight, self.bias = weight, bias
        self._forward = self._back = None
        on_cpu = weight.device.type == "cpu" and torch.backends.mkldnn.is_available() and has_reordered_weights
        if on_cpu and weight.dtype == torch.bfloat16 and has_fast_bf16():
            self._forward = reorder_weight(weight, PREPACKED_FOR)
            if trains:
                self._back = reorder_weight(weight.t().contiguous(), PREPACKED_FOR)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """x weight^T + bias: [..., H] -> [..., O]."""
        if self._forward is None:
            return nn.functional.linear(x, self.weight, self.bias)
        return reordered_linear(x, self._forward, self.bias)

    def multiply_back(self, gradient: torch.Tensor) -> torch.Tensor:
        """gradient weight: [..., O] -> [..., H]."""
        return reordered_linear(gradient, self._back, None) if self._back is not None else gradient @ self.weight


def _join_in_place(parameters: list[nn.Parameter]) -> torch.Tensor:
    """Joins parameters along the first axis and turns each into its part; a single one is not copied."""
    joined = torch.cat([each.data for each in parameters]) if len(parameters) > 1 else parameters[0].data
    for parameter, part in zip(parameters, joined.split([len(each) for each in parameters]), strict=True):
        parameter.data = part
    return joined


class Projection:
    """Linear modules of one input in a single product, where all are joinable; others run one by one.

    The frozen weights become parts of one tensor, [outputs of all, H]. They take no more memory than before.
    """

    def __init__(self, *modules: Any, trains: bool) -> None:
        self.modules = modules
        has_bias = [_base(module).bias is not None for module in modules if is_joinable(module)]
        self.joined = len(has_bias) == len(modules) and len(set(has_bias)) == 1
        if self.joined:
            linears = [_base(module) for module in modules]
            self.sizes = [linear.out_features for linear in linears]
            weight = _join_in_place([linear.weight for linear in linears])
            bias = _join_in_place([linear.bias for linear in linears]) if has_bias[0] else None
            self.frozen = FrozenWeight(weight, bias, trains)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Computes the outputs of all modules side by side: [..., H] -> [..., outputs of all]."""
        if not self.joined:
            return torch.cat([module(x) for module in self.modules], dim=-1)
        if torch.is_autocast_enabled(x.device.type):  # once, not for each product
            x = x.to(self.frozen.weight.dtype)
        parts, weights, end = [], [], 0
        for module, size in zip(self.modules, self.sizes, strict=True):
            end += size
            if isinstance(module, LoraLinear):
                dropout = module.lora_dropout["default"]
                mask = draw_mask(x, getattr(dropout, "p", 0.0), dropout)
                scale = module.scaling["default"] * (mask.scale if mask is not None else 1)
                parts.append((slice(end - size, end), scale, mask))
                weights += [module.lora_A["default"].weight, module.lora_B["default"].weight]
        product: torch.Tensor = _Product.apply(x, self.frozen, parts, *weights)
        return product


def widened(x: torch.Tensor, modules: Sequence[Any]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Turns each of these joinable modules into a single product, bias and adapter included.

    Returns x [..., H] with the adapters' A x and ones beside it, [..., W]; W is a multiple of 8. And for each module
    the weight [O, W] whose product with it is the module's output.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(_base(modules[0]).weight.dtype)
    adapters: list[Any] = [module for module in modules if isinstance(module, LoraLinear)]
    lows = [each.lora_A["default"](each.lora_dropout["default"](x)) for each in adapters]
    num_ones = 8 - sum(low.shape[-1] for low in (x, *lows)) % 8  # other widths are slower on a GPU
    weights = []
    for module in modules:
        weight, bias = _base(module).weight.to(x.dtype), _base(module).bias
        parts = [
            (each.lora_B["default"].weight * each.scaling["default"]).to(weight.dtype)
            if each is module
            else weight.new_zeros(len(weight), low.shape[-1])
            for each, low in zip(adapters, lows, strict=True)
        ]
        bias = bias if bias is not None else weight.new_zeros(len(weight))
        ones = [bias.unsqueeze(1), weight.new_zeros(len(weight), num_ones - 1)]
        weights.append(torch.cat([weight, *parts, *ones], dim=1))
    return torch.cat([x, *lows, x.new_ones(*x.shape[:-1], num_ones)], dim=-1), weights


def is_joinable(module: Any) -> bool:
    """Whether a module is linear and frozen, with plain LoRA or without."""
    linear = _base(module)
    if type(linear) is not nn.Linear or any(p.requires_grad for p in linear.parameters()):
        return False
    return module is linear or (
        type(module) is LoraLinear
        and module.active_adapters == ["default"]
        and not (module.merged or module.disable_adapters or module.lora_variant or module.lora_bias["default"])
    )


def _base(module: Any) -> Any:
    return module.get_base_layer() if isinstance(module, LoraLinear) else module


Part = tuple[slice, float, Mask | None]
"""an adapter's outputs among those of all modules, its scale, and what it drops of x"""


class _Product(torch.autograd.Function):
    """x weight^T + bias. Each part adds scale * dropout(x) A^T B^T to its outputs."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, frozen: FrozenWeight, parts: Sequence[Part], *weights: torch.Tensor
    ) -> torch.Tensor:
        """`weights`: A [R, H] and B [outputs of the part, R] of each part."""
        output = frozen.multiply(x)
        flat, cast, lows = output.flatten(0, -2), [weight.to(x.dtype) for weight in weights], []
        for (outputs, scale, mask), a, b in zip(parts, cast[::2], cast[1::2], strict=True):
            low = masked(x, mask).flatten(0, -2) @ a.t()
            flat[:, outputs].addmm_(low, b.t(), alpha=scale)
            lows.append(low)
        keeps = [mask.keep for *_, mask in parts if mask is not None]
        ctx.save_for_backward(*([*cast, *lows, *keeps, x] if parts else []))  # without an adapter nothing reads x again
        ctx.parts = [(outputs, scale, mask is not None) for outputs, scale, mask in parts]
        ctx.frozen, ctx.dtypes = frozen, [weight.dtype for weight in weights]
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *saved, x = ctx.saved_tensors or [None]
        num_parts = len(ctx.parts)
        cast, lows, keeps = saved[: 2 * num_parts], saved[2 * num_parts : 3 * num_parts], iter(saved[3 * num_parts :])
        grad_x = ctx.frozen.multiply_back(gradient) if ctx.needs_input_grad[0] else None
        grad_weights = []
        for (outputs, scale, is_masked), a, b, low in zip(ctx.parts, cast[::2], cast[1::2], lows, strict=True):
            mask = Mask(next(keeps), scale) if is_masked else None
            own = gradient.flatten(0, -2)[:, outputs]
            grad_low = (own @ b).mul_(scale)
            grad_weights += [grad_low.t() @ masked(x, mask).flatten(0, -2), (low.t() @ own).t().mul_(scale)]
            if grad_x is not None:
                grad_x += masked((grad_low @ a).view_as(x), mask)
        return grad_x, None, None, *(grad.to(dtype) for grad, dtype in zip(grad_weights, ctx.dtypes, strict=True))
