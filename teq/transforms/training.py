"""The training loop of TEQ and the linear layer it trains through."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from teq import arch as architecture
from teq.arch import Arch, Site
from teq.grid import Grid, fake_quant
from teq.progress import track
from teq.transforms import Diverged, NothingDone, OnStep
from teq.transforms.loss import causal_loss, check_head
from teq.transforms.partial import Partial

if TYPE_CHECKING:
    from teq.transforms.teq import Teq

SMALLEST = 1e-5  # neural-compressor's bound on s with parameter=clip
WARM_UP = 0.05  # share of the steps, profile inc
BETAS = (0.9, 0.9)  # the paper's section 3.2


class ScaledFakeQuantLinear(torch.autograd.Function):
    """`y = linear(x / s, FakeQuant(W diag(s)))` with a straight-through gradient to `x` and `s` in closed
    form.

    With `xs = x / s`, `Ws = W diag(s)`, `Wq = FakeQuant(Ws)`: `dX = (dY Wq) / s` and `ds = (1/s) * sum over
    tokens of xs * (dY (Ws - Wq))`. Equal to autograd through neural-compressor's TEQLinearFakeQuant, but `Wq`
    is made again in the backward pass, so nothing of the weight's size is kept between the passes and no
    gradient of that size is made.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, s: Tensor | None, weight: Tensor, bias: Tensor | None, grid: Grid
    ) -> Tensor:
        """x `[..., in]`; s `[in]` fp32, or None for a linear that is no site's target; weight `[out, in]`."""
        ctx.grid = grid
        if s is None:
            ctx.save_for_backward(weight)
            return functional.linear(x, fake_quant(weight.float(), grid).to(x.dtype), bias)
        ctx.save_for_backward(weight, x, s)
        return functional.linear((x / s).to(x.dtype), fake_quant(weight * s, grid).to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        """dy `[..., out]` -> dx `[..., in]`, ds `[in]`."""
        weight, *rest = ctx.saved_tensors  # asked for once: under checkpointing that is all one may
        if not rest:
            return dy @ fake_quant(weight.float(), ctx.grid).to(dy.dtype), None, None, None, None
        x, s = rest
        scaled = weight * s  # [out, in]
        quantized = fake_quant(scaled, ctx.grid)
        dx = (dy @ quantized.to(dy.dtype)) / s  # [..., in]
        lost = dy @ scaled.sub_(quantized).to(dy.dtype)  # [..., in]
        ds = (x / s).mul_(lost).flatten(0, -2).sum(0).div_(s)
        return dx.to(dy.dtype), ds, None, None, None


def initial(site: Site, init: str) -> Tensor:
    """Start of a site's scales `[in]`, fp32: ones, or `1 / sqrt(max abs of the site's weights per input
    channel)`.

    The paper writes the second as 1.0/sqrt(w_cin); a channel whose weights are all zero starts at 1.
    """
    largest = site.largest()
    if init == "ones":
        return torch.ones_like(largest)
    return torch.where(largest > 0, largest, 1.0).rsqrt_()


def learning_rate(settings: "Teq", step: int) -> float:
    """Linear decay: step k of n uses lr (1 - k/n); profile `inc` rises linearly over the first 5 %
    instead.
    """
    warm_up = int(WARM_UP * settings.steps) if settings.profile == "inc" else 0
    if step < warm_up:
        return settings.lr * step / warm_up
    return settings.lr * (settings.steps - step) / (settings.steps - warm_up)


def train(
    settings: "Teq",
    model: nn.Module,
    arch: Arch,
    windows: Tensor,
    on_step: OnStep,
    checkpointing: bool = False,
    partial: Path | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train the scales of every site on `windows [steps * batch, token]`; the model is left as it was.

    With `partial` the state is saved there about once a minute, and training goes on from what is there.

    Returns the last scales by site, with `start/<site>` and `best/<site>` (the step of the lowest loss)
    beside them, and the loss curve. Raises Diverged on a loss that is not finite, NothingDone when a site
    never moved.
    """
    architecture.check_equivalence(model, arch)
    check_head(model)
    found = architecture.sites(model, arch)
    log = settings.parameter == "log"
    first = {site.name: initial(site, settings.init) for site in found}
    free = {name: nn.Parameter(s.log() if log else s) for name, s in first.items()}

    def scale(name: str) -> Tensor:
        return free[name].exp() if log else free[name].clamp(min=SMALLEST)

    def snapshot() -> dict[str, Tensor]:
        with torch.no_grad():
            return {name: scale(name).clone() for name in free}

    optimizer = torch.optim.Adam(free.values(), lr=settings.lr, betas=BETAS, weight_decay=0)
    losses: list[float] = []
    start = best = snapshot()
    lowest = float("inf")
    current: dict[str, Tensor] = {}
    device = model.get_input_embeddings().weight.device
    torch.manual_seed(settings.calib.seed)  # dropout of profile inc
    unfinished = Partial(partial, free, optimizer)
    if (found_state := unfinished.restore()) is not None:
        losses, best = found_state
        lowest = min(losses)
    model.train(settings.profile == "inc")
    try:
        with _through(model, arch, found, settings.grid, current.__getitem__, checkpointing):
            for step in track(range(len(losses), settings.steps), "training scales"):
                current.update({name: scale(name) for name in free})
                tokens = windows[step * settings.batch : (step + 1) * settings.batch].to(device)
                loss = causal_loss(model, tokens)
                losses.append(loss.item())
                if not torch.isfinite(loss):
                    raise _diverged(step, losses[-1], snapshot(), best)
                if losses[-1] < lowest:
                    best, lowest = snapshot(), losses[-1]
                loss.backward()
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(settings, step)
                optimizer.step()
                optimizer.zero_grad()
                unfinished.save(losses, best)
                on_step(step, losses[-1])
    finally:
        model.eval()
    unfinished.done()
    last = snapshot()
    still = [name for name, s in last.items() if torch.equal(s, start[name])]
    if settings.steps and still:
        raise NothingDone(
            f"the scales of {still[0]} never moved in {settings.steps} steps ({len(still)} of {len(last)} "
            "sites): the result would be plain rounding under another name; raise train.lr or train.steps"
        )
    kept = {f"start/{name}": s for name, s in start.items()} | {f"best/{name}": s for name, s in best.items()}
    return last | kept, {"loss": losses, "sites": list(last)}


def _diverged(step: int, loss: float, now: dict[str, Tensor], best: dict[str, Tensor]) -> Diverged:
    broken = [name for name, s in now.items() if not torch.isfinite(s).all()]
    where = f"the scales of {broken[0]} are not finite" if broken else "all scales are still finite"
    return Diverged(
        f"training stopped: the loss is {loss} at step {step} ({where}); lower train.lr, or use "
        "dtype=float32",
        now | {f"best/{name}": s for name, s in best.items()},
    )


@contextlib.contextmanager
def _through(
    model: nn.Module,
    arch: Arch,
    found: list[Site],
    grid: Grid,
    scale: Callable[[str], Tensor],
    checkpointing: bool,
) -> Iterator[None]:
    """Within: every linear of every block computes with its fake-quantized weight, targets with their
    site's scale.
    """
    site_of = {target: site.name for site in found for target in site.targets}
    replaced: list[nn.Module] = []
    try:
        for block_name, block in architecture.blocks(model, arch).items():
            for name, linear in architecture.linears(block_name, block).items():
                linear.forward = functools.partial(_forward, linear, grid, scale, site_of.get(name))
                replaced.append(linear)
            if checkpointing:
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
                replaced.append(block)
        yield
    finally:
        for module in replaced:
            del module.forward


def _forward(
    linear: nn.Linear, grid: Grid, scale: Callable[[str], Tensor], site: str | None, x: Tensor
) -> Tensor:
    s = None if site is None else scale(site)
    return ScaledFakeQuantLinear.apply(x, s, linear.weight, linear.bias, grid)
