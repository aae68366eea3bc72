"""Quantization block after block, each on what the quantized blocks before it put out."""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from teq.console import track
from teq.device.waiting import places
from teq.files.resume import BlockFiles
from teq.grid import Grid
from teq.models.arch import Arch
from teq.models.blocks import block_inputs, first_inputs, pass_on, run_block
from teq.models.fold import FoldedBlock, FoldedModel
from teq.quantizers.quantized import Quantized, restore, round_to_nearest, stored

log = logging.getLogger(__name__)
Report = dict[str, dict[str, Any]]
UNREACHED = {"unreached": True}  # what a report says of a linear without calibration inputs


@dataclass(frozen=True)
class Calibrated:
    """A block with its folded weights in it and what goes through it, one entry `[1, token, width]` a sample.

    `exact` are its folded weights `[out, in]` in fp32 by linear. `targets` are the outputs of the float
    model's block and `float_inputs` its inputs, empty where nobody asked for them. `kwargs` are those of one
    sample, `together(n)` those of n in one batch, of every block.
    """

    folded: FoldedBlock
    index: int
    exact: dict[str, Tensor]
    hidden: list[Tensor]
    targets: list[Tensor]
    kwargs: dict[str, Any]
    together: Callable[[int], list[dict[str, Any]]]
    float_inputs: list[Tensor] = dataclasses.field(default_factory=list)

    @property
    def linears(self) -> dict[str, nn.Linear]:
        """Return the block's linears by full name."""
        return self.folded.linears


QuantizeBlock = Callable[[Calibrated], tuple[dict[str, Quantized], Report]]


@torch.no_grad()
def quantize_blocks(
    model: nn.Module,
    arch: Arch,
    scales: Mapping[str, Tensor],
    windows: Tensor,
    grid: Grid,
    quantize: QuantizeBlock,
    what: str,
    *,
    targets: bool = False,
    float_inputs: bool = False,
    waiting: str | None = None,
    partial: Path | None = None,
) -> tuple[dict[str, Tensor], Report, dict[str, Any]]:
    """Quantize every linear of every block on calibration `windows [sample, token]`; `model` is used up.

    `quantize` returns a block's linears and a report; `what` names the work to the user. Hidden states wait
    for the next block on the device `waiting`, the model's own where none is given. Finished blocks are
    stored in the folder `partial`, and those that are there are not quantized again. A linear that
    `quantize` leaves out, of an expert to which no token was routed, is rounded to nearest.

    Returns the stored tensors, all reports, and what a record says of the linears: how many there are, and
    the names of those without inputs where there are such.
    """
    device = model.get_input_embeddings().weight.device
    hidden, keywords = first_inputs(model, arch, windows, functools.partial(places, waiting or device))
    exact_hidden = hidden.copy() if targets or float_inputs else []

    @functools.cache
    def together(count: int) -> list[dict[str, Any]]:
        return block_inputs(model, arch, windows[:count].to(device))[1]

    tensors: dict[str, Tensor] = {}
    report: Report = {}
    finished = BlockFiles(partial, what)
    for index, block in enumerate(track(FoldedModel(model, arch, scales), f"{what} blocks")):
        kwargs = keywords[index]
        exact_inputs = exact_hidden.copy() if float_inputs else []
        pass_on(block.module, exact_hidden, kwargs, device)
        if (known := finished.read(index)) is not None:
            part, entries = known
            restore(model, {name: t.to(device) for name, t in part.items()}, grid)
        else:
            calibrated = Calibrated(
                block, index, {}, hidden, exact_hidden, kwargs, together, float_inputs=exact_inputs
            )
            part, entries = _quantized(model, grid, quantize, calibrated)
            part = finished.write(index, part, entries)
        tensors |= part
        report |= entries
        pass_on(block.module, hidden, kwargs, device)
    unreached = [name for name, entry in report.items() if entry == UNREACHED]
    info: dict[str, Any] = {"linears": sum(name.endswith("/codes") for name in tensors)}
    if unreached:
        log.warning(
            "no calibration token reached %d of %d linears, of experts: they are rounded to nearest",
            len(unreached),
            info["linears"],
        )
        info["unreached"] = unreached
    return tensors, {name: entry for name, entry in report.items() if entry != UNREACHED}, info


def _quantized(
    model: nn.Module, grid: Grid, quantize: QuantizeBlock, block: Calibrated
) -> tuple[dict[str, Tensor], Report]:
    """Return a block's stored tensors in host memory and its report; the model has the quantized weights."""
    folded = block.folded
    exact = {name: folded.weight(name) for name in folded.linears}
    assign(model, folded.changed)
    assign(model, {f"{name}.weight": weight for name, weight in exact.items()})
    quantized, entries = quantize(dataclasses.replace(block, exact=exact))
    for name in [name for name in exact if name not in quantized]:
        quantized[name] = round_to_nearest(exact[name], grid)
        entries[name] = UNREACHED
    for name, q in quantized.items():
        assign(model, {f"{name}.weight": q.dequantize(grid)})
    # packed and off the device block by block: a model's codes at once would be a byte for every weight
    return {name: t.cpu() for name, t in stored(quantized, folded.changed, grid).items()}, entries


class Sums(Protocol):
    """Sums over the inputs of a linear."""

    def add(self, *inputs: Tensor) -> None:
        """Take in one batch of inputs `[sequence, token, in]`, and the float model's if they are measured."""


S = TypeVar("S", bound=Sums)


@dataclass(frozen=True)
class FloatBlock:
    """A float block with linears by full name, and its inputs `[1, token, width]`, one a sample."""

    module: nn.Module
    linears: Mapping[str, nn.Linear]
    hidden: list[Tensor]


def measure(
    block: nn.Module,
    inside: Mapping[str, nn.Linear],
    hidden: list[Tensor],
    kwargs: dict[str, Any],
    sums: Callable[[int, torch.device], S],
    exact: FloatBlock | None = None,
) -> dict[tuple[str, ...], S]:
    """Return `sums(in, device)` over all samples, one for each set of linears with the very same input.

    With the `exact` block they also take in what the linear of the same name reads there.
    """
    device = next(iter(inside.values())).weight.device
    found: dict[tuple[str, ...], S] = {}
    for i, sample in enumerate(hidden):
        others = {}
        if exact is not None:
            same = {name: exact.linears[name] for name in inside}
            others = _inputs(exact.module, same, exact.hidden[i].to(device), kwargs)
        for names, tensor in _inputs(block, inside, sample.to(device), kwargs).items():
            if names not in found:
                found[names] = sums(tensor.shape[-1], tensor.device)
            found[names].add(tensor, *([others[names]] if others else []))
    return found


def reading_together(
    block: nn.Module, inside: Mapping[str, nn.Linear], hidden: list[Tensor], kwargs: dict[str, Any]
) -> list[tuple[str, ...]]:
    """Return the sets of linears with the very same input, in the order in which they compute.

    Samples are read until every linear was called: one is enough where no experts are.
    """
    device, found = next(iter(inside.values())).weight.device, {}
    for sample in hidden:
        found |= dict.fromkeys(_inputs(block, inside, sample.to(device), kwargs))
        if sum(map(len, found)) == len(inside):
            break
    return list(found)


class _AllSeen(Exception):
    """Every linear has its input: what the block would still make of them is not needed."""


def _inputs(
    block: nn.Module, inside: Mapping[str, nn.Linear], sample: Tensor, kwargs: dict[str, Any]
) -> dict[tuple[str, ...], Tensor]:
    """Return the distinct inputs `[1, token, in]` of linears, by the names of those that read each."""
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

    with contextlib.ExitStack() as hooks, contextlib.suppress(_AllSeen):
        for name, linear in inside.items():
            hooks.enter_context(linear.register_forward_pre_hook(note(name)))
        run_block(block, sample, kwargs)
    # OPT hands its feed-forward part flat tokens: one sample is one sequence whatever its shape
    return {tuple(names): tensor.reshape(1, -1, tensor.shape[-1]) for tensor, names in readers}


def assign(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy values into the parameters of their names."""
    for name, value in values.items():
        model.get_parameter(name).copy_(value)
