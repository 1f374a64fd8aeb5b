"""A linear map that learns ternary weights and 8-bit activations: BitNet b1.58 (Ma et al., arXiv 2402.17764). Knows no model.

Forward, with x the input and W the weight, both as floating-point numbers that training moves:

    x^ = x + lambda (Q8(x) - x),   W^ = W + lambda (Q(W) - W),   y = x^ W^T + bias

Q(W) = s clamp(round(W / s), -1, 1) with s = mean |W| over the whole matrix, and Q8(x) rounds each token to 8 bits by its largest absolute
value. Gradients pass straight through both roundings (Bengio et al., arXiv 1308.3432). lambda goes from 0 to 1 while training
(huggingface.co/blog/1_58_llm_extreme_quantization): at 0 this is nn.Linear, bit for bit, at 1 it is BitNet.

Where a norm is wanted too, x is what an RMSNorm of its own makes of the input, at every lambda: transformers' `use_rms_norm`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .record import EPSILON

SMALLEST = 1e-5  # that a scale may be
LEVELS = 127  # of an activation's absolute value; its codes are -128 to 127


def weight_scale(weight: Tensor) -> Tensor:
    """Return s = mean |W|, a float32 number, at least 1e-5."""
    return weight.float().abs().mean().clamp(min=SMALLEST)


def weight_codes(weight: Tensor, scale: Tensor | float) -> Tensor:
    """Return clamp(round(W / s), -1, 1), float32 of W's shape."""
    return (weight.float() / scale).round_().clamp_(-1, 1)


def round_weight(weight: Tensor) -> Tensor:
    """Return Q(W), float32 of W's shape: each number is -s, 0 or s."""
    scale = weight_scale(weight)
    return weight_codes(weight, scale).mul_(scale)


def round_input(value: Tensor) -> Tensor:
    """Return Q8(x), float32 of x's shape [..., inputs]: a token's numbers are multiples of its largest absolute value / 127."""
    value = value.float()
    scale = LEVELS / value.abs().amax(-1, keepdim=True).clamp(min=SMALLEST)
    return (value * scale).round_().clamp_(-LEVELS - 1, LEVELS).div_(scale)


class _Blend(torch.autograd.Function):
    """Move a value towards its rounding; the gradient passes as if nothing had happened."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, rounded: Callable[[Tensor], Tensor], strength: Tensor) -> Tensor:
        """Return value + lambda (rounded - value), exactly `value` at 0 and exactly `rounded` at 1."""
        return torch.lerp(value.float(), rounded(value), strength).to(value.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient as it is."""
        return gradients[0], None, None


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-6) times a weight for each of the inputs, computed in float32 (Zhang and Sennrich, arXiv 1910.07467)."""

    def __init__(self, inputs: int, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(inputs, device=device, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        """[..., inputs] -> [..., inputs]: rounded to the input's dtype before the weight comes, as transformers' LlamaRMSNorm does."""
        value = input.float()
        value = value * torch.rsqrt(value.pow(2).mean(-1, keepdim=True) + EPSILON)
        return self.weight * value.to(input.dtype)


class BitLinear(nn.Linear):
    """nn.Linear with the forward above. strength: lambda, a float32 number that is not saved with the model.

    `convert` makes one of an nn.Linear in place, so that its weight stays the parameter that it was.
    """

    strength: Tensor
    rms_norm: RMSNorm | None

    def forward(self, input: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        if self.rms_norm is not None:
            input = self.rms_norm(input)
        weight = _Blend.apply(self.weight, round_weight, self.strength)
        return linear(_Blend.apply(input, round_input, self.strength), weight, self.bias)


def convert(module: nn.Linear, *, norm: bool = False) -> None:
    """Make a BitLinear of an nn.Linear, in place; lambda is 0. norm: with a norm before it, of weight 1."""
    weight = module.weight
    device = torch.device("cpu") if weight.is_meta else weight.device  # weights may come later, from another process; lambda does not
    module.register_buffer("strength", torch.zeros((), device=device), persistent=False)
    module.register_module("rms_norm", RMSNorm(module.in_features, weight.device, weight.dtype) if norm else None)
    module.__class__ = BitLinear


def set_strength(model: nn.Module, strength: float) -> None:
    """Set lambda of all BitLinears in a model."""
    for module in model.modules():
        if isinstance(module, BitLinear):
            module.strength.fill_(strength)
