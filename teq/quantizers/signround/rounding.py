"""Learned rounding of a weight: what is trained, the linear that computes with it, its gradient."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, autograd, nn
from torch.nn import functional

from teq.grid import Grid, group_extremes, grouped, params_between
from teq.quantizers.quantized import Quantized


class Rounding:
    """A weight whose codes are `clamp(round(W / scale + V) + zero, 0, 2^b - 1)`.

    Trained are the offsets V `[out, in]` and two factors of each group's bounds, `shrink [2, out, groups]`:
    scale and zero are those of a group between `lo * shrink[0]` and `hi * shrink[1]`, as in auto-round 0.16.1
    (SignRound, arXiv 2309.05516). lo and hi are the group's extremes, or the bounds of what `start` (scale,
    zero) represents; then the factors are allowed as far as the extremes.
    """

    def __init__(self, weight: Tensor, start: tuple[Tensor, Tensor] | None, grid: Grid) -> None:
        self.weight, self.grid = weight, grid
        self.lo, self.hi = group_extremes(weight, grid)
        self.most = torch.ones(2, *self.lo.shape, device=weight.device)  # of `shrink`
        if start is not None:
            scale, zero = start
            whole = torch.stack([self.lo, self.hi])
            self.lo, self.hi = -scale * zero, scale * (grid.levels - zero)
            if grid.symmetric:  # its zero lies half a step off the middle
                self.hi = scale * grid.levels / 2
                self.lo = self.hi.neg()
            bounds = torch.stack([self.lo, self.hi])
            self.most = torch.where(bounds == 0, 1.0, whole / bounds).clamp_(min=1)
        self.reached = False  # by a token of a step
        self.offset = nn.Parameter(torch.zeros_like(weight))
        self.shrink = nn.Parameter(torch.ones_like(self.most))

    def step(self, rate: float) -> None:
        """Move both parameters by `rate` against the sign of their gradients, which are dropped."""
        with torch.no_grad():
            for parameter in (self.offset, self.shrink):
                if parameter.grad is None:  # of an expert that no token of the batch was routed to
                    continue
                self.reached = True
                parameter.sub_(parameter.grad.sign_(), alpha=rate)
                parameter.grad = None
            torch.clamp(self.shrink, torch.zeros_like(self.shrink), self.most, out=self.shrink)

    def params(self) -> tuple[Tensor, Tensor]:
        """Return scale and zero `[out, groups]`."""
        with torch.no_grad():
            lo, hi = self.lo * self.shrink[0], self.hi * self.shrink[1]
            return params_between(hi.neg() if self.grid.symmetric else lo, hi, self.grid)

    def fake_quantized(self) -> Tensor:
        """Return the weight `[out, in]` that the codes stand for."""
        out = torch.empty_like(self.weight)
        for weight, offset, scale, zero, target in self._parts(out):
            codes = torch.div(weight, scale, out=target).add_(offset).round_().add_(zero)
            codes.clamp_(0, self.grid.levels).sub_(zero).mul_(scale)
        return out

    def quantized(self) -> Quantized:
        """Return codes, scale and zero."""
        codes = torch.empty_like(self.weight)
        with torch.no_grad():
            for weight, offset, scale, zero, target in self._parts(codes):
                torch.div(weight, scale, out=target).add_(offset).round_().add_(zero)
        return Quantized(codes.clamp_(0, self.grid.levels).to(torch.uint8), *self.params())

    def gradients(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return those to `offset` and `shrink` for the one to the fake-quantized weight, which is used up.

        Rounding passes gradients on as they are. With q = code - zero: within the range dq/dscale is
        -w / scale^2 and dq/dzero is 0; at an end, which clamping made it, dq/dzero is -1 and dq/dscale is 0.
        """
        steps, ends = [], []  # what the scale and the zero of a group get, the latter over -scale
        for weight, offset, scale, zero, part in self._parts(gradient):
            ratio = weight / scale
            codes = (ratio + offset).round_().add_(zero)
            inside = (codes >= 0) & (codes <= self.grid.levels)
            q = codes.clamp_(0, self.grid.levels).sub_(zero)
            steps.append(q.sub_(ratio.mul_(inside)).mul_(part).sum(-1))
            total = part.sum(-1)
            part.mul_(inside)
            ends.append(total.sub_(part.sum(-1)))
            part.mul_(scale * weight.any(-1, keepdim=True))  # steps ignore size: zeros must not move at all
        (scale, _), levels = self.params(), self.grid.levels
        by_scale, by_zero = torch.cat(steps, 1), torch.cat(ends, 1).mul_(-scale)
        if self.grid.symmetric:  # the zero is fixed
            return gradient, torch.stack([torch.zeros_like(scale), by_scale * (2 / levels) * self.hi])
        by_scale += by_zero * self.lo * self.shrink.detach()[0] / scale.square()
        by_lo = by_scale / -levels - by_zero / scale
        return gradient, torch.stack([by_lo * self.lo, by_scale / levels * self.hi])

    def _parts(self, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Yield views `[out, groups, group]` of weight and offset, their scale and zero, views of others."""
        start, (scale, zero) = 0, self.params()
        views = (grouped(each, self.grid) for each in (self.weight, self.offset.detach(), *others))
        for weight, offset, *rest in zip(*views, strict=True):
            here = slice(start, start + weight.shape[1])
            yield weight, offset, scale[:, here, None], zero[:, here, None], *rest
            start = here.stop


class RoundedLinear(autograd.Function):
    """`linear(x, W)` with the fake-quantized weight of a `Rounding`, made again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, offset: Tensor, shrink: Tensor, bias: Tensor | None, rounding: Rounding
    ) -> Tensor:
        """Compute from x `[..., in]`; `offset` and `shrink` are the rounding's own, for their gradients."""
        ctx.save_for_backward(x)
        ctx.rounding = rounding
        return functional.linear(x, rounding.fake_quantized().to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients to x, `offset` and `shrink` for dy `[..., out]`."""
        (x,), rounding = ctx.saved_tensors, ctx.rounding
        dx = dy @ rounding.fake_quantized().to(dy.dtype) if ctx.needs_input_grad[0] else None
        dw = (dy.flatten(0, -2).T @ x.flatten(0, -2)).float()
        return dx, *rounding.gradients(dw), None, None
