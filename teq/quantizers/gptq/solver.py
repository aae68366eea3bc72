"""The GPTQ algorithm for linears of one input: a Hessian, its Cholesky factor, a pass over the columns.

Numerically the official code (IST-DASLab/gptq, gptq.py and quant.py): codes are equal on the golden tensors
in the tests. Rows do not interact, so linears with the same input are solved together as one tall matrix.
The order `group` is the group-aware reordering of Gafni et al. 2025 (arXiv 2505.14638), as in GPTQModel. The
cross term is GPTAQ's (Li et al. 2025, arXiv 2504.02692), which corrects for the error of the inputs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from teq.grid import Grid, group_params
from teq.quantizers.quantized import Quantized
from teq.quantizers.search import searched_params
from teq.spec import UserError

LADDER = 3  # times the damping is raised tenfold when the Hessian is not positive definite
STRIP = 16  # columns inside a block that correct each other one by one
BAND = 256  # rows of the Hessian that are made in one product, at least: fewer make it thin


class Hessian:
    """The running mean over sequences of `2 x^T x` `[in, in]`, fp32.

    It is symmetric, so only bands of rows from the diagonal on are summed up: little more than half the work.
    With the float model's inputs it also holds GPTAQ's cross term, the mean of `2 (x_float - x)^T x`.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.total = torch.zeros(width, width, device=device)
        self.cross = torch.empty(0)
        self.sequences = 0
        band = max(BAND, -(-width // 8))
        self.bands = [(start, min(start + band, width)) for start in range(0, width, band)]

    def add(self, inputs: Tensor, exact: Tensor | None = None) -> None:
        """Take in one batch of inputs `[sequence, token, in]`, and the float model's where they are known."""
        flat = inputs.flatten(0, -2).float()
        if exact is not None:
            if not self.sequences:
                self.cross = torch.zeros_like(self.total)
            self.cross.addmm_((exact.flatten(0, -2).float() - flat).T, flat)
        for start, stop in self.bands:
            self.total[start:stop, start:].addmm_(flat[:, start:stop].T, flat[:, start:])
        self.sequences += inputs.shape[0]

    def mean(self) -> Tensor:
        """Return the Hessian `[in, in]`; the accumulator is used up."""
        for start, stop in self.bands:
            self.total[stop:, start:stop] = self.total[start:stop, stop:].T
        return self.total.mul_(2 / self.sequences)

    def mean_cross(self) -> Tensor:
        """Return the cross term `[in, in]`; the accumulator is used up."""
        return self.cross.mul_(2 / self.sequences)


@dataclass(frozen=True)
class Solution:
    """The quantized rows and how they came about; tensors stay on the device."""

    quantized: Quantized
    damping: float
    failed: Tensor  # bool: the damped Hessian was not positive definite, nothing else here means anything
    error: Tensor  # tr(E H E^T), E the weight error; fp64


@dataclass(frozen=True)
class Options:
    """Columns that are rounded as one block, and the order in which columns are taken.

    `natural`; `act`: by descending diagonal of the Hessian, groups are runs of that order; `static`: the same
    order, the grids of the natural groups known before it starts; `group`: see `group_order`.
    """

    block_size: int = 128
    order: str = "natural"


DEFAULT = Options()
Problem = tuple[Tensor, ...]  # weight [out, in], hessian [in, in] and, if wanted, cross [in, in]; fp32


def solve(
    problems: Sequence[Problem], grid: Grid, damping: float = 0.01, options: Options = DEFAULT
) -> list[Solution]:
    """Quantize each `weight [out, in]` (fp32) under its `hessian [in, in]` (fp32), all left as they are.

    With a `cross` term, of which a share may be given, the columns that follow also make up for the errors of
    the inputs: towards the weight's outputs on the float model's inputs.

    `damping` times the mean of the Hessian's diagonal is added to it, ten times as much where that does not
    make it positive definite. One result is read back for all problems. Raises UserError when a Hessian stays
    indefinite after the damping was raised tenfold three times.
    """
    solutions = [_solve(problem, grid, damping, options) for problem in problems]
    for step in range(1, LADDER + 1):
        failed = torch.stack([solution.failed for solution in solutions]).tolist()
        if not any(failed):
            return solutions
        raised = damping * 10**step
        solutions = [
            _solve(problem, grid, raised, options) if again else solution
            for problem, solution, again in zip(problems, solutions, failed, strict=True)
        ]
    if torch.stack([solution.failed for solution in solutions]).any():
        raise UserError(
            f"the Hessian is not positive definite even with gptq.damping={damping * 10**LADDER:g}: "
            "raise gptq.damping or gptq.samples"
        )
    return solutions


def _solve(problem: Problem, grid: Grid, damping: float, options: Options) -> Solution:
    """Quantize under the Hessian with `damping`; nothing is read back, so that the host runs ahead."""
    weight, hessian, *cross = problem
    columns = weight.shape[1]
    original, size = weight, grid.width(columns)
    diagonal = hessian.diagonal().clone()
    dead = diagonal == 0
    weight = weight.masked_fill(dead, 0)
    fixed = None  # the grid of each group where it is known before the first column
    if grid.group_size == -1 or options.order == "static":
        fixed = _params(original if grid.group_size == -1 else weight, hessian, grid)
    natural = torch.arange(columns, device=weight.device)
    alive = diagonal.masked_fill(dead, 1)
    order = None
    if options.order == "group":
        order = group_order(alive, size)
    elif options.order != "natural":
        order = torch.argsort(alive, descending=True, stable=True)
    if order is not None:
        weight = weight[:, order]
    group_of = (natural if fixed is None or order is None else order) // size
    added = damping * alive.mean()
    inverse, failed = _inverse_factor(hessian, alive + added, order)
    reordered = order is not None and grid.search != "none" and fixed is None
    measured = hessian[order][:, order] if reordered else hessian
    shift = _input_shift(cross[0], inverse, order) if cross else None
    weight = weight.T.contiguous()  # a column is contiguous here, and the matrix before it is gone
    codes, scale, zero, errors = _columns(
        weight, measured, inverse, shift, fixed, group_of, grid, options.block_size
    )
    del weight, inverse  # each of the size of what is made next
    g_idx = None
    if order is not None:
        back = torch.argsort(order)
        codes = codes[:, back]
        if fixed is None and options.order == "group":  # a natural group is one group here, in another place
            places = group_of[back][::size]
            scale, zero = scale[:, places], zero[:, places]
        elif fixed is None:
            g_idx = group_of[back]
    quantized = Quantized(codes, scale, zero, g_idx)
    lost = quantized.dequantize(grid).sub_(original).masked_fill_(dead, 0)
    if cross:  # the weights moved for the inputs' errors too
        return Solution(quantized, damping, failed, (lost @ hessian).mul_(lost).sum(dtype=torch.float64))
    # E = errors @ inverse and inverse^T inverse = (H + added)^-1, so tr(E (H + added) E^T) = |errors|^2
    return Solution(quantized, damping, failed, errors - added * lost.square_().sum(dtype=torch.float64))


def _params(weight: Tensor, hessian: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return scale and zero `[out, groups]` of the weight's groups, searched under the Hessian if asked."""
    if grid.search == "none":
        return group_params(weight, grid)
    spans = grid.spans(weight.shape[1])
    return searched_params(weight, [hessian[start:stop, start:stop] for start, stop in spans], grid)


def group_order(importance: Tensor, size: int) -> Tensor:
    """Return the order of columns by descending `importance [in]` inside each group of `size` columns.

    Groups come by their most important column; a shorter last one stays last, so that the others are runs of
    whole groups.
    """
    order = importance.argsort(descending=True, stable=True)
    lacking = -len(importance) % size
    largest = functional.pad(importance, (0, lacking), value=-math.inf).view(-1, size).amax(1)
    if lacking:
        largest[-1] = -math.inf
    place = largest.argsort(descending=True, stable=True).argsort()
    return order[place[order // size].argsort(stable=True)]


def _inverse_factor(hessian: Tensor, diagonal: Tensor, order: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the upper Cholesky factor of the damped Hessian's inverse, and whether it has none (bool).

    `diagonal [in]` replaces the Hessian's; rows and columns are in `order`.

    Cholesky, inverse, Cholesky in fp32, as in the official code. A factor in fp64 gives the same codes on the
    golden tensors and perplexities of the same mean and spread (benchmarks/results/gptq_draws.json).
    """
    kept = hessian.diagonal().clone()
    hessian.diagonal().copy_(diagonal)
    damped = hessian if order is None else hessian[order][:, order]
    factor, failed = torch.linalg.cholesky_ex(damped)
    hessian.diagonal().copy_(kept)
    # in place: a wide layer's Hessian is the largest thing here
    failed_too = torch.empty_like(failed)
    torch.cholesky_inverse(factor, out=factor)
    torch.linalg.cholesky_ex(factor, upper=True, out=(factor, failed_too))
    return factor, (failed != 0) | (failed_too != 0)


def _input_shift(cross: Tensor, inverse: Tensor, order: Tensor | None) -> Tensor:
    """Return P `[in, in]`: column i of the weight times `P[i, j]` is added to column j > i.

    `P[i, i+1:] = cross[i, i+1:] (H[i+1:, i+1:])^-1`, of which the upper factor U of the inverse has
    `U[i+1:, i+1:]^T U[i+1:, i+1:]`. Rows and columns are in `order`.
    """
    ordered = cross if order is None else cross[order][:, order]
    return (ordered @ inverse.T).triu_(1) @ inverse


def _columns(
    rows: Tensor,
    hessian: Tensor,
    inverse: Tensor,
    shift: Tensor | None,
    fixed: tuple[Tensor, Tensor] | None,
    group_of: Tensor,
    grid: Grid,
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return codes `[out, in]`, scale and zero `[out, groups]`, and the sum of the squared errors passed on.

    `rows [in, out]`, the columns of the weight in processing order, are used up.

    A group's grid is taken from them when its first column is reached, as updated so far by whole blocks
    only: the present block's own corrections live in `block` until it ends. That is what the official code
    does. Inside a block, corrections reach the next few columns one by one and the others a strip at a time.
    Until a block ends its codes count from the zero of their group, which saves two operations a column.

    Under `shift` each column moves those that follow by what it was before it was rounded. GPTAQ's official
    code takes the rounded column for those behind a block, so that its block size decides what is computed.
    """
    columns = len(rows)
    size = grid.width(columns)
    codes = torch.empty_like(rows)
    if fixed is None:
        scale, zero = rows.new_empty(2, grid.group_count(columns), rows.shape[1])  # [groups, out]
    else:
        scale, zero = (params.T.contiguous() for params in fixed)
    passed_on = torch.zeros((), dtype=torch.float64, device=rows.device)
    rounded, lowest, highest = torch.empty_like(rows[0]), zero.neg(), grid.levels - zero
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        block, errors = rows[start:stop].clone(), torch.empty_like(rows[start:stop])
        factor = inverse[start:stop, start:stop]
        steps = factor.diagonal().reciprocal().neg_()[:, None]
        ahead = factor * steps  # what an error costs the columns that follow, before its own division
        now, code_of, error_of = block.unbind(), codes[start:stop].unbind(), errors.unbind()
        params = scale, lowest, highest  # [groups, out]
        if fixed is not None:  # [column, out]: under act-order the host does not know a column's group
            params = tuple(each[group_of[start:stop]] for each in params)
        for first in range(0, stop - start, STRIP):
            last = min(first + STRIP, stop - start)
            for i in range(first, last):
                at = i if fixed is not None else (start + i) // size
                if fixed is None and (start + i) % size == 0:
                    here = slice(start + i, start + i + size)
                    found = _params(rows[here].T, hessian[here, here], grid)
                    scale[at], zero[at] = (params[:, 0] for params in found)
                    torch.sub(grid.levels, zero[at], out=highest[at])
                    torch.neg(zero[at], out=lowest[at])
                code = torch.div(now[i], params[0][at], out=code_of[i]).round_()
                torch.clamp(code, params[1][at], params[2][at], out=code)
                torch.mul(code, params[0][at], out=rounded)
                torch.sub(now[i], rounded, out=error_of[i])
                block[i + 1 : last].addr_(ahead[i, i + 1 : last], error_of[i])
                if shift is not None:
                    block[i + 1 : last].addr_(shift[start + i, start + i + 1 : start + last], now[i])
            errors[first:last].mul_(steps[first:last])
            block[last:].addmm_(factor[first:last, last:].T, errors[first:last])
            if shift is not None:
                behind = shift[start + first : start + last, start + last : stop]
                block[last:].addmm_(behind.T, block[first:last])
        rows[stop:].addmm_(inverse[start:stop, stop:].T, errors)
        if shift is not None:
            rows[stop:].addmm_(shift[start:stop, stop:].T, block)
        passed_on += errors.square_().sum(dtype=torch.float64)
        codes[start:stop].add_(zero[group_of[start:stop]])
    return codes.to(torch.uint8).T.contiguous(), scale.T.contiguous(), zero.T.contiguous(), passed_on
