"""GPTQ over a model: block after block, each measured on what the quantized blocks before it put out."""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from teq.console import track
from teq.device.memory import Estimate
from teq.files.resume import BlockFiles
from teq.grid import Grid
from teq.models.arch import Arch, blocks, linears, sites
from teq.models.blocks import first_inputs, run_block
from teq.models.fold import FoldedBlock, FoldedModel
from teq.quantizers.gptq.solver import Hessian, Solution
from teq.quantizers.quantized import Quantized, restore, stored
from teq.quantizers.rtn import round_to_nearest
from teq.stage import NothingDone

if TYPE_CHECKING:
    from teq.models.checkpoint import LM

Solve = Callable[[Sequence[tuple[Tensor, Tensor]]], list[Solution]]  # (weight, hessian) pairs


@torch.no_grad()
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
    """Quantize every linear of every block on calibration `windows [sample, token]`; `model` is used up.

    Hidden states wait for the next block on the device `waiting`, the model's own where none is given.
    Finished blocks are stored in the folder `partial`, and those that are there are not quantized again.

    Returns the stored tensors, and a report by linear: the damping, the share of codes that differ from
    RTN's, the output error. Raises NothingDone when all codes equal RTN's.
    """
    device = model.get_input_embeddings().weight.device
    hidden, keywords = first_inputs(model, arch, windows, waiting)
    tensors: dict[str, Tensor] = {}
    report: dict[str, dict[str, float]] = {}
    finished = BlockFiles(partial, "GPTQ")
    for index, block in enumerate(track(FoldedModel(model, arch, scales).blocks(), "GPTQ blocks")):
        kwargs = keywords[index]
        if (known := finished.read(index)) is not None:
            part, entries = known
            restore(model, {name: t.to(device) for name, t in part.items()}, grid)
        else:
            part, entries = _quantize_block(model, block, grid, solve, true_sequential, hidden, kwargs)
            finished.write(index, part, entries)
        tensors |= part
        report |= entries
        for i in range(len(hidden)):
            hidden[i] = run_block(block.module, hidden[i].to(device), kwargs).to(hidden[i].device)
    if not any(entry["moved"] for entry in report.values()):
        raise NothingDone(
            "GPTQ's codes equal plain rounding's in every linear: the calibration had no effect"
        )
    return tensors, {"linears": len(report), "gptq": report}


def _quantize_block(
    model: nn.Module,
    block: FoldedBlock,
    grid: Grid,
    solve: Solve,
    true_sequential: bool,
    hidden: list[Tensor],
    kwargs: dict[str, Any],
) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
    """Quantize a block's linears on what the blocks before it put out; the model has the result.

    Returns the stored tensors in host memory, and a report by linear.
    """
    exact = {name: block.weight(name) for name in block.linears}
    _assign(model, block.changed)
    _assign(model, {f"{name}.weight": weight for name, weight in exact.items()})
    quantized: dict[str, Quantized] = {}
    report: dict[str, dict[str, float]] = {}
    moved, errors = [], []
    solve_block = functools.partial(_solve_in_turn, grid) if true_sequential else _solve_at_once
    for names, solution in solve_block(block, exact, solve, hidden, kwargs):
        rows = [exact[name].shape[0] for name in names]
        q = solution.quantized
        for name, *parts in zip(names, *(t.split(rows) for t in (q.codes, q.scale, q.zero)), strict=True):
            quantized[name] = Quantized(*parts, q.g_idx)
            _assign(model, {f"{name}.weight": quantized[name].dequantize(grid)})
            plain = round_to_nearest(exact[name], grid)
            moved.append((plain.codes != quantized[name].codes).double().mean())
            report[name] = {"damping": solution.damping}
        errors.append((names[0], solution.error))
    # read back at once: every read waits for the device
    numbers = torch.stack([*moved, *(error for _, error in errors)]).tolist()
    for name, share in zip(quantized, numbers, strict=False):
        report[name]["moved"] = share
    for (name, _), error in zip(errors, numbers[len(moved) :], strict=True):
        report[name]["error"] = error
    # packed and off the device block by block: a model's codes at once would be a byte for every weight
    return {name: t.cpu() for name, t in stored(quantized, block.changed, grid).items()}, report


def _solve_at_once(
    block: FoldedBlock,
    exact: Mapping[str, Tensor],
    solve: Solve,
    hidden: list[Tensor],
    kwargs: dict[str, Any],
) -> list[tuple[tuple[str, ...], Solution]]:
    """Return a solution for each distinct input of the block's linears, with the linears that read it."""
    groups = _measure(block.module, block.linears, hidden, kwargs)
    tall = [torch.cat([exact[name] for name in names]) for names in groups]
    means = [hessian.mean() for hessian in groups.values()]
    return list(zip(groups, solve(list(zip(tall, means, strict=True))), strict=True))


def _solve_in_turn(
    grid: Grid,
    block: FoldedBlock,
    exact: Mapping[str, Tensor],
    solve: Solve,
    hidden: list[Tensor],
    kwargs: dict[str, Any],
) -> list[tuple[tuple[str, ...], Solution]]:
    """Solve as `_solve_at_once` does, each input measured after the linears before it were quantized."""
    solutions = []
    for names in _measure(block.module, block.linears, hidden[:1], kwargs):
        inside = {name: block.linears[name] for name in names}
        hessian = _measure(block.module, inside, hidden, kwargs)[names].mean()
        (solution,) = solve([(torch.cat([exact[name] for name in names]), hessian)])
        solutions.append((names, solution))
        weight = solution.quantized.dequantize(grid)
        for name, part in zip(names, weight.split([exact[n].shape[0] for n in names]), strict=True):
            block.linears[name].weight.copy_(part)
    return solutions


class _AllSeen(Exception):
    """Every linear has its input: what the block would still make of them is not needed."""


def _measure(
    block: nn.Module, inside: Mapping[str, nn.Linear], hidden: list[Tensor], kwargs: dict[str, Any]
) -> dict[tuple[str, ...], Hessian]:
    """Return Hessians over all samples, one for each set of linears with the very same input."""
    readers: list[tuple[Tensor, list[str]]] = []

    def note(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            same = next((names for tensor, names in readers if tensor is args[0]), None)
            if same is None:
                readers.append((args[0], [name]))
            else:
                same.append(name)
            if sum(len(names) for _, names in readers) == len(inside):
                raise _AllSeen

        return hook

    device = next(iter(inside.values())).weight.device
    found: dict[tuple[str, ...], Hessian] = {}
    with contextlib.ExitStack() as hooks:
        for name, linear in inside.items():
            hooks.enter_context(linear.register_forward_pre_hook(note(name)))
        for sample in hidden:
            readers.clear()
            with contextlib.suppress(_AllSeen):
                run_block(block, sample.to(device), kwargs)
            for tensor, names in readers:
                if tuple(names) not in found:
                    found[tuple(names)] = Hessian(tensor.shape[-1], tensor.device)
                # OPT hands its feed-forward part flat tokens: one sample is one sequence whatever its shape
                found[tuple(names)].add(tensor.reshape(1, -1, tensor.shape[-1]))
    return found


def _assign(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        model.get_parameter(name).copy_(value)


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
    weights = sum(t.nbytes for t in {*lm.model.parameters(), *lm.model.buffers()})
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
