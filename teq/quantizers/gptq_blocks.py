"""GPTQ over a model: block after block, each measured on what the quantized blocks before it put out."""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from teq.arch import Folding, blocks, first_inputs, linears, run_block, sites
from teq.progress import track
from teq.quantizers import Quantized, stored
from teq.quantizers.gptq_solver import Hessian, Solution, solve
from teq.quantizers.rtn import round_to_nearest
from teq.transforms import NothingDone

if TYPE_CHECKING:
    from teq.models import LM
    from teq.quantizers.gptq import Gptq

log = logging.getLogger(__name__)


@torch.no_grad()
def quantize_blocks(
    settings: "Gptq", lm: "LM", scales: Mapping[str, Tensor], windows: Tensor
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Quantize every linear of every block on calibration `windows [sample, token]`; `lm` is used up.

    Raises NothingDone when all codes equal plain rounding's.
    """
    found = sites(lm.model, lm.arch)
    folding = Folding.of(found, scales)
    by_block: dict[int, dict[str, nn.Module]] = {}
    for site in found:
        by_block.setdefault(site.block, {})[site.name] = site.source
    hidden, kwargs = first_inputs(lm.model, lm.arch, windows)
    quantized: dict[str, Quantized] = {}
    changed: dict[str, Tensor] = {}
    report: dict[str, dict[str, float]] = {}
    for index, (block_name, block) in enumerate(track(blocks(lm.model, lm.arch).items(), "GPTQ blocks")):
        inside = linears(block_name, block)
        exact = {name: folding.weight(name, linear).float() for name, linear in inside.items()}
        for name, source in by_block[index].items():
            divided = folding.divided(name, source)
            changed |= divided
            _assign(lm.model, divided)
        _assign(lm.model, {f"{name}.weight": weight for name, weight in exact.items()})
        for names, solution in _solve_block(settings, block, inside, exact, hidden, kwargs):
            start = 0
            for name in names:
                rows = slice(start, start + exact[name].shape[0])
                start = rows.stop
                q = solution.quantized
                quantized[name] = Quantized(q.codes[rows], q.scale[rows], q.zero[rows], q.g_idx)
                _assign(lm.model, {f"{name}.weight": quantized[name].dequantize(settings.grid)})
                plain = round_to_nearest(exact[name], settings.grid)
                report[name] = {
                    "damping": solution.damping,
                    "moved": float((plain.codes != quantized[name].codes).float().mean()),
                }
            report[names[0]]["error"] = solution.error
        for i in range(len(hidden)):
            hidden[i] = run_block(block, hidden[i], kwargs)
    if not any(entry["moved"] for entry in report.values()):
        raise NothingDone(
            "GPTQ's codes equal plain rounding's in every linear: the calibration had no effect"
        )
    raised = sum(entry["damping"] > settings.damping for entry in report.values())
    if raised:
        log.warning("the damping had to be raised for %d of %d linears", raised, len(report))
    return stored(quantized, changed, settings.grid), {"linears": len(quantized), "gptq": report}


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
    groups = _measure(block, inside, hidden[:1] if settings.true_sequential else hidden, kwargs)
    solutions = []
    for names in list(groups):
        if settings.true_sequential:
            groups = _measure(block, {name: inside[name] for name in names}, hidden, kwargs)
        tall = torch.cat([exact[name] for name in names])
        solution = solve(tall, groups[names].mean(), settings)
        solutions.append((list(names), solution))
        if settings.true_sequential:
            weight = solution.quantized.dequantize(settings.grid)
            for name, part in zip(names, weight.split([exact[n].shape[0] for n in names]), strict=True):
                inside[name].weight.copy_(part)
    return solutions


def _measure(
    block: nn.Module, inside: Mapping[str, nn.Linear], hidden: list[Tensor], kwargs: dict[str, Any]
) -> dict[tuple[str, ...], Hessian]:
    """Hessians over all samples, one for each set of linears that are given the very same tensor."""
    readers: list[tuple[Tensor, list[str]]] = []

    def note(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            for tensor, names in readers:
                if tensor is args[0]:
                    names.append(name)
                    return
            readers.append((args[0], [name]))

        return hook

    handles = [linear.register_forward_pre_hook(note(name)) for name, linear in inside.items()]
    found: dict[tuple[str, ...], Hessian] = {}
    try:
        for sample in hidden:
            readers.clear()
            run_block(block, sample, kwargs)
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
