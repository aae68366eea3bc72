"""Scales and zeros searched for the least error of what a weight puts out, instead of a group's extremes."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from teq.grid import Grid, decode, encode, extremes, grouped, params_between, storable
from teq.quantizers.blockwise import Calibrated, S, Sums, measure

SHRINKS = [1 - step / 20 for step in range(12)]  # of a group's extremes
COARSE, FINE = 64, 32  # scales that are tried first, then between the neighbours of the best
LOWEST = 0.3  # the smallest scale of the coarse ones, in scales of the extremes
OFFSETS = range(-3, 4)  # of the zeros that are tried, from the one that clips both ends alike
CHUNK = 1 << 16  # weights that are tried at once: the passes over them stay in the cache


class GroupGrams:
    """The mean over tokens of `x^T x` `[group, group]` of each group of an input's channels, fp32.

    `whole` makes sums over the same inputs, of all channels.
    """

    def __init__(
        self,
        grid: Grid,
        width: int,
        device: torch.device,
        *,
        whole: Callable[[int, torch.device], Sums] | None = None,
    ) -> None:
        self.spans = grid.spans(width)
        self.blocks = [torch.zeros(stop - start, stop - start, device=device) for start, stop in self.spans]
        self.tokens = 0
        self.whole: Any = None if whole is None else whole(width, device)

    def add(self, inputs: Tensor) -> None:
        """Take in inputs `[sequence, token, in]`."""
        flat = inputs.flatten(0, -2).float()
        for (start, stop), block in zip(self.spans, self.blocks, strict=True):
            block.addmm_(flat[:, start:stop].T, flat[:, start:stop])
        self.tokens += len(flat)
        if self.whole is not None:
            self.whole.add(inputs)

    def mean(self) -> list[Tensor]:
        """Return the matrices; the accumulator is used up."""
        return [block.div_(self.tokens) for block in self.blocks]


def searched_params(weight: Tensor, grams: Sequence[Tensor], grid: Grid) -> tuple[Tensor, Tensor]:
    """Return scale and zero `[out, groups]` of `weight [out, in]` (fp32), one of `grams` for each group.

    With `grid.search` clip, both extremes of a group are multiplied by the factor of `SHRINKS` with the least
    squared error of the group's share of the output, `e G e^T` with e the weight error and G its Gram matrix
    (the asymmetric form of llm-awq's `auto_clip.py`). With hessian, scale and integer zero are searched apart
    for the least `sum_j G_jj e_j^2` (NeUQI).
    """
    search = _shrunk if grid.search == "clip" else _by_diagonal
    scales, zeros, start = [], [], 0
    for part in grouped(weight, grid):  # [out, groups, group]
        matrices = grams[start : start + part.shape[1]]
        start += part.shape[1]
        for group, gram in zip(part.unbind(1), matrices, strict=True):
            # the whole rows of a wide weight are one group: a part of them is tried at a time
            rows = group.split(max(1, CHUNK // group.shape[1]))
            scale, zero = zip(*(search(some, gram, grid) for some in rows), strict=True)
            scales.append(torch.cat(scale))
            zeros.append(torch.cat(zero))
    return torch.stack(scales, 1), torch.stack(zeros, 1)


def search_block(
    block: Calibrated, grid: Grid, whole: Callable[[int, torch.device], S] | None = None
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[tuple[str, ...], S]]:
    """Return scale and zero `[out, groups]` of each linear of a block, by full name.

    Also return what `whole(in, device)` summed up in the same pass, by the linears that read an input.
    """
    sums = functools.partial(GroupGrams, grid, whole=whole)
    found = measure(block.folded.module, block.linears, block.hidden, block.kwargs, sums)
    params: dict[str, tuple[Tensor, Tensor]] = {}
    for names, grams in found.items():
        matrices = grams.mean()
        params |= {name: searched_params(block.exact[name], matrices, grid) for name in names}
    return params, {names: grams.whole for names, grams in found.items()}


class _Best:
    """The scale and zero `[out]` of the least error so far."""

    def __init__(self, weight: Tensor) -> None:
        self.error = weight.new_full((len(weight),), torch.inf)
        self.scale, self.zero = torch.ones_like(self.error), torch.zeros_like(self.error)

    def take(self, error: Tensor, scale: Tensor, zero: Tensor) -> None:
        """Keep what has a smaller error."""
        better = error < self.error
        for kept, new in ((self.error, error), (self.scale, scale), (self.zero, zero)):
            torch.where(better, new, kept, out=kept)


def _shrunk(weight: Tensor, gram: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return scale and zero `[out]` of `weight [out, group]` for the best of `SHRINKS`."""
    best, (lo, hi) = _Best(weight), extremes(weight)
    for shrink in SHRINKS:
        scale, zero = params_between(lo * shrink, hi * shrink, grid)
        codes = encode(weight, scale[:, None], zero[:, None], grid)
        lost = decode(codes, scale[:, None], zero[:, None]).sub_(weight)
        best.take((lost @ gram).mul_(lost).sum(1), scale, zero)
    return best.scale, best.zero


def _by_diagonal(weight: Tensor, gram: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return scale and zero `[out]` of `weight [out, group]` for the least error under G's diagonal."""
    importance = gram.diagonal()
    best, (lo, hi) = _Best(weight), extremes(weight)
    widest, zero = params_between(lo.clone(), hi.clone(), grid)
    best.take(_error(weight, importance, widest, zero, grid), widest, zero)

    def attempt(scale: Tensor) -> None:
        scale = storable(scale, grid)
        middle = (grid.levels - (lo + hi) / scale).div_(2).round_()
        for offset in OFFSETS if not grid.symmetric else (None,):
            zero_here = zero if offset is None else (middle + offset).clamp_(0, grid.levels)
            best.take(_error(weight, importance, scale, zero_here, grid), scale, zero_here)

    step = LOWEST ** (1 / (COARSE - 1))  # factor between two scales that follow one another
    for i in range(COARSE):
        attempt(widest * step**i)
    found = best.scale.clone()
    for i in range(1, FINE + 1):
        attempt(found * step ** (2 * i / (FINE + 1) - 1))
    return best.scale, best.zero


def _error(weight: Tensor, importance: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """Return `sum_j h_j (w_j - Q(w_j))^2` `[out]`."""
    scale, zero = scale[:, None], zero[:, None]
    rounded = (weight / scale).round_()
    torch.maximum(rounded, -zero, out=rounded)
    torch.minimum(rounded, grid.levels - zero, out=rounded)
    return rounded.mul_(scale).sub_(weight).square_() @ importance
