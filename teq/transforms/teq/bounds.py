"""Bounds of the weights, learned block by block beside TEQ's scales: OmniQuant's learnable weight clipping.

OmniQuant (arXiv 2308.13137, section 3.2) multiplies a group's extremes by the sigmoids of what it trains;
here the factors are trained themselves, so that they can start at 1, which is plain rounding.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, autograd, nn
from torch.nn import functional

from teq.device.memory import on_host
from teq.grid import Grid, group_extremes, grouped, in_equal_parts, params_between
from teq.models.arch import Site
from teq.models.blocks import forwards
from teq.models.fold import CLIP, Folding, site_scales
from teq.transforms.teq.fake_quant import FakeQuant
from teq.transforms.teq.train import Trainer

SHRINK = "shrink/"  # before a linear's name: the factors of its groups' extremes


class BoundsTrainer(Trainer):
    """The scales of a block's sites, and factors from 0 to 1 of the extremes of its linears' groups.

    The factors `shrink/<linear>` are `[2, out, groups]`, of the lowest and the largest weight; on a symmetric
    grid `[1, out, groups]`, of both. `bounds_rate` gives their learning rate of a step.
    """

    def __init__(
        self,
        first: Mapping[str, Tensor],
        device: torch.device | str,
        *,
        parameter: str,
        rate: Callable[[int], float],
        linears: Mapping[str, nn.Linear],
        grid: Grid,
        bounds_rate: Callable[[int], float],
    ) -> None:
        super().__init__(first, device, parameter=parameter, rate=rate)
        ends = 1 if grid.symmetric else 2
        self.factors = {
            SHRINK + name: nn.Parameter(
                torch.ones(ends, linear.out_features, grid.group_count(linear.in_features), device=device)
            )
            for name, linear in linears.items()
        }
        self.free |= self.factors
        self.optimizer.add_param_group({"params": list(self.factors.values()), "rate": bounds_rate})

    def scale(self, name: str) -> Tensor:
        """Return the positive scales of a site `[width]`, or the factors of a linear."""
        return self.factors[name] if name in self.factors else super().scale(name)

    def move(self, loss: Tensor, step: int) -> None:
        """Run the backward pass and Adam's update; factors stay from 0 to 1."""
        super().move(loss, step)
        with torch.no_grad():
            for factor in self.factors.values():
                factor.clamp_(0, 1)


class ClippedLinear(autograd.Function):
    """`linear(x / s, FakeQuant(clamp(W diag(s), lo, hi)))`, lo and hi the groups' extremes times `factors`.

    With `u = W diag(s)`, `c = clamp(u, lo, hi)`, `Wq = FakeQuant(c)` and its scale `d = (hi - lo) / (2^b -
    1)`, straight-through rounding has the differential `dWq = dc + (Wq - c) / d * dd`: the zero cancels. So
    for G, the gradient to Wq, the one to hi is `(sum over u >= hi of G) + R`, to lo `(sum over u <= lo of G)
    - R`, with `R = sum of G (Wq - c) / d / (2^b - 1)` over the group. For s the extremes are constants: the
    gradient to it is `(1/s) * sum over out of G (u - Wq)`, u being 0 where it is clipped, and TEQ's own where
    nothing is. The backward pass computes Wq again.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, s: Tensor, factors: Tensor, linear: nn.Linear, grid: Grid, quantize: FakeQuant
    ) -> Tensor:
        """Compute from x `[..., in]`, s `[in]` fp32 and factors `[2 or 1, out, groups]`."""
        ctx.save_for_backward(x, s, factors)
        ctx.linear, ctx.grid, ctx.quantize = linear, grid, quantize
        clipped = _clamped(linear.weight * s, factors, grid)
        return functional.linear((x / s).to(x.dtype), quantize(clipped, None).to(x.dtype), linear.bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients to x, s and factors for dy `[..., out]`."""
        x, s, factors = ctx.saved_tensors
        weight, grid, flat = ctx.linear.weight * s, ctx.grid, dy.flatten(0, -2)
        clipped = _clamped(weight.clone(), factors, grid)
        quantized, ends = ctx.quantize(clipped, None), group_extremes(weight, grid)
        dx = ((dy @ quantized.to(dy.dtype)) / s).to(dy.dtype)
        dw = (flat.T @ (x / s).to(dy.dtype).flatten(0, -2)).to(weight)
        ds = torch.where(clipped == weight, weight, 0).sub_(quantized).mul_(dw).sum(0).div_(s)
        lo, hi = ends * factors
        step, start, by_bound = params_between(lo.clone(), hi.clone(), grid)[0], 0, []
        views = (grouped(each, grid) for each in (weight, dw, quantized.sub_(clipped)))
        for u, g, lost in zip(*views, strict=True):
            here = slice(start, start + u.shape[1])
            start = here.stop
            r = lost.div_(step[:, here, None]).mul_(g).sum(-1).div_(grid.levels)
            below, above = (u <= lo[:, here, None]).mul(g).sum(-1), (u >= hi[:, here, None]).mul(g).sum(-1)
            by_bound.append(torch.stack([below - r, above + r]))
        by_factor = torch.cat(by_bound, 2).mul_(ends)
        by_factor = by_factor.sum(0, keepdim=True) if grid.symmetric else by_factor
        return dx, ds, by_factor, None, None, None


def clipped_linears(
    trainer: Trainer, linears: Mapping[str, nn.Linear], sites: Iterable[Site], grid: Grid, quantize: FakeQuant
) -> AbstractContextManager[None]:
    """Context manager: the linears of a block for which a trainer has factors compute with them.

    `linears` and `sites` are the block's, `quantize` rounds as everything else does.
    """
    reads = {target: site for site in sites for target in site.targets}

    def forward(name: str, linear: nn.Linear, x: Tensor) -> Tensor:
        site, now = reads.get(name), trainer.current
        s = x.new_ones(x.shape[-1], dtype=torch.float32) if site is None else site.over_inputs(now[site.name])
        return ClippedLinear.apply(x, s, now[SHRINK + name], linear, grid, quantize)

    learned = {name: linear for name, linear in linears.items() if SHRINK + name in trainer.free}
    return forwards({linear: functools.partial(forward, name, linear) for name, linear in learned.items()})


@torch.no_grad()
def with_bounds(
    tensors: Mapping[str, Tensor], linears: Mapping[str, nn.Linear], sites: list[Site], grid: Grid
) -> dict[str, Tensor]:
    """Return a block's trained tensors with the bounds of its folded weights in the place of factors."""
    folding, bounds = Folding.of(sites, site_scales(tensors)), {}
    for name, linear in linears.items():
        if (factors := tensors.get(SHRINK + name)) is not None:
            ends = group_extremes(folding.weight(name, linear).float(), grid)
            bounds[CLIP + name] = in_equal_parts(ends * factors.to(ends), grid, linear.in_features)
    return {name: t for name, t in tensors.items() if not name.startswith(SHRINK)} | on_host(bounds)


def _clamped(weight: Tensor, factors: Tensor, grid: Grid) -> Tensor:
    """Clamp the groups of `weight [out, in]` to their extremes times `factors`, in place."""
    lo, hi = in_equal_parts(group_extremes(weight, grid) * factors, grid, weight.shape[1])[..., None]
    weight.unflatten(1, (lo.shape[1], -1)).clamp_(lo, hi)
    return weight
