"""One step of TEQ training by the contenders that need nothing but this project's packages.

They share the model, the loss, the scales and the optimizer, and differ in the quantized linear and in what
is kept between the passes.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from teq.device.offload import place_around_blocks
from teq.grid import Grid, fake_quant
from teq.models import arch
from teq.models.checkpoint import LM
from teq.transforms.teq.linear import fake_quantized
from teq.transforms.teq.settings import Teq

STRATEGIES = {"ours": "keep", "checkpoint": "checkpoint", "offload": "offload"}


class StraightThrough(torch.autograd.Function):
    """FakeQuant forward, the gradient unchanged backward."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, grid: Grid) -> Tensor:
        return fake_quant(weight, grid)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class FloorLinear(torch.autograd.Function):
    """A frozen linear whose backward pass does only the arithmetic that training a scale needs.

    That is the gradient of its input and, where there is a scale, one more product of the same size, with the
    input stored.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, s: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, *([] if s is None else [x]))
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, *rest = ctx.saved_tensors
        ds = (dy @ weight).flatten(0, -2).sum(0).float() if rest else None
        return dy @ weight, ds, None, None


def autograd(linear: nn.Linear, s: Tensor | None, grid: Grid, x: Tensor) -> Tensor:
    """The plain version: keeps every quantized weight for the backward pass."""
    weight = linear.weight.float() if s is None else linear.weight * s
    quantized = StraightThrough.apply(weight, grid).to(x.dtype)
    return functional.linear(x if s is None else (x / s).to(x.dtype), quantized, linear.bias)


def floor(linear: nn.Linear, s: Tensor | None, grid: Grid, x: Tensor) -> Tensor:
    """No quantization at all."""
    return FloorLinear.apply(x, s, linear.weight, linear.bias)


PLAIN = {"autograd": autograd, "floor": floor}


class Contender:
    """One contender around a model that others may share: each puts its linears in only for its turn."""

    def __init__(self, name: str, lm: LM, settings: Teq, device: str) -> None:
        self.name, self.model, self.family, self.grid = name, lm.model, lm.arch, settings.grid
        self.sites = arch.sites(lm.model, lm.arch)
        if name == "offload":
            place_around_blocks(lm.model, arch.blocks(lm.model, lm.arch).values(), device)
        self.trainer = settings.trainer(lm.model, lm.arch, device)

    def installed(self) -> contextlib.AbstractContextManager[None]:
        """Context manager: the blocks' linears are this contender's."""
        if self.name in STRATEGIES:
            scale = self.trainer.current.__getitem__
            return fake_quantized(self.model, self.family, self.grid, scale, STRATEGIES[self.name])
        return self._replaced()

    def step(self, tokens: Tensor) -> float:
        """Forward, backward and Adam's update on `tokens [1, token]`; returns the loss."""
        loss = self.trainer.loss(self.model, tokens)
        value = loss.item()
        self.trainer.move(loss, 0)
        return value

    @contextlib.contextmanager
    def _replaced(self) -> Iterator[None]:
        site_of = {target: site.name for site in self.sites for target in site.targets}
        linears = {
            name: linear
            for block_name, block in arch.blocks(self.model, self.family).items()
            for name, linear in arch.linears(block_name, block).items()
        }
        try:
            for name, linear in linears.items():
                linear.forward = functools.partial(self._forward, linear, site_of.get(name))
            yield
        finally:
            for linear in linears.values():
                vars(linear).pop("forward", None)

    def _forward(self, linear: nn.Linear, site: str | None, x: Tensor) -> Tensor:
        s = None if site is None else self.trainer.current[site]
        return PLAIN[self.name](linear, s, self.grid, x)
