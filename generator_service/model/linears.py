"""Linear layers as the CPU runs them best: weights laid out once for oneDNN, or held as int8."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn

from generator_service.model import cpu_kernels
from generator_service.types import Quantization

_PACKED_FOR_ROWS = 32
"""oneDNN lays a weight out for this many rows; the layout is as good from a beam's rows to an encoder's tokens."""


class PackedLinear(nn.Module):
    """y = x Wᵀ + b in float32 on the CPU, W in the blocks that oneDNN's kernels read.

    A plain weight is laid out anew in every call, which for the few rows of a decoding step takes longer than the
    product itself.
    """

    weight = None  # transformers' T5 asks for its dtype where there is one

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        bias = linear.bias.detach() if _has_bias(linear) else None
        with torch.inference_mode(mode=False), torch.no_grad():
            weight = linear.weight.detach().clone()
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR_ROWS)  # noqa: SLF001
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """float32 [..., in] -> [..., out]."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")  # noqa: SLF001
        return out


class Int8Linear(nn.Module):
    """y = x Wᵀ + b with W int8 by output, x int8 by row: a row's result does not depend on the rows beside it.

    Scales are the largest magnitudes over 127, without zero points; sums are exact int32.
    """

    weight = None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = _scale(weight)  # [out, 1]
        quantized = (weight / scale).round_().to(torch.int8)
        self.product = _FusedProduct(quantized, scale) if _has_vnni() else PlainProduct(quantized, scale)
        self.bias = linear.bias.detach().float() if _has_bias(linear) else None

    def forward(self, x: Tensor) -> Tensor:
        """float [..., in] -> float32 [..., out]."""
        rows = x.reshape(-1, x.shape[-1])
        product: nn.Module = self.product
        if isinstance(product, _FusedProduct) and cpu_kernels.library() is not None:
            unsigned, scale = cpu_kernels.quantize(rows)
            return cpu_kernels.scale_(product.of_bytes(unsigned), scale, self.bias).view(*x.shape[:-1], -1)
        scale = _scale(rows)
        out: Tensor = self.product((rows * scale.reciprocal()).round_().to(torch.int8))
        out = out.mul_(scale) if self.bias is None else torch.addcmul(self.bias, out, scale, out=out)
        return out.view(*x.shape[:-1], -1)


class _FusedProduct(nn.Module):
    """int8 [rows, in] -> float32 [rows, out], times the weight's scales: W packed, sums scaled while in registers.

    oneDNN multiplies unsigned by signed bytes; 128 more in each x, as its zero point, takes nothing off exactness.
    """

    def __init__(self, quantized: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.packed = torch.ops.onednn.qlinear_prepack(quantized, [_PACKED_FOR_ROWS, quantized.shape[1]])
        self.scale, self.zero_points = scale[:, 0].contiguous(), torch.zeros(len(scale), dtype=torch.int64)

    def forward(self, x: Tensor) -> Tensor:
        return self.of_bytes(x.view(torch.uint8).bitwise_xor_(128))

    def of_bytes(self, unsigned: Tensor) -> Tensor:
        """uint8 [rows, in], 128 more than the int8 of each -> float32 [rows, out]."""
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            unsigned,
            1.0,
            128,
            self.packed,
            self.scale,
            self.zero_points,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        return out


class PlainProduct(nn.Module):
    """The same by torch's integer product, where the processor has no instruction for bytes."""

    def __init__(self, quantized: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.quantized, self.scale = quantized.t().contiguous(), scale[:, 0].contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """int8 [rows, in] -> float32 [rows, out]."""
        return torch.mul(torch._int_mm(x, self.quantized), self.scale)  # noqa: SLF001


def projection(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer over a weight [out, in] that something else holds too."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


def with_linears(module: nn.Module, quantization: Quantization) -> nn.Module:
    """The module with its linear layers laid out for the CPU; the given one stays as it is.

    Only what runs in float32 on the CPU changes; elsewhere the module comes back as it is.
    """
    if isinstance(module, nn.Linear):
        if module.weight.device.type != "cpu" or module.weight.dtype != torch.float32:
            return module
        if quantization is Quantization.INT8:
            return Int8Linear(module)
        return PackedLinear(module) if torch._C._has_mkldnn else module  # noqa: SLF001
    children = {name: with_linears(child, quantization) for name, child in module.named_children()}
    if all(child is before for child, before in zip(children.values(), module.children(), strict=True)):
        return module
    changed = copy.copy(module)
    changed.__dict__["_modules"] = {}  # copy.copy shares it with the original
    for name, child in children.items():
        changed.add_module(name, child)
    return changed


def _has_bias(linear: nn.Linear) -> bool:
    """torch's annotation denies that a bias may be None."""
    return cast(Tensor | None, linear.bias) is not None


def _scale(rows: Tensor) -> Tensor:
    """[rows, n] -> [rows, 1]; rows of zeros have the least scale there is."""
    largest = torch.maximum(rows.amax(dim=1, keepdim=True), -rows.amin(dim=1, keepdim=True))
    return largest.float().div_(127).clamp_min_(torch.finfo(torch.float32).tiny)


def _has_vnni() -> bool:
    """Without it oneDNN's sums of bytes may saturate."""
    return bool(torch._C._has_mkldnn and torch.cpu._is_vnni_supported())  # noqa: SLF001
