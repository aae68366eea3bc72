"""The GPTQ algorithm for linears that read the same input: one Hessian, one Cholesky, one pass over the
columns.

Numerically the official code (IST-DASLab/gptq, gptq.py and quant.py): codes are equal on the golden tensors
in the tests. Rows do not interact, so linears with the same input are solved together as one tall matrix.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from teq.grid import group_params, qparams
from teq.quantizers import Quantized
from teq.spec import UserError

if TYPE_CHECKING:
    from teq.quantizers.gptq import Gptq

LADDER = 3  # times the damping is raised tenfold when the Hessian is not positive definite


class Hessian:
    """The running mean over sequences of `2 x^T x` `[in, in]`, fp32."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.total = torch.zeros(width, width, device=device)
        self.sequences = 0

    def add(self, inputs: Tensor) -> None:
        """Take in one batch of inputs `[sequence, token, in]`."""
        flat = inputs.flatten(0, -2).float()
        self.total.addmm_(flat.T, flat)
        self.sequences += inputs.shape[0]

    def mean(self) -> Tensor:
        """The Hessian `[in, in]`; the accumulator is used up."""
        return self.total.mul_(2 / self.sequences)


@dataclass(frozen=True)
class Solution:
    """The quantized rows and how they came about."""

    quantized: Quantized
    damping: float
    error: float  # tr(E H E^T), E the weight error


def solve(weight: Tensor, hessian: Tensor, settings: "Gptq") -> Solution:
    """Quantize `weight [out, in]` (fp32) under `hessian [in, in]` (fp32).

    Raises UserError when the Hessian stays indefinite after the damping was raised tenfold three times.
    """
    grid, columns = settings.grid, weight.shape[1]
    weight, original, hessian = weight.clone(), weight, hessian.clone()
    whole_row = group_params(weight, grid) if grid.group_size == -1 else None
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    weight[:, dead] = 0
    fixed = group_params(weight, grid) if settings.static_groups and whole_row is None else whole_row
    order = torch.arange(columns, device=weight.device)
    if settings.act_order:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    size = columns if grid.group_size == -1 else grid.group_size
    group_of = (order if fixed is not None else torch.arange(columns, device=weight.device)) // size
    inverse, damping = _inverse_factor(hessian[order][:, order], settings.damping)
    codes, scale, zero = _columns(weight[:, order], inverse, fixed, group_of, settings)
    back = torch.argsort(order)
    codes = codes[:, back]
    g_idx = group_of[back] if settings.act_order and grid.group_size != -1 else None
    quantized = Quantized(codes.to(torch.uint8), scale, zero, g_idx)
    lost = quantized.dequantize(grid).sub_(original)
    lost[:, dead] = 0
    return Solution(quantized, damping, float(((lost @ hessian) * lost).sum()))


def _inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """Upper Cholesky factor of the inverse of the damped Hessian (fp32), and the damping that was needed.

    Computed in fp64: the damped Hessians of SmolLM2-135M have condition numbers above 1e4, so that in fp32
    the factor is good to three digits and the codes depend on the thread count. The codes of the golden
    tensors are the official fp32 code's either way.
    """
    exact = hessian.double()
    mean = exact.diagonal().mean()
    for step in range(LADDER + 1):
        damped = exact.clone()
        damped.diagonal().add_(damping * 10**step * mean)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not failed:
                return inverse.float(), damping * 10**step
    raise UserError(
        f"the Hessian is not positive definite even with gptq.damping={damping * 10**LADDER:g}: "
        "raise gptq.damping or gptq.samples"
    )


def _columns(
    weight: Tensor, inverse: Tensor, fixed: tuple[Tensor, Tensor] | None, group_of: Tensor, settings: "Gptq"
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes `[out, in]`, scale and zero `[out, groups]`; columns are in processing order.

    A group's grid is taken from `weight` when its first column is reached, as updated so far by whole blocks
    only: the present block's own corrections live in `block` until it ends. That is what the official code
    does.
    """
    grid, columns = settings.grid, weight.shape[1]
    size = columns if grid.group_size == -1 else grid.group_size
    rows = weight.T.contiguous()  # [in, out]: a column of the weight is contiguous here
    codes = torch.empty_like(rows)
    groups = grid.group_count(columns)
    scale, zero = fixed or (
        weight.new_empty(weight.shape[0], groups),
        weight.new_empty(weight.shape[0], groups),
    )
    numbers = group_of.tolist()
    for start in range(0, columns, settings.block_size):
        stop = min(start + settings.block_size, columns)
        block, errors = rows[start:stop].clone(), torch.empty_like(rows[start:stop])
        factor = inverse[start:stop, start:stop]
        diagonal = factor.diagonal().tolist()
        for i in range(stop - start):
            column, group = start + i, numbers[start + i]
            if fixed is None and column % size == 0:
                scale[:, group], zero[:, group] = qparams(rows[column : column + size].T, grid)
            s, z = scale[:, group], zero[:, group]
            code = (block[i] / s).round_().add_(z).clamp_(0, grid.levels)
            codes[column] = code
            errors[i] = (block[i] - (code - z).mul_(s)).div_(diagonal[i])
            block[i:].addr_(factor[i, i:], errors[i], alpha=-1)
        rows[stop:].addmm_(inverse[start:stop, stop:].T, errors, alpha=-1)
    return codes.T.contiguous(), scale, zero
