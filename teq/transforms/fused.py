"""Scaling, extremes, rounding and dequantizing of a weight in one pass, where a compiler makes that pass."""

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from teq.grid import Grid, decode, encode, fake_quant, qparams

log = logging.getLogger(__name__)
FakeQuant = Callable[[Tensor, Tensor | None], Tensor]
# the quotient w / scale decides codes: as in eager mode, not the faster approximation
EXACT = {"eager_numerics.division_rounding": True}
# one graph for each shape of weight, and as many as a model has: past the compiler's usual limit of eight it
# would run everything eagerly and say nothing
EACH_SHAPE = {"dynamic": False, "recompile_limit": 64, "isolate_recompiles": True}


def plain(grid: Grid) -> FakeQuant:
    """`FakeQuant(W diag(s))` of a weight `[out, in]` and s `[in]` (or None) in fp32, as eager operations."""

    def quantized(weight: Tensor, s: Tensor | None) -> Tensor:
        return fake_quant(weight.float() if s is None else weight * s, grid)

    return quantized


def chosen(grid: Grid, device: torch.device, dtype: torch.dtype) -> tuple[FakeQuant, str]:
    """The compiled pass where it helps and gives the same numbers, else the plain one, and its name.

    It helps on a GPU, where every pass over a weight is a trip to memory and every operator a launch. On a
    CPU a step is bound by its matrix products, and compiling takes longer than is saved (see
    benchmarks/NOTES.md).
    """
    if device.type != "cuda":
        return plain(grid), "plain"
    return compiled(grid, device, dtype)


def compiled(grid: Grid, device: torch.device, dtype: torch.dtype) -> tuple[FakeQuant, str]:
    """The compiled pass for weights of `dtype` and its name, or the plain one with a log line when it fails
    or differs in a bit.
    """
    expected = plain(grid)
    generator = torch.Generator(device).manual_seed(0)
    size = 64 if grid.group_size == -1 else 3 * grid.group_size + 1  # with a shorter last group
    weight = torch.randn(96, size, device=device, generator=generator)
    weight[0] = 0  # a group without extremes
    weight = weight.to(dtype)
    s = torch.rand(size, device=device, generator=generator) + 0.5
    try:
        made = _without_gradient(
            torch.compile(functools.partial(_in_one_pass, grid), options=EXACT, **EACH_SHAPE)
        )
        same = all(torch.equal(made(weight, scale), expected(weight, scale)) for scale in (None, s))
    except Exception as error:  # whatever a compiler may raise: no compiler, no driver, an unsupported device
        log.info("the fake quantization is not compiled: %s", " ".join(str(error).split())[:200])
        return expected, "plain"
    if not same:
        log.info("the compiled fake quantization differs from the plain one: it is not used")
        return expected, "plain"
    return made, "compiled"


def _without_gradient(made: FakeQuant) -> FakeQuant:
    """`made` on plain tensors and without gradients: parameters, and passes that record, would each be
    compiled for once more.
    """

    def quantized(weight: Tensor, s: Tensor | None) -> Tensor:
        with torch.no_grad():
            return made(weight.detach(), None if s is None else s.detach())

    return quantized


def _in_one_pass(grid: Grid, weight: Tensor, s: Tensor | None) -> Tensor:
    """The definition itself, without the plain version's care for temporaries: the compiler fuses it."""
    scaled = weight.float() if s is None else weight * s
    columns = scaled.shape[1]
    size = columns if grid.group_size == -1 else min(grid.group_size, columns)
    whole = columns - columns % size
    done = []
    for part in (scaled[:, :whole].unflatten(1, (-1, size)), scaled[:, None, whole:]):
        if part.numel():
            scale, zero = (p[..., None] for p in qparams(part, grid))
            done.append(decode(encode(part, scale, zero, grid), scale, zero).flatten(1))
    return torch.cat(done, 1)
