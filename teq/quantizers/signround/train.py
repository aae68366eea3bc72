"""The training of learned rounding: one block at a time, against the outputs of the float block."""

import functools
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from teq.grid import Grid
from teq.models.blocks import run_block
from teq.quantizers import errors
from teq.quantizers.blockwise import UNREACHED, Calibrated, Report, measure
from teq.quantizers.gptq.solver import Hessian
from teq.quantizers.quantized import Quantized
from teq.quantizers.search import search_block
from teq.quantizers.signround.rounding import RoundedLinear, Rounding
from teq.record import OUTPUT_ERROR

CHECKED = 8  # windows on which the end of a block's training is compared with its start


class BlockTrainer:
    """A block whose linears compute with learned roundings, inside the context manager."""

    def __init__(self, block: Calibrated, grid: Grid) -> None:
        self.block = block
        start = {} if grid.search == "none" else search_block(block, grid)[0]
        self.roundings = {name: Rounding(w, start.get(name), grid) for name, w in block.exact.items()}
        self.device = next(iter(block.exact.values())).device

    def __enter__(self) -> "BlockTrainer":
        for name, linear in self.block.linears.items():
            rounding = self.roundings[name]
            linear.forward = functools.partial(_forward, rounding, linear.bias)
        return self

    def __exit__(self, *_: object) -> None:
        for linear in self.block.linears.values():
            del linear.forward

    def loss(self, samples: Sequence[int]) -> Tensor:
        """Return the mean squared difference from the float block's outputs on some samples, in fp32."""
        hidden, target = (
            torch.cat([waiting[i] for i in samples]).to(self.device)
            for waiting in (self.block.hidden, self.block.targets)
        )
        kwargs = self.block.together(len(samples))[self.block.index]
        output = run_block(self.block.folded.module, hidden, kwargs)
        return functional.mse_loss(output.float(), target.float())

    def move(self, loss: Tensor, rate: float) -> None:
        """Run the backward pass and move everything by `rate` against the sign of its gradient."""
        (1000 * loss).backward()  # as auto-round does: the gradients of a small loss keep their signs
        for rounding in self.roundings.values():
            rounding.step(rate)

    def snapshot(self) -> list[Tensor]:
        """Return copies of all that is trained."""
        return [parameter.detach().clone() for parameter in self._trained()]

    def restore(self, snapshot: Sequence[Tensor]) -> None:
        """Put a snapshot back."""
        for parameter, kept in zip(self._trained(), snapshot, strict=True):
            parameter.data.copy_(kept)

    def begin_again(self) -> None:
        """Put everything back to where it began."""
        for rounding in self.roundings.values():
            rounding.offset.data.zero_()
            rounding.shrink.data.fill_(1)

    def _trained(self) -> list[nn.Parameter]:
        return [p for rounding in self.roundings.values() for p in (rounding.offset, rounding.shrink)]


def quantize_block(
    block: Calibrated, *, grid: Grid, iterations: int, batch: int, lr: float, seed: int
) -> tuple[dict[str, Quantized], Report]:
    """Return a block's linears, trained by `train_block`, and a report of its training and its errors."""
    quantized, reached, entry = train_block(block, grid, iterations, batch, lr, seed)
    found = measure(block.folded.module, block.linears, block.hidden, block.kwargs, Hessian)
    means = {names: hessian.mean() for names, hessian in found.items()}
    reached |= {name for names in found for name in names}
    entry[OUTPUT_ERROR] = errors.read_back(errors.output_errors(block.exact, quantized, means, grid))
    unreached = {name: UNREACHED for name in quantized if name not in reached}
    return quantized, {block.folded.name: entry, **unreached}


def train_block(
    block: Calibrated, grid: Grid, iterations: int, batch: int, lr: float, seed: int
) -> tuple[dict[str, Quantized], set[str], dict[str, Any]]:
    """Return a block's linears, which of them a token of a step reached, and the losses.

    Their rounding is learned in `iterations` steps of `batch` samples, the rate falling linearly from `lr`.
    Of the start, the step of the least loss and the last one, the block keeps what has the least loss on
    `CHECKED` of the samples; the losses say which.
    """
    with BlockTrainer(block, grid) as trainer:
        count = len(block.hidden)
        checked = sorted({round(i * (count - 1) / max(1, CHECKED - 1)) for i in range(CHECKED)})

        def mean_loss() -> float:
            parts = [checked[i : i + batch] for i in range(0, len(checked), batch)]
            return sum(trainer.loss(part).item() * len(part) for part in parts) / len(checked)

        losses, lowest, best = {"start": mean_loss()}, math.inf, trainer.snapshot()
        for step, samples in zip(range(iterations), batches(count, batch, seed), strict=False):
            with torch.enable_grad():
                loss = trainer.loss(samples)
                if (value := loss.item()) < lowest:
                    best, lowest = trainer.snapshot(), value
                trainer.move(loss, lr * (1 - step / iterations))
        losses["last"], last = mean_loss(), trainer.snapshot()
        trainer.restore(best)
        losses["best"] = mean_loss()
        finite = [name for name in ("start", "best", "last") if math.isfinite(losses[name])]
        kept = min(finite, key=losses.__getitem__, default="start")  # the first of equal ones
        if kept == "start":
            trainer.begin_again()
        elif kept == "last":
            trainer.restore(last)
        quantized = {name: rounding.quantized() for name, rounding in trainer.roundings.items()}
        reached = {name for name, rounding in trainer.roundings.items() if rounding.reached}
    return quantized, reached, {"loss": losses, "kept": kept}


def batches(count: int, batch: int, seed: int) -> Iterator[list[int]]:
    """Yield `batch` of `count` samples without end, each once in a pass; an incomplete last batch is dropped.

    auto-round's `IndexSampler` draws alike.
    """
    draw, order = random.Random(seed), list(range(count))
    while True:
        draw.shuffle(order)
        yield from (order[i : i + batch] for i in range(0, count - batch + 1, batch))


def _forward(rounding: Rounding, bias: Tensor | None, x: Tensor) -> Tensor:
    return RoundedLinear.apply(x, rounding.offset, rounding.shrink, bias, rounding)
