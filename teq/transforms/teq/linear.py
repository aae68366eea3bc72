"""The linears that TEQ trains through: fake-quantized weights with a straight-through gradient."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, autograd, nn
from torch.nn import functional

from teq.device.offload import saving
from teq.grid import Grid
from teq.models.arch import Arch, Site, blocks, linears, sites
from teq.models.blocks import forwards
from teq.transforms.teq.fake_quant import FakeQuant, select_fake_quant


class ScaledFakeQuantLinears(autograd.Function):
    """`y_t = linear(x / s, FakeQuant(W_t diag(s)))` for the linears t that read one input.

    The gradient to `x` and `s` is straight-through and in closed form.

    With `xs = x / s`, `Ws = W diag(s)`, `Wq = FakeQuant(Ws)`: `dX = (sum over t of dY Wq) / s` and `ds =
    (1/s) * sum over tokens of xs * (sum over t of dY (Ws - Wq))`. Equal to autograd through
    neural-compressor's TEQLinearFakeQuant, but `Wq` is recomputed in the backward pass, so no
    weight-sized tensor is stored between the passes and no gradient of that size is made.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        s: Tensor | None,
        quantize: FakeQuant,
        biases: tuple[Tensor | None, ...],
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        """Compute from x `[..., in]`, s `[in]` fp32 (None: no site's targets) and weights `[out, in]`."""
        ctx.quantize, ctx.shape = quantize, x.shape
        ctx.save_for_backward(*weights, *([] if s is None else [x, s]))
        ctx.count = len(weights)
        scaled = x if s is None else (x / s).to(x.dtype)
        return tuple(
            functional.linear(scaled, quantize(weight, s).to(x.dtype), bias)
            for weight, bias in zip(weights, biases, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        """Return dx `[..., in]` and ds `[in]` for dys `[..., out]`."""
        saved = ctx.saved_tensors  # unpack once: with checkpointing they may be read only once
        weights, (x, s) = saved[: ctx.count], saved[ctx.count :] or (None, None)
        dx = lost = None  # [token, in]
        for weight, dy in zip(weights, dys, strict=True):
            flat, quantized = dy.flatten(0, -2), ctx.quantize(weight, s)
            dx = _plus_product(dx, flat, quantized)
            if s is not None:
                lost = _plus_product(lost, flat, (weight * s).sub_(quantized))
        dx, ds = dx.view(ctx.shape), None
        if s is not None:
            ds = (x / s).mul_(lost.view(ctx.shape)).flatten(0, -2).sum(0).div_(s)
            dx = (dx / s).to(dys[0].dtype)
        return dx, ds, None, None, *(None for _ in weights)


def _plus_product(total: Tensor | None, dy: Tensor, weight: Tensor) -> Tensor:
    weight = weight.to(dy.dtype)
    return dy @ weight if total is None else total.addmm_(dy, weight)


@contextlib.contextmanager
def fake_quantized(
    model: nn.Module, arch: Arch, grid: Grid, scale: Callable[[str], Tensor], strategy: str
) -> Iterator[FakeQuant]:
    """Context manager: all block linears use fake-quantized weights, targets also their site's scale.

    A source's rows are not divided: that changes no code of theirs, and the targets divide their input.

    Yields the function that rounds, whose `name` a record holds. The `strategy` is that of
    `teq.device.offload.saving`.
    """
    found_blocks = blocks(model, arch)
    device = model.get_input_embeddings().weight.device
    quantize = select_fake_quant(grid, device, model.dtype)
    shared = [
        SharedInputLinears(group, quantize, functools.partial(_over_inputs, site, scale))
        for site in sites(model, arch)
        for group in site.groups
    ]
    readers = {target: group for group in shared for target in group.linears}
    instead = {}
    for block_name, block in found_blocks.items():
        for name, linear in linears(block_name, block).items():
            group = readers.get(name) or SharedInputLinears({name: linear}, quantize, lambda: None)
            instead[linear] = functools.partial(group.output, name)
    with forwards(instead), saving(found_blocks.values(), strategy, device):
        yield quantize


def _over_inputs(site: Site, scale: Callable[[str], Tensor]) -> Tensor:
    return site.over_inputs(scale(site.name))


class SharedInputLinears:
    """Linears that read one input: all are computed when the first of them is called."""

    def __init__(
        self, linears: Mapping[str, nn.Linear], quantize: FakeQuant, scale: Callable[[], Tensor | None]
    ) -> None:
        self.linears, self.quantize, self.scale = linears, quantize, scale
        self.input: Tensor | None = None
        self.waiting: dict[str, Tensor] = {}

    def output(self, name: str, x: Tensor) -> Tensor:
        """Return the output of the linear `name` for x `[..., in]`."""
        if self.input is not x or name not in self.waiting:
            weights = [linear.weight for linear in self.linears.values()]
            biases = tuple(linear.bias for linear in self.linears.values())
            outputs = ScaledFakeQuantLinears.apply(x, self.scale(), self.quantize, biases, *weights)
            self.input, self.waiting = x, dict(zip(self.linears, outputs, strict=True))
        output = self.waiting.pop(name)
        if not self.waiting:
            self.input = None  # release the activations of this step
        return output
