"""Scaling, extremes, rounding and dequantizing of a weight in one pass, where a compiler makes that pass."""

import functools
import logging
from typing import Protocol

import torch
from torch import Tensor

from teq.files.disk import one_line
from teq.grid import Grid, decode, encode, fake_quant, grouped, qparams

log = logging.getLogger(__name__)
# the quotient w / scale decides codes: as in eager mode, not the faster approximation
EXACT = {"eager_numerics.division_rounding": True}
# one graph for each shape of weight, and as many as a model has: the compiler's usual limit is eight. With
# fullgraph it raises at a limit instead of running eagerly
EACH_SHAPE = {"dynamic": False, "fullgraph": True, "recompile_limit": 64, "isolate_recompiles": True}


class FakeQuant(Protocol):
    """`FakeQuant(W diag(s))` of a weight `[out, in]` and s `[in]` (or None) in fp32.

    `name` says how it is computed, "plain" or "compiled", up to the present.
    """

    name: str

    def __call__(self, weight: Tensor, s: Tensor | None) -> Tensor: ...


class Eager:
    """`FakeQuant` as eager operations."""

    name = "plain"

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    def __call__(self, weight: Tensor, s: Tensor | None) -> Tensor:
        return fake_quant(weight.float() if s is None else weight * s, self.grid)


class Compiled:
    """`FakeQuant` as one compiled pass, and as eager operations once the compiler has refused a call."""

    name = "compiled"

    def __init__(self, grid: Grid) -> None:
        self.eager = Eager(grid)
        self.made = torch.compile(functools.partial(_in_one_pass, grid), options=EXACT, **EACH_SHAPE)

    def __call__(self, weight: Tensor, s: Tensor | None) -> Tensor:
        if self.name == "compiled":
            from torch._dynamo import exc  # seconds to import, and not needed on a CPU

            try:
                # parameters, and passes that record, would each be compiled for once more
                with torch.no_grad():
                    return self.made(weight.detach(), None if s is None else s.detach())
            except (exc.TorchDynamoException, exc.FailOnRecompileLimitHit) as error:
                self.give_up(
                    f"the fake quantization is no longer compiled: {one_line(error.__cause__ or error)}"
                )
        return self.eager(weight, s)

    def give_up(self, why: str) -> None:
        """Compute plainly from now on."""
        log.info("%s", why)
        self.name = "plain"


def select_fake_quant(grid: Grid, device: torch.device, dtype: torch.dtype) -> FakeQuant:
    """Return the compiled pass where it helps and gives the same numbers, else the eager one.

    It helps on a GPU, where every pass over a weight is a trip to memory and every operator a launch. On a
    CPU a step is bound by its matrix products, and compiling takes longer than is saved (see
    benchmarks/NOTES.md).
    """
    return compiled(grid, device, dtype) if device.type == "cuda" else Eager(grid)


@functools.cache
def compiled(grid: Grid, device: torch.device, dtype: torch.dtype) -> FakeQuant:
    """Return the compiled pass for weights of `dtype`, one per process and arguments.

    A second training compiles nothing again. It is the eager one, with a log line, when compiling fails or a
    bit differs.
    """
    from torch._dynamo.utils import counters

    expected = Eager(grid)
    generator = torch.Generator(device).manual_seed(0)
    size = 64 if grid.group_size == -1 else 3 * grid.group_size + 1  # with a shorter last group
    weight = torch.randn(96, size, device=device, generator=generator)
    weight[0] = 0  # a group without extremes
    weight = weight.to(dtype)
    s = torch.rand(size, device=device, generator=generator) + 0.5
    graphs = counters["stats"]["unique_graphs"]
    try:
        made = Compiled(grid)
        same = all(torch.equal(made(weight, scale), expected(weight, scale)) for scale in (None, s))
    except Exception as error:  # whatever a compiler may raise: no compiler, no driver, an unsupported device
        log.info("the fake quantization is not compiled: %s", one_line(error.__cause__ or error))
        return expected
    if not same:
        made.give_up("the compiled fake quantization differs from the plain one: it is not used")
    elif counters["stats"]["unique_graphs"] == graphs:
        made.give_up("the fake quantization is not compiled: the compiler is switched off")
    return made


def _in_one_pass(grid: Grid, weight: Tensor, s: Tensor | None) -> Tensor:
    """Compute the definition itself, without the eager version's in-place passes: the compiler fuses it."""
    done = []
    for part in grouped(weight.float() if s is None else weight * s, grid):
        scale, zero = (p[..., None] for p in qparams(part, grid))
        done.append(decode(encode(part, scale, zero, grid), scale, zero).flatten(1))
    return torch.cat(done, 1)
