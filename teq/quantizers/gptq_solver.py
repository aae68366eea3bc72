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
STRIP = 16  # columns inside a block that correct each other one by one
BAND = 256  # rows of the Hessian that are made in one product, at least: fewer make it thin
DIRECT = 128  # a triangular matrix of at most this size is inverted by the library at once


class Hessian:
    """The running mean over sequences of `2 x^T x` `[in, in]`, fp32.

    It is symmetric, so only bands of rows from the diagonal on are summed up: little more than half the work.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.total = torch.zeros(width, width, device=device)
        self.sequences = 0
        band = max(BAND, -(-width // 8))
        self.bands = [(start, min(start + band, width)) for start in range(0, width, band)]

    def add(self, inputs: Tensor) -> None:
        """Take in one batch of inputs `[sequence, token, in]`."""
        flat = inputs.flatten(0, -2).float()
        for start, stop in self.bands:
            self.total[start:stop, start:].addmm_(flat[:, start:stop].T, flat[:, start:])
        self.sequences += inputs.shape[0]

    def mean(self) -> Tensor:
        """The Hessian `[in, in]`; the accumulator is used up."""
        for start, stop in self.bands:
            self.total[stop:, start:stop] = self.total[start:stop, stop:].T
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
        hessian, weight = hessian[order][:, order], weight[:, order]
    size = columns if grid.group_size == -1 else grid.group_size
    group_of = (order if fixed is not None else torch.arange(columns, device=weight.device)) // size
    inverse, damping, added = _inverse_factor(hessian, settings.damping)
    codes, scale, zero, errors = _columns(weight, inverse, fixed, group_of, settings)
    g_idx = None
    if settings.act_order:
        back = torch.argsort(order)
        codes = codes[:, back]
        g_idx = group_of[back] if grid.group_size != -1 else None
    quantized = Quantized(codes.to(torch.uint8), scale, zero, g_idx)
    lost = quantized.dequantize(grid).sub_(original)
    lost[:, dead] = 0
    # E = errors @ inverse and inverse^T inverse = (H + added)^-1, so tr(E (H + added) E^T) = |errors|^2
    return Solution(quantized, damping, errors - added * float(lost.square_().sum(dtype=torch.float64)))


def _inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor, float, float]:
    """Upper Cholesky factor of the inverse of the damped Hessian (fp32), the damping that was needed, and
    what it added to the diagonal.

    With H = V V^T, V upper (the Cholesky factor of H read from its last row and column backwards), the factor
    is V^-1: one factorization and no inverse of H. V is computed in fp64: the damped Hessians of SmolLM2-135M
    have condition numbers above 1e4, so that in fp32 it is good to three digits and the codes depend on the
    thread count. Its own condition is the square root of that: fp32 does for the inverse. The codes of the
    golden tensors are the official fp32 code's either way.
    """
    damped, added = hessian.flip(0, 1).double(), 0.0
    mean = float(damped.diagonal().mean())
    for step in range(LADDER + 1):
        damped.diagonal().sub_(added)
        added = damping * 10**step * mean
        damped.diagonal().add_(added)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return _inverse_of_upper(factor.flip(0, 1).float()), damping * 10**step, added
    raise UserError(
        f"the Hessian is not positive definite even with gptq.damping={damping * 10**LADDER:g}: "
        "raise gptq.damping or gptq.samples"
    )


def _inverse_of_upper(factor: Tensor) -> Tensor:
    """Inverse of an upper triangular matrix by halves, so that most of the work is matrix products."""
    size = factor.shape[0]
    if size <= DIRECT:
        one = torch.eye(size, dtype=factor.dtype, device=factor.device)
        return torch.linalg.solve_triangular(factor, one, upper=True)
    half = size // 2
    inverse = torch.zeros_like(factor)
    inverse[:half, :half] = first = _inverse_of_upper(factor[:half, :half])
    inverse[half:, half:] = last = _inverse_of_upper(factor[half:, half:])
    inverse[:half, half:] = (first @ factor[:half, half:]).neg_() @ last
    return inverse


def _columns(
    weight: Tensor, inverse: Tensor, fixed: tuple[Tensor, Tensor] | None, group_of: Tensor, settings: "Gptq"
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Codes `[out, in]`, scale and zero `[out, groups]`, and the sum of the squared errors that were passed
    on; columns are in processing order.

    A group's grid is taken from `weight` when its first column is reached, as updated so far by whole blocks
    only: the present block's own corrections live in `block` until it ends. That is what the official code
    does. Inside a block, corrections reach the next few columns one by one and the others a strip at a time.
    Until a block ends its codes count from the zero of their group, which saves two operations a column.
    """
    grid, columns = settings.grid, weight.shape[1]
    size = columns if grid.group_size == -1 else grid.group_size
    rows = weight.T.contiguous()  # [in, out]: a column of the weight is contiguous here
    codes = torch.empty_like(rows)
    if fixed is None:
        scale, zero = rows.new_empty(2, grid.group_count(columns), rows.shape[1])  # [groups, out]
    else:
        scale, zero = (params.T.contiguous() for params in fixed)
    numbers, passed_on = group_of.tolist(), 0.0
    rounded, lowest, highest = torch.empty_like(rows[0]), zero.neg(), grid.levels - zero
    for start in range(0, columns, settings.block_size):
        stop = min(start + settings.block_size, columns)
        block, errors = rows[start:stop].clone(), torch.empty_like(rows[start:stop])
        factor = inverse[start:stop, start:stop]
        steps = factor.diagonal().reciprocal().neg_()
        now, code_of, error_of, step = (
            block.unbind(),
            codes[start:stop].unbind(),
            errors.unbind(),
            steps.tolist(),
        )
        for first in range(0, stop - start, STRIP):
            last = min(first + STRIP, stop - start)
            for i in range(first, last):
                column, group = start + i, numbers[start + i]
                if fixed is None and column % size == 0:
                    scale[group], zero[group] = qparams(rows[column : column + size].T, grid)
                    torch.sub(grid.levels, zero[group], out=highest[group])
                    torch.neg(zero[group], out=lowest[group])
                code = torch.div(now[i], scale[group], out=code_of[i]).round_()
                torch.clamp(code, lowest[group], highest[group], out=code)
                torch.mul(code, scale[group], out=rounded)
                torch.sub(now[i], rounded, out=error_of[i])
                block[i + 1 : last].addr_(factor[i, i + 1 : last], error_of[i], alpha=step[i])
            errors[first:last].mul_(steps[first:last, None])
            block[last:].addmm_(factor[first:last, last:].T, errors[first:last])
        rows[stop:].addmm_(inverse[start:stop, stop:].T, errors)
        passed_on += float(errors.square_().sum(dtype=torch.float64))
        codes[start:stop].add_(zero[group_of[start:stop]])
    return codes.T.contiguous(), scale.T.contiguous(), zero.T.contiguous(), passed_on
