"""GPTQ over a model: block after block, each measured on what the quantized blocks before it put out."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from teq.device.memory import Estimate
from teq.grid import Grid
from teq.models.arch import Arch, blocks, linears, sites
from teq.models.lazy import held_bytes
from teq.quantizers import blockwise
from teq.quantizers.blockwise import Calibrated, Report
from teq.quantizers.gptq.solver import Hessian, Solution
from teq.quantizers.quantized import Quantized
from teq.quantizers.rtn import round_to_nearest
from teq.stage import NothingDone

if TYPE_CHECKING:
    from teq.models.checkpoint import LM

Solve = Callable[[Sequence[tuple[Tensor, Tensor]]], list[Solution]]  # (weight, hessian) pairs


def quantize_blocks(
    model: nn.Module,
    arch: Arch,
    scales: Mapping[str, Tensor],
    windows: Tensor,
    grid: Grid,
    solve: Solve,
    *,
    true_sequential: bool = False,
    waiting: str | None = None,
    partial: Path | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Quantize every linear of every block; see `teq.quantizers.blockwise.quantize_blocks`.

    Returns the stored tensors, and a report by linear: the damping, the share of codes that differ from
    RTN's, the output error. Raises NothingDone when all codes equal RTN's.
    """
    quantize = functools.partial(_quantize_block, grid, solve, true_sequential)
    tensors, report = blockwise.quantize_blocks(
        model, arch, scales, windows, grid, quantize, "GPTQ", waiting=waiting, partial=partial
    )
    if not any(entry["moved"] for entry in report.values()):
        raise NothingDone(
            "GPTQ's codes equal plain rounding's in every linear: the calibration had no effect"
        )
    return tensors, {"linears": len(report), "gptq": report}


def _quantize_block(
    grid: Grid, solve: Solve, true_sequential: bool, block: Calibrated
) -> tuple[dict[str, Quantized], Report]:
    """Return a block's quantized linears and a report by linear."""
    quantized: dict[str, Quantized] = {}
    report: Report = {}
    moved, errors = [], []
    solve_block = functools.partial(_solve_in_turn, grid) if true_sequential else _solve_at_once
    for names, solution in solve_block(block, solve):
        rows = [block.exact[name].shape[0] for name in names]
        q = solution.quantized
        for name, *parts in zip(names, *(t.split(rows) for t in (q.codes, q.scale, q.zero)), strict=True):
            quantized[name] = Quantized(*parts, q.g_idx)
            plain = round_to_nearest(block.exact[name], grid)
            moved.append((plain.codes != quantized[name].codes).double().mean())
            report[name] = {"damping": solution.damping}
        errors.append((names[0], solution.error))
    # read back at once: every read waits for the device
    numbers = torch.stack([*moved, *(error for _, error in errors)]).tolist()
    for name, share in zip(quantized, numbers, strict=False):
        report[name]["moved"] = share
    for (name, _), error in zip(errors, numbers[len(moved) :], strict=True):
        report[name]["error"] = error
    return quantized, report


def _solve_at_once(block: Calibrated, solve: Solve) -> list[tuple[tuple[str, ...], Solution]]:
    """Return a solution for each distinct input of the block's linears, with the linears that read it."""
    groups = blockwise.measure(block.folded.module, block.linears, block.hidden, block.kwargs, Hessian)
    tall = [torch.cat([block.exact[name] for name in names]) for names in groups]
    means = [hessian.mean() for hessian in groups.values()]
    return list(zip(groups, solve(list(zip(tall, means, strict=True))), strict=True))


def _solve_in_turn(grid: Grid, block: Calibrated, solve: Solve) -> list[tuple[tuple[str, ...], Solution]]:
    """Solve as `_solve_at_once` does, each input measured after the linears before it were quantized."""
    solutions = []
    module, kwargs = block.folded.module, block.kwargs
    for names in blockwise.measure(module, block.linears, block.hidden[:1], kwargs, Hessian):
        inside = {name: block.linears[name] for name in names}
        hessian = blockwise.measure(module, inside, block.hidden, kwargs, Hessian)[names].mean()
        (solution,) = solve([(torch.cat([block.exact[name] for name in names]), hessian)])
        solutions.append((names, solution))
        weight = solution.quantized.dequantize(grid)
        for name, part in zip(names, weight.split([block.exact[n].shape[0] for n in names]), strict=True):
            block.linears[name].weight.copy_(part)
    return solutions


def waiting_bytes(lm: "LM", tokens: int) -> int:
    """Return the bytes of the hidden states of so many tokens, which wait for the next block."""
    return tokens * lm.model.config.hidden_size * lm.model.dtype.itemsize


def estimate(lm: "LM", samples: int, length: int, solution_bytes: Callable[[int, int], int]) -> Estimate:
    """Predict what quantizing a model needs, from its shapes: peak bytes on the device and operations.

    Beside weights and hidden states these are a block's weights in fp32, the Hessians of its distinct inputs,
    and what the largest of their solutions takes: `solution_bytes(rows, columns)`.

    Every token passes twice through the blocks (attention as a full square); a Hessian takes half of a
    product of all tokens, a solution one product of its rows with the factor's upper half, and the factor the
    cube of its width.
    """
    weights = sum(held_bytes(lm.model, lm.arch))
    every = blocks(lm.model, lm.arch)
    name, block = next(iter(every.items()))
    inside = linears(name, block)
    readers = [[inside[t] for t in site.targets] for site in sites(lm.model, lm.arch) if site.block == 0]
    readers += [[linear] for linear in inside.values() if not any(linear in group for group in readers)]
    numbers = sum(linear.weight.numel() for linear in inside.values())
    squares = sum(group[0].in_features ** 2 for group in readers)
    largest = max(solution_bytes(sum(r.out_features for r in g), g[0].in_features) for g in readers)

    tokens, hidden = samples * length, lm.model.config.hidden_size
    passes = 2 * tokens * (2 * numbers + 4 * length * hidden)
    solving = sum(linear.weight.numel() * linear.in_features for linear in inside.values())
    factors = sum(group[0].in_features ** 3 for group in readers)
    waiting = waiting_bytes(lm, tokens)
    return Estimate(
        weights + waiting + 4 * numbers + 4 * squares + largest,
        len(every) * (passes + tokens * squares + solving + factors),
        movable=waiting,
    )
