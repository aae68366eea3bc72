"""GPTQ over a model: block after block, each measured on what the quantized blocks before it put out."""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from teq.device.memory import Estimate
from teq.grid import Grid
from teq.models.arch import Arch, blocks, linears, sites
from teq.models.layers import read_shares
from teq.models.lazy import held_bytes
from teq.quantizers import blockwise, errors
from teq.quantizers.blockwise import Calibrated, FloatBlock, Report
from teq.quantizers.gptq.solver import Hessian, Problem, Solution
from teq.quantizers.quantized import Quantized, round_to_nearest
from teq.record import OUTPUT_ERROR
from teq.stage import NothingDone

if TYPE_CHECKING:
    from teq.models.checkpoint import LM

Solve = Callable[[Sequence[Problem]], list[Solution]]
Solved = tuple[tuple[str, ...], Tensor, Solution]  # linears of one input, the Hessian, their solution


def quantize_blocks(
    model: nn.Module,
    arch: Arch,
    scales: Mapping[str, Tensor],
    windows: Tensor,
    grid: Grid,
    solve: Solve,
    *,
    true_sequential: bool = False,
    input_correction: float = 0.0,
    waiting: str | None = None,
    partial: Path | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Quantize every linear of every block; see `teq.quantizers.blockwise.quantize_blocks`.

    `input_correction` is the share of GPTAQ's cross term that is given to `solve`; at 0 it gets none.

    Returns the stored tensors, the relative errors of the outputs, and a report by linear: the damping, the
    share of codes that differ from RTN's, the output error. Raises NothingDone when all codes equal RTN's.
    """
    quantize = functools.partial(_quantize_block, grid, solve, true_sequential, input_correction)
    tensors, report, info = blockwise.quantize_blocks(
        model,
        arch,
        scales,
        windows,
        grid,
        quantize,
        "GPTQ",
        float_inputs=input_correction > 0,
        waiting=waiting,
        partial=partial,
    )
    if not any(entry["moved"] for entry in report.values()):
        raise NothingDone(
            "GPTQ's codes equal plain rounding's in every linear: the calibration had no effect"
        )
    return tensors, info | {OUTPUT_ERROR: errors.collected(report), "gptq": report}


def _quantize_block(
    grid: Grid, solve: Solve, true_sequential: bool, input_correction: float, block: Calibrated
) -> tuple[dict[str, Quantized], Report]:
    """Return a block's quantized linears and a report by linear."""
    quantized: dict[str, Quantized] = {}
    report: Report = {}
    moved, totals, hessians = [], [], {}
    solve_block = functools.partial(_solve_in_turn, grid) if true_sequential else _solve_at_once
    for names, hessian, solution in solve_block(block, _Problems(block, input_correction), solve):
        hessians[names] = hessian
        rows = [block.exact[name].shape[0] for name in names]
        q = solution.quantized
        for name, *parts in zip(names, *(t.split(rows) for t in (q.codes, q.scale, q.zero)), strict=True):
            quantized[name] = Quantized(*parts, q.g_idx)
            plain = round_to_nearest(block.exact[name], grid)
            moved.append((plain.codes != quantized[name].codes).double().mean())
            report[name] = {"damping": solution.damping}
        totals.append((names[0], solution.error))
    shares = errors.output_errors(block.exact, quantized, hessians, grid)
    # read back at once: every read waits for the device
    numbers = torch.stack([*moved, *(error for _, error in totals), *shares.values()]).tolist()
    for name, share in zip(quantized, numbers, strict=False):
        report[name]["moved"] = share
    for (name, _), error in zip(totals, numbers[len(moved) :], strict=False):
        report[name]["error"] = error
    for name, share in zip(shares, numbers[-len(shares) :], strict=True):
        report[name][OUTPUT_ERROR] = {name: share}
    return quantized, report


class _Problems:
    """The problems of a block's linears, measured on the weights that the block has when it is asked.

    Under a `share` of input correction a copy of the float block is kept for its linears' inputs.
    """

    def __init__(self, block: Calibrated, share: float) -> None:
        self.block, self.share = block, share
        self.exact: FloatBlock | None = None
        if share:
            module = copy.deepcopy(block.folded.module)
            self.exact = FloatBlock(module, linears(block.folded.name, module), block.float_inputs)

    def of(self, inside: Mapping[str, nn.Linear]) -> dict[tuple[str, ...], Problem]:
        """Return the problem of each distinct input, by the linears that read it."""
        block, found = self.block, {}
        measured = blockwise.measure(
            block.folded.module, inside, block.hidden, block.kwargs, Hessian, self.exact
        )
        for names, hessian in measured.items():
            weights = [block.exact[name] for name in names]
            tall = torch.cat(weights) if len(weights) > 1 else weights[0]
            found[names] = tall, hessian.mean()
            if self.share:
                found[names] += (hessian.mean_cross().mul_(self.share),)
        return found


def _solve_at_once(block: Calibrated, problems: _Problems, solve: Solve) -> list[Solved]:
    """Return a solution for each distinct input of the block's linears, with the linears that read it."""
    found = problems.of(block.linears)
    hessians = [problem[1] for problem in found.values()]
    return list(zip(found, hessians, solve(list(found.values())), strict=True))


def _solve_in_turn(grid: Grid, block: Calibrated, problems: _Problems, solve: Solve) -> list[Solved]:
    """Solve as `_solve_at_once` does, each input measured after the linears before it were quantized."""
    solutions: list[Solved] = []
    tried: set[tuple[str, ...]] = set()
    # what was quantized may route tokens to other experts: some have none any more, others have now
    while fresh := [
        names
        for names in blockwise.reading_together(
            block.folded.module, block.linears, block.hidden, block.kwargs
        )
        if names not in tried
    ]:
        tried |= set(fresh)
        for names in fresh:
            problem = problems.of({name: block.linears[name] for name in names}).get(names)
            if problem is None:
                continue
            (solution,) = solve([problem])
            solutions.append((names, problem[1], solution))
            weight = solution.quantized.dequantize(grid)
            for name, part in zip(names, weight.split([block.exact[n].shape[0] for n in names]), strict=True):
                block.linears[name].weight.copy_(part)
    return solutions


def waiting_bytes(lm: "LM", tokens: int, input_correction: bool = False) -> int:
    """Return the bytes of the hidden states of so many tokens, which wait for the next block.

    Under input correction the inputs and outputs of the float model's block wait too.
    """
    size = tokens * lm.model.config.hidden_size * lm.model.dtype.itemsize
    return size * 3 if input_correction else size


def estimate(
    lm: "LM",
    samples: int,
    length: int,
    solution_bytes: Callable[[int, int], int],
    input_correction: bool = False,
) -> Estimate:
    """Predict what quantizing a model needs, from its shapes: peak bytes on the device and operations.

    Beside weights and hidden states these are a block's weights in fp32, the Hessians of its distinct inputs,
    and what the largest of their solutions takes: `solution_bytes(rows, columns)`. Input correction adds the
    float block and the cross terms.

    Every token passes twice through the blocks (attention as a full square); a Hessian takes half of a
    product of all tokens, a solution one product of its rows with the factor's upper half, its errors two
    with the whole Hessian, and the factor the cube of its width. Input correction doubles passes and
    solutions; a cross term takes a whole product of all tokens, its share in the solution four cubes.
    """
    weights = sum(held_bytes(lm.model, lm.arch))
    every = blocks(lm.model, lm.arch)
    # a model may mix dense and expert blocks: the one with most linears stands for all
    inside, index, block = max(
        ((linears(name, block), i, block) for i, (name, block) in enumerate(every.items())),
        key=lambda each: len(each[0]),
    )
    here = [site for site in sites(lm.model, lm.arch) if site.block == index]
    readers = [list(group.values()) for site in here for group in site.groups]
    readers += [[linear] for linear in inside.values() if not any(linear in group for group in readers)]
    numbers = sum(linear.weight.numel() for linear in inside.values())
    squares = sum(group[0].in_features ** 2 for group in readers)
    share = read_shares(block, lm.model.config)  # of the tokens, where experts read some of them
    read_numbers = sum(share.get(linear, 1) * linear.weight.numel() for linear in inside.values())
    read_squares = sum(share.get(group[0], 1) * group[0].in_features ** 2 for group in readers)
    largest = max(solution_bytes(sum(r.out_features for r in g), g[0].in_features) for g in readers)

    tokens, hidden = samples * length, lm.model.config.hidden_size
    passes = 2 * tokens * (2 * read_numbers + 4 * length * hidden)
    products = sum(linear.weight.numel() * linear.in_features for linear in inside.values())
    factors = sum(group[0].in_features ** 3 for group in readers)
    waiting = waiting_bytes(lm, tokens, input_correction)
    size = weights + waiting + 4 * numbers + 4 * squares + largest
    flops = passes + tokens * read_squares + 5 * products + factors
    if input_correction:
        size += sum(p.nbytes for p in block.parameters()) + 4 * squares
        flops += passes + 2 * tokens * squares + products + 4 * factors
    return Estimate(size, int(len(every) * flops), movable=waiting)
