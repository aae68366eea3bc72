"""GPTQ over a model: block after block, each measured on what the quantized blocks before it put out."""

import contextlib
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from teq.console import track
from teq.device.memory import LiveBytes, Need
from teq.files.resume import BlockFiles
from teq.models.arch import Folding, blocks, first_inputs, linears, run_block, sites
from teq.quantizers.gptq.solver import Hessian, Solution, solve
from teq.quantizers.quantized import Quantized, restore, stored
from teq.quantizers.rtn import round_to_nearest
from teq.stage import NothingDone

if TYPE_CHECKING:
    from teq.models.checkpoint import LM
    from teq.quantizers.gptq.settings import Gptq

log = logging.getLogger(__name__)
SMALL = 128  # columns of the matrix that a solution's memory is counted on


@torch.no_grad()
def quantize_blocks(
    settings: "Gptq",
    lm: "LM",
    scales: Mapping[str, Tensor],
    windows: Tensor,
    waiting: torch.device | None = None,
    partial: Path | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Quantize every linear of every block on calibration `windows [sample, token]`; `lm` is used up.

    Hidden states wait for the next block on the device `waiting`, the model's own where none is given.
    Finished blocks are stored in the folder `partial`, and those that are there are not quantized again.

    Raises NothingDone when all codes equal plain rounding's.
    """
    found = sites(lm.model, lm.arch)
    folding = Folding.of(found, scales)
    by_block: dict[int, dict[str, nn.Module]] = {}
    for site in found:
        by_block.setdefault(site.block, {})[site.name] = site.source
    hidden, kwargs = first_inputs(lm.model, lm.arch, windows, waiting)
    tensors: dict[str, Tensor] = {}
    report: dict[str, dict[str, float]] = {}
    finished = BlockFiles(partial, "GPTQ")
    for index, (block_name, block) in enumerate(track(blocks(lm.model, lm.arch).items(), "GPTQ blocks")):
        if (known := finished.read(index)) is not None:
            part, entries = known
            restore(lm.model, {name: t.to(lm.device) for name, t in part.items()}, settings.grid)
        else:
            inside, sources = linears(block_name, block), by_block.get(index, {})
            part, entries = _quantize_block(settings, lm, folding, sources, block, inside, hidden, kwargs)
            finished.write(index, part, entries)
        tensors |= part
        report |= entries
        for i in range(len(hidden)):
            hidden[i] = run_block(block, hidden[i].to(lm.device), kwargs).to(hidden[i].device)
    if not any(entry["moved"] for entry in report.values()):
        raise NothingDone(
            "GPTQ's codes equal plain rounding's in every linear: the calibration had no effect"
        )
    raised = sum(entry["damping"] > settings.damping for entry in report.values())
    if raised:
        log.warning("the damping had to be raised for %d of %d linears", raised, len(report))
    return tensors, {"linears": len(report), "gptq": report}


def _quantize_block(
    settings: "Gptq",
    lm: "LM",
    folding: Folding,
    sources: Mapping[str, nn.Module],
    block: nn.Module,
    inside: Mapping[str, nn.Linear],
    hidden: list[Tensor],
    kwargs: dict[str, Any],
) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
    """Quantize a block's linears `inside` on what the blocks before it put out; the model has the result.

    `sources` are the block's sites' by name. Returns the stored tensors in the host's memory, and a report by
    linear.
    """
    exact = {name: folding.weight(name, linear).float() for name, linear in inside.items()}
    changed: dict[str, Tensor] = {}
    for name, source in sources.items():
        changed |= folding.divided(name, source)
    _assign(lm.model, changed)
    quantized: dict[str, Quantized] = {}
    report: dict[str, dict[str, float]] = {}
    _assign(lm.model, {f"{name}.weight": weight for name, weight in exact.items()})
    moved, errors = [], []
    for names, solution in _solve_block(settings, block, inside, exact, hidden, kwargs):
        start = 0
        for name in names:
            rows = slice(start, start + exact[name].shape[0])
            start = rows.stop
            q = solution.quantized
            quantized[name] = Quantized(q.codes[rows], q.scale[rows], q.zero[rows], q.g_idx)
            _assign(lm.model, {f"{name}.weight": quantized[name].dequantize(settings.grid)})
            plain = round_to_nearest(exact[name], settings.grid)
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
    return {name: t.cpu() for name, t in stored(quantized, changed, settings.grid).items()}, report


def _solve_block(
    settings: "Gptq",
    block: nn.Module,
    inside: Mapping[str, nn.Linear],
    exact: Mapping[str, Tensor],
    hidden: list[Tensor],
    kwargs: dict[str, Any],
) -> "list[tuple[list[str], Solution]]":
    """One solution for each distinct input of the block's linears, with the linears that read it, in
    running order.
    """
    if not settings.true_sequential:
        groups = _measure(block, inside, hidden, kwargs)
        tall = [torch.cat([exact[name] for name in names]) for names in groups]
        means = [hessian.mean() for hessian in groups.values()]
        solved = solve(list(zip(tall, means, strict=True)), settings)
        return [(list(names), solution) for names, solution in zip(groups, solved, strict=True)]
    solutions = []
    for names in _measure(block, inside, hidden[:1], kwargs):
        hessian = _measure(block, {name: inside[name] for name in names}, hidden, kwargs)[names].mean()
        (solution,) = solve([(torch.cat([exact[name] for name in names]), hessian)], settings)
        solutions.append((list(names), solution))
        weight = solution.quantized.dequantize(settings.grid)
        for name, part in zip(names, weight.split([exact[n].shape[0] for n in names]), strict=True):
            inside[name].weight.copy_(part)
    return solutions


class _AllSeen(Exception):
    """Every linear has its input: what the block would still make of them is not needed."""


def _measure(
    block: nn.Module, inside: Mapping[str, nn.Linear], hidden: list[Tensor], kwargs: dict[str, Any]
) -> dict[tuple[str, ...], Hessian]:
    """Hessians over all samples, one for each set of linears that are given the very same tensor."""
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
    handles = [linear.register_forward_pre_hook(note(name)) for name, linear in inside.items()]
    found: dict[tuple[str, ...], Hessian] = {}
    try:
        for sample in hidden:
            readers.clear()
            with contextlib.suppress(_AllSeen):
                run_block(block, sample.to(device), kwargs)
            for tensor, names in readers:
                if tuple(names) not in found:
                    found[tuple(names)] = Hessian(tensor.shape[-1], tensor.device)
                # OPT hands its feed-forward part flat tokens: one sample is one sequence whatever its shape
                found[tuple(names)].add(tensor.reshape(1, -1, tensor.shape[-1]))
    finally:
        for handle in handles:
            handle.remove()
    return found


def _assign(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        model.get_parameter(name).copy_(value)


def waiting_bytes(settings: "Gptq", lm: "LM") -> int:
    """Bytes of the hidden states that wait for the next block."""
    return settings.samples * settings.length * lm.model.config.hidden_size * lm.model.dtype.itemsize


def expected(settings: "Gptq", lm: "LM") -> Need:
    """Predicted peak bytes of live tensors on the device while an outline's model is quantized, weights
    and hidden states included, and the operations of the matrix products.

    Beside these: a block's weights in fp32, the Hessians of its distinct inputs,
    and what the largest of their solutions takes. That grows with the square of the width when the
    proportions stay, so it is counted on a small matrix of the same proportions.

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
    largest = max(_solution_bytes(settings, group) for group in readers)

    tokens, hidden = settings.samples * settings.length, lm.model.config.hidden_size
    passes = 2 * tokens * (2 * numbers + 4 * settings.length * hidden)
    solving = sum(linear.weight.numel() * linear.in_features for linear in inside.values())
    factors = sum(group[0].in_features ** 3 for group in readers)
    return Need(
        weights + waiting_bytes(settings, lm) + 4 * numbers + 4 * squares + largest,
        len(every) * (passes + tokens * squares + solving + factors),
        movable=waiting_bytes(settings, lm),
    )


def _solution_bytes(settings: "Gptq", readers: list[nn.Linear]) -> int:
    """Peak bytes that solving these linears together makes, from a matrix of their proportions."""
    columns, rows = readers[0].in_features, sum(linear.out_features for linear in readers)
    small = min(columns, SMALL)
    size = settings.grid.group_size
    grid = settings.grid if size == -1 else replace(settings.grid, group_size=max(1, size * small // columns))
    few = replace(settings, grid=grid, block_size=max(1, settings.block_size * small // columns))
    weight = torch.ones(max(1, rows * small // columns), small).cumsum(0)
    with LiveBytes() as live, torch.no_grad():
        tall = torch.cat([weight])
        solve([(tall, torch.eye(small))], few)
    return int(live.peak * (columns / small) ** 2)
