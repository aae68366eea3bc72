"""Linears of fixed codes whose scales are trained: the weight exists while it is used, and no longer."""

from typing import Any

import torch
from torch import Tensor, autograd
from torch.nn import functional

from teq.grid import Grid, grouped, unpack
from teq.quantizers.quantized import Quantized


class DequantizedLinear(autograd.Function):
    """`y = linear(x, W)` of `W = (codes - zero) * scale`, with a gradient to `x` and, closed, to `scale`.

    `dscale[o, g] = sum over the columns i of group g of (dY^T x)[o, i] (codes - zero)[o, i]`. `W` is computed
    again in the backward pass, so that between the passes only codes are held: a byte for every weight, or
    the packed ones of a mapped file, which take no memory.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        codes: Tensor,
        zero: Tensor,
        g_idx: Tensor | None,
        bias: Tensor | None,
        grid: Grid,
    ) -> Tensor:
        """Compute from x `[..., in]`, scale and zero `[out, groups]`, codes and g_idx `[in]`.

        The codes are `[out, in]`, or packed `[bytes]` as they are stored: then codes and zero may be in the
        host's memory.
        """
        ctx.save_for_backward(x, scale, codes, zero, g_idx)
        ctx.grid = grid
        weight = _weight(x.shape[-1], scale, codes, zero, g_idx, grid)
        return functional.linear(x, weight.to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return dx `[..., in]` and dscale `[out, groups]` for dy `[..., out]`."""
        x, scale, codes, zero, g_idx = ctx.saved_tensors
        weight = _weight(x.shape[-1], scale, codes, zero, g_idx, ctx.grid)
        dx = dy @ weight.to(dy.dtype) if ctx.needs_input_grad[0] else None
        product = (dy.flatten(0, -2).T @ x.flatten(0, -2)).to(weight.dtype).mul_(weight)  # dW * W
        return dx, _group_sums(product, ctx.grid, g_idx).div_(scale), None, None, None, None, None


def _weight(
    columns: int, scale: Tensor, codes: Tensor, zero: Tensor, g_idx: Tensor | None, grid: Grid
) -> Tensor:
    """Return `W [out, in]` in fp32."""
    if codes.ndim == 1:
        codes = unpack(codes.to(scale.device), grid.bits, (len(scale), columns))
        zero = zero.to(scale.device, scale.dtype)
    return Quantized(codes, scale, zero, g_idx).dequantize(grid)


def _group_sums(values: Tensor, grid: Grid, g_idx: Tensor | None) -> Tensor:
    """Return the sums `[out, groups]` of values `[out, in]` over the columns of each group.

    Columns of an order of their own are sorted by group first: adding by index has no fixed order on a GPU.
    """
    values = values if g_idx is None else values[:, g_idx.argsort()]
    return torch.cat([part.sum(-1) for part in grouped(values, grid)], 1)
