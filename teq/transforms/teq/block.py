"""TEQ's scales, and bounds of the weights, trained block by block towards the float block's outputs.

OmniQuant (arXiv 2308.13137, section 3.1) trains its scales and bounds so.
"""

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from teq.console import track
from teq.device.memory import on_host
from teq.device.offload import place_around_blocks, saving
from teq.device.runtime import DEFAULT_RUNTIME, Runtime
from teq.device.waiting import places
from teq.files.resume import BlockFiles
from teq.grid import Grid
from teq.models.arch import Arch, block_sites, blocks, linears
from teq.models.blocks import block_inputs, first_inputs, pass_on, run_block
from teq.models.fold import check_equivalence, site_scales
from teq.models.lazy import present
from teq.stage import NothingDone, OnStep
from teq.transforms.teq.bounds import clipped_linears, with_bounds
from teq.transforms.teq.linear import fake_quantized
from teq.transforms.teq.train import Trainer

log = logging.getLogger(__name__)


@torch.no_grad()
def train(
    model: nn.Module,
    arch: Arch,
    windows: Tensor,
    held_out: Tensor,
    trainer_of: Callable[[int], Trainer],
    *,
    grid: Grid,
    steps: int,
    batch: int = 1,
    runtime: Runtime = DEFAULT_RUNTIME,
    on_step: OnStep = lambda *_: None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train the scales of one block after the other on `windows [steps * batch, token]`.

    `trainer_of(index)` gives the scales of a block's sites at their start, and factors of its weights'
    extremes where these are trained too. A block reads what the blocks before it put out with their scales
    and rounded weights, and is trained to put out what the float model's block does. Where that is not closer
    on `held_out [sample, token]` in the end, it keeps its start. Hidden states wait in host memory or in a
    file. Finished blocks are stored in the folder `runtime.partial`, and those that are there are not trained
    again. Under the strategy `offload` the blocks stay in host memory but for the one that is trained; other
    strategies change nothing. The model is left as it was.

    Returns the scales by site, with `start/<site>` and `last/<site>`, the bounds `clip/<linear>` that come of
    trained factors, and each block's losses. Raises NothingDone when every block keeps its start.
    """
    check_equivalence(model, arch)
    every = blocks(model, arch)
    if runtime.strategy == "offload":
        place_around_blocks(model, every.values(), runtime.device)
    device = model.get_input_embeddings().weight.device
    with saving(every.values(), runtime.strategy, device):
        states = _States(model, arch, torch.cat([windows, held_out]), batch)
    rows = [range(step * batch, (step + 1) * batch) for step in range(steps)]
    held = range(len(windows), len(windows) + len(held_out))
    scales: dict[str, Tensor] = {}
    report: dict[str, Any] = {}
    finished = BlockFiles(runtime.partial, "the training")
    for index, (name, module) in enumerate(track(every.items(), "training blocks")):
        trainer, inside = trainer_of(index), linears(name, module)
        here = list(block_sites(arch, model.config, index, name, module))
        with present(module), _visiting(module, device):
            pass_on(module, states.targets, states.alone[index], device)
            with (
                fake_quantized(model, arch, grid, trainer.current.__getitem__, "keep") as quantize,
                clipped_linears(trainer, inside, here, grid, quantize),
            ):
                if (known := finished.read(index)) is None:
                    loss = functools.partial(states.loss, index, module)
                    found, entry = _train_block(trainer, loss, rows, held, on_step, index * steps)
                    known = on_host(found), {name: entry}
                    finished.write(index, *known)
                trainer.current.update({site: known[0][site].to(device) for site in trainer.free})
                pass_on(module, states.hidden, states.alone[index], device)
            scales |= with_bounds(known[0], inside, here, grid)
        report |= known[1]
    if as_it_was := [name for name, entry in report.items() if entry["kept"] == "start"]:
        log.warning("%d of %d blocks keep the scales they began with", len(as_it_was), len(report))
    if steps and len(as_it_was) == len(report):
        raise NothingDone(
            "training made no block better on the held-out windows: the result would be its start under "
            "another name; raise train.steps or train.batch, or lower train.lr"
        )
    return scales, {
        "sites": list(site_scales(scales)),
        "blocks": report,
        "strategy": runtime.strategy,
        "fake_quant": quantize.name,
    }


class _States:
    """The hidden states `[1, token, width]` of all windows before a block, in host memory or in a file.

    `hidden` comes from the blocks that were rounded, `targets` from the float model's.
    """

    def __init__(self, model: nn.Module, arch: Arch, windows: Tensor, batch: int) -> None:
        self.device = model.get_input_embeddings().weight.device
        self.hidden, self.alone = first_inputs(model, arch, windows, functools.partial(places, "cpu"))
        _, self.together = block_inputs(model, arch, windows[:batch].to(self.device))
        self.targets = self.hidden.copy()

    def loss(self, index: int, module: nn.Module, rows: Sequence[int]) -> Tensor:
        """Return the mean squared difference of a block's outputs from the targets of some windows, fp32."""
        x, y = (
            torch.cat([waiting[i] for i in rows]).to(self.device) for waiting in (self.hidden, self.targets)
        )
        return _loss(module, x, y, (self.alone if len(rows) == 1 else self.together)[index])


def _train_block(
    trainer: Trainer,
    loss: Callable[[Sequence[int]], Tensor],
    rows: Sequence[Sequence[int]],
    held: Sequence[int],
    on_step: OnStep,
    before_it: int,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a block's scales, at their start and their last too, and its losses on the `held` samples.

    Of factors only those that are kept. Its steps are counted from those of the blocks `before_it`.
    """

    def measure(scales: dict[str, Tensor]) -> float:
        trainer.current.update(scales)
        return math.fsum(loss([row]).item() for row in held) / len(held)

    start = trainer.snapshot()
    before = measure(start)
    for step, some in enumerate(rows):
        with torch.enable_grad():
            trainer.refresh()
            now = loss(some)
            value = now.item()
            trainer.move(1000 * now, step)  # as in learned rounding: small losses stay above Adam's epsilon
        on_step(before_it + step, value)
    last = trainer.snapshot()
    after = measure(last)
    kept = "last" if after < before else "start"  # also where it is not finite
    parts = {"": last if kept == "last" else start, "start/": start, "last/": last}
    losses = {name: x if math.isfinite(x) else None for name, x in (("start", before), ("last", after))}
    tensors = {
        f"{part}{name}": s
        for part, those in parts.items()
        for name, s in (site_scales(those) if part else those).items()
    }
    return tensors, {"loss": losses, "kept": kept}


def _loss(module: nn.Module, x: Tensor, y: Tensor, kwargs: dict[str, Any]) -> Tensor:
    return functional.mse_loss(run_block(module, x, kwargs).float(), y.float())


@contextlib.contextmanager
def _visiting(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Context manager: a module is on `device`, afterwards where it was."""
    home = next(module.parameters()).device
    module.to(device)
    try:
        yield
    finally:
        module.to(home)


def dry_run(
    model: nn.Module,
    arch: Arch,
    tokens: Tensor,
    trainer_of: Callable[[int], Trainer],
    *,
    grid: Grid,
    strategy: str,
) -> None:
    """Do two steps of every block on `tokens [batch, token]`, without the hidden states that wait."""
    with torch.no_grad():
        hidden, keywords = block_inputs(model, arch, tokens, count=1)
    for index, (name, module) in enumerate(blocks(model, arch).items()):
        copied = [p.clone() for p in module.parameters()] if strategy == "offload" else []
        trainer = trainer_of(index)
        with torch.no_grad():
            targets = [run_block(module, hidden, keywords[0]) for _ in range(2)]
        with (
            present(module),
            fake_quantized(model, arch, grid, trainer.current.__getitem__, "keep") as quantize,
            clipped_linears(
                trainer,
                linears(name, module),
                block_sites(arch, model.config, index, name, module),
                grid,
                quantize,
            ),
        ):
            for target in targets:
                trainer.refresh()
                trainer.move(_loss(module, hidden, target, keywords[0]), 0)
                with torch.no_grad():
                    trainer.current.update(trainer.snapshot())
                    run_block(module, hidden, keywords[0])
        del copied
