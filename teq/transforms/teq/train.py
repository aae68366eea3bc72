"""The training loop of TEQ and the linear layer it trains through."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from teq.console import track
from teq.device.offload import Stream, place_around_blocks
from teq.files.resume import ResumeFile
from teq.grid import Grid
from teq.models import arch as architecture
from teq.models.arch import Arch, Site
from teq.spec import Runtime
from teq.stage import Diverged, NothingDone, OnStep, on_host
from teq.transforms.teq.fake_quant import FakeQuant, chosen
from teq.transforms.teq.loss import causal_loss, check_head

if TYPE_CHECKING:
    from teq.transforms.teq.settings import Teq

PLAINLY = Runtime()
SMALLEST = 1e-5  # neural-compressor's bound on s with parameter=clip
WARM_UP = 0.05  # share of the steps, profile inc
BETAS = (0.9, 0.9)  # the paper's section 3.2


class ScaledFakeQuantLinears(torch.autograd.Function):
    """`y_t = linear(x / s, FakeQuant(W_t diag(s)))` for the linears t that read one input, with a
    straight-through gradient to `x` and `s` in closed form.

    With `xs = x / s`, `Ws = W diag(s)`, `Wq = FakeQuant(Ws)`: `dX = (sum over t of dY Wq) / s` and `ds =
    (1/s) * sum over tokens of xs * (sum over t of dY (Ws - Wq))`. Equal to autograd through
    neural-compressor's TEQLinearFakeQuant, but `Wq` is made again in the backward pass, so nothing of a
    weight's size is kept between the passes and no gradient of that size is made.
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
        """x `[..., in]`; s `[in]` fp32, None for linears that are no site's targets; weights `[out, in]`."""
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
        """dys `[..., out]` -> dx `[..., in]`, ds `[in]`."""
        saved = ctx.saved_tensors  # asked for once: under checkpointing that is all one may
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


class Trainer:
    """The scales of all sites while they are trained, and one step of training."""

    def __init__(self, settings: "Teq", found: list[Site], device: torch.device) -> None:
        self.settings, self.log = settings, settings.parameter == "log"
        first = {site.name: initial(site, settings.init).to(device) for site in found}
        self.free = {name: nn.Parameter(s.log() if self.log else s) for name, s in first.items()}
        self.optimizer = torch.optim.Adam(self.free.values(), lr=settings.lr, betas=BETAS, weight_decay=0)
        self.current: dict[str, Tensor] = {}  # the scales that the step in progress computes with

    def scale(self, name: str) -> Tensor:
        """The positive scales of a site `[in]`, as a function of what is trained."""
        return self.free[name].exp() if self.log else self.free[name].clamp(min=SMALLEST)

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of all scales by site."""
        with torch.no_grad():
            return {name: self.scale(name).clone() for name in self.free}

    def loss(self, model: nn.Module, tokens: Tensor) -> Tensor:
        """The loss of `tokens [batch, token]` under the present scales, inside `through`."""
        self.current.update({name: self.scale(name) for name in self.free})
        return causal_loss(model, tokens)

    def move(self, loss: Tensor, step: int) -> None:
        """Backward, and Adam's update at this step's learning rate."""
        loss.backward()
        self.current.clear()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, step)
        self.optimizer.step()
        self.optimizer.zero_grad()


def train(
    settings: "Teq",
    model: nn.Module,
    arch: Arch,
    windows: Tensor,
    on_step: OnStep,
    runtime: Runtime = PLAINLY,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train the scales of every site on `windows [steps * batch, token]`; the model is left as it was.

    With `runtime.partial` the state is saved there about once a minute and when the loop ends, whatever ends
    it, and training goes on from what is there. `runtime.strategy` (see `through`) changes where memory goes,
    not the result; under `offload` the model is given in the host's memory, and its blocks stay there.

    Returns the last scales by site, with `start/<site>` and `best/<site>` (the step of the lowest loss)
    beside them, and the loss curve. Raises Diverged on a loss that is not finite, NothingDone when a site
    never moved.
    """
    architecture.check_equivalence(model, arch)
    check_head(model)
    found = architecture.sites(model, arch)
    if runtime.strategy == "offload":
        place_around_blocks(model, arch, runtime.device)
    device = model.get_input_embeddings().weight.device
    trainer = Trainer(settings, found, device)
    losses: list[float] = []
    start = best = trainer.snapshot()
    lowest = float("inf")
    torch.manual_seed(settings.calib.seed)  # dropout of profile inc
    file = runtime.partial and runtime.partial / "training.safetensors"
    resume = ResumeFile(file, trainer.free, trainer.optimizer)
    if (found_state := resume.restore()) is not None:
        losses, best = found_state
        lowest = min(losses)
    model.train(settings.profile == "inc")
    try:
        scale, strategy = trainer.current.__getitem__, runtime.strategy
        with through(model, arch, found, settings.grid, scale, strategy) as quantize:
            for step in track(range(len(losses), settings.steps), "training scales"):
                tokens = windows[step * settings.batch : (step + 1) * settings.batch]
                loss = trainer.loss(model, tokens.to(device))
                value = loss.item()
                if not math.isfinite(value):
                    raise _diverged(step, value, trainer.snapshot(), best)
                if value < lowest:
                    best, lowest = trainer.snapshot(), value
                trainer.move(loss, step)
                losses.append(value)
                resume.keep(losses, best)
                on_step(step, value)
    finally:
        resume.write()
        model.eval()
    last = trainer.snapshot()
    kept = {f"start/{name}": s for name, s in start.items()} | {f"best/{name}": s for name, s in best.items()}
    scales = on_host(last | kept)
    still = [name for name in last if torch.equal(scales[name], scales[f"start/{name}"])]
    if settings.steps and still:
        raise NothingDone(
            f"the scales of {still[0]} never moved in {settings.steps} steps ({len(still)} of {len(last)} "
            "sites): the result would be plain rounding under another name; raise train.lr or train.steps"
        )
    info = {"loss": losses, "sites": list(last), "strategy": strategy, "fake_quant": quantize.name}
    return scales, info


def _diverged(step: int, loss: float, now: dict[str, Tensor], best: dict[str, Tensor]) -> Diverged:
    broken = [name for name, s in now.items() if not torch.isfinite(s).all()]
    where = f"the scales of {broken[0]} are not finite" if broken else "all scales are still finite"
    return Diverged(
        f"training stopped: the loss is {loss} at step {step} ({where}); lower train.lr, or use "
        "dtype=float32",
        now | {f"best/{name}": s for name, s in best.items()},
    )


@contextlib.contextmanager
def through(
    model: nn.Module,
    arch: Arch,
    found: list[Site],
    grid: Grid,
    scale: Callable[[str], Tensor],
    strategy: str,
) -> Iterator[FakeQuant]:
    """Within: every linear of every block computes with its fake-quantized weight, targets with their
    site's scale. Gives what they are rounded by, whose `name` a record holds.

    What the backward pass of a block needs is kept (strategy `keep`) or computed again from the block's input
    (`checkpoint`); with `offload` the block's weights are copied to the device for that as well.
    """
    found_blocks = architecture.blocks(model, arch)
    replaced: list[nn.Module] = []
    device = model.get_input_embeddings().weight.device
    quantize = chosen(grid, device, model.dtype)
    stream = Stream(list(found_blocks.values()), device) if strategy == "offload" else None
    together = [_Together(site.targets, quantize, functools.partial(scale, site.name)) for site in found]
    readers = {target: group for group in together for target in group.linears}
    try:
        for index, (block_name, block) in enumerate(found_blocks.items()):
            for name, linear in architecture.linears(block_name, block).items():
                group = readers.get(name) or _Together({name: linear}, quantize, lambda: None)
                linear.forward = functools.partial(group.output, name)
                replaced.append(linear)
            if strategy != "keep":
                inner = block.forward if stream is None else functools.partial(stream.run, index)
                block.forward = functools.partial(checkpoint, inner, use_reentrant=False)
                replaced.append(block)
        yield quantize
    finally:
        for module in replaced:
            del module.forward


class _Together:
    """Linears that read one input: all are computed when the first of them is given it."""

    def __init__(
        self, linears: Mapping[str, nn.Linear], quantize: FakeQuant, scale: Callable[[], Tensor | None]
    ) -> None:
        self.linears, self.quantize, self.scale = linears, quantize, scale
        self.input: Tensor | None = None
        self.waiting: dict[str, Tensor] = {}

    def output(self, name: str, x: Tensor) -> Tensor:
        """The output of the linear `name` for x `[..., in]`."""
        if self.input is not x or name not in self.waiting:
            weights = [linear.weight for linear in self.linears.values()]
            biases = tuple(linear.bias for linear in self.linears.values())
            outputs = ScaledFakeQuantLinears.apply(x, self.scale(), self.quantize, biases, *weights)
            self.input, self.waiting = x, dict(zip(self.linears, outputs, strict=True))
        output = self.waiting.pop(name)
        if not self.waiting:
            self.input = None  # nothing of a step outlives it
        return output
