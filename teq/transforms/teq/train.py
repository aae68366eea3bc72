"""The training loop of TEQ."""

import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from teq.console import track
from teq.device.memory import on_host
from teq.device.offload import place_around_blocks
from teq.device.runtime import DEFAULT_RUNTIME, Runtime
from teq.files.resume import ResumeFile
from teq.grid import Grid
from teq.models.arch import Arch, Site, blocks, sites
from teq.models.fold import check_equivalence
from teq.models.head import check_head
from teq.models.loss import backward, training_loss
from teq.stage import Diverged, NothingDone, OnStep
from teq.transforms.activations import outputs
from teq.transforms.teq.linear import fake_quantized

log = logging.getLogger(__name__)
SMALLEST = 1e-5  # neural-compressor's bound on s with parameter=clip
WARM_UP = 0.05  # share of the steps, profile inc
BETAS = (0.9, 0.9)  # the paper's section 3.2
Batches = Sequence[tuple[Tensor, Tensor | None]]  # tokens [batch, token], and what `training_loss` reads
MEASURED = 10  # times that scales are compared on held-out windows before the end


def initial(site: Site, init: str) -> Tensor:
    """Return the start of a site's scales `[width]`, fp32: ones, or `1 / sqrt(max |w| of each channel)`.

    The paper writes the second, `inv_sqrt`, as 1.0/sqrt(w_cin); a channel whose weights are all zero starts
    at 1.
    """
    if init != "inv_sqrt":
        return torch.ones(site.width, device=site.source.weight.device)
    largest = site.largest()
    return torch.where(largest > 0, largest, 1.0).rsqrt_()


def learning_rate(step: int, steps: int, lr: float, profile: str = "paper") -> float:
    """Return the rate of a step: linear decay, step k of n uses lr (1 - k/n).

    Profile `inc` rises linearly over the first 5 % of the steps.
    """
    warm_up = int(WARM_UP * steps) if profile == "inc" else 0
    if step < warm_up:
        return lr * step / warm_up
    return lr * (steps - step) / (steps - warm_up)


class Trainer:
    """The scales of all sites while they are trained, and one step of training.

    They start from `first`, by site. `rate` gives the learning rate of a step; `parameter` is `clip` (s
    itself, kept at 1e-5 or more) or `log`.
    """

    def __init__(
        self,
        first: Mapping[str, Tensor],
        device: torch.device | str,
        *,
        parameter: str,
        rate: Callable[[int], float],
    ) -> None:
        self.log = parameter == "log"
        here = {name: s.to(device, copy=True) for name, s in first.items()}
        self.free = {name: nn.Parameter(s.log() if self.log else s) for name, s in here.items()}
        scales = {"params": list(self.free.values()), "rate": rate}
        self.optimizer = torch.optim.Adam([scales], betas=BETAS, weight_decay=0)
        self.current: dict[str, Tensor] = {}  # the scales that the step in progress computes with

    def scale(self, name: str) -> Tensor:
        """Return the positive scales of a site `[width]`, as a function of what is trained."""
        return self.free[name].exp() if self.log else self.free[name].clamp(min=SMALLEST)

    def snapshot(self) -> dict[str, Tensor]:
        """Return a copy of all scales by site."""
        with torch.no_grad():
            return {name: self.scale(name).clone() for name in self.free}

    def refresh(self) -> None:
        """Compute with the present scales from now on."""
        self.current.update({name: self.scale(name) for name in self.free})

    def loss(self, model: nn.Module, tokens: Tensor, reference: Tensor | None = None) -> Tensor:
        """Return the loss of `tokens [batch, token]` under the present scales, inside `fake_quantized`.

        With a reference, the float model's `last_hidden` of the tokens, it is the divergence to that.
        """
        self.refresh()
        return training_loss(model, tokens, reference)

    def mean_loss(self, model: nn.Module, batches: Batches, scales: Mapping[str, Tensor]) -> float:
        """Return the mean loss of `batches` of one size under `scales`, inside `fake_quantized`.

        It is computed without dropout. No step may be in progress.
        """
        dropout = model.training
        model.eval()
        self.current.update(scales)
        with torch.no_grad():
            losses = [training_loss(model, *batch).item() for batch in batches]
        self.current.clear()
        model.train(dropout)
        return sum(losses) / len(losses)

    def move(self, loss: Tensor, step: int) -> None:
        """Run the backward pass and Adam's update at this step's learning rate."""
        backward(loss, self.free.values())
        self.current.clear()
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"](step)
        self.optimizer.step()
        self.optimizer.zero_grad()


def train(
    model: nn.Module,
    arch: Arch,
    windows: Tensor,
    trainer: Trainer,
    *,
    grid: Grid,
    steps: int,
    batch: int = 1,
    held_out: Tensor | None = None,
    divergence: bool = False,
    dropout: bool = False,
    seed: int = 0,
    runtime: Runtime = DEFAULT_RUNTIME,
    on_step: OnStep = lambda *_: None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train the scales of every site on `windows [steps * batch, token]`; the model is left as it was.

    With `runtime.partial` the state is saved there about once a minute and when the loop ends, whatever ends
    it, and training resumes from what is there. `runtime.strategy` (see `fake_quantized`) changes where
    memory goes, not the result; under `offload` the model is given in host memory, and its blocks stay there.
    The loss is the model's own, or with `divergence` that of the next token's distribution from the float
    model's, whose last hidden states of all windows are computed first and wait in host memory.

    Returns the last scales by site, with `start/<site>` and `best/<site>` (the step of the lowest loss), and
    the loss curve. With the windows `held_out [sample, token]` they are instead those of the lowest loss on
    these, out of the start, every tenth of the steps and the end, with `last/<site>` for the last. Raises
    Diverged on a loss that is not finite, NothingDone when a site never moved that is not inside an expert.
    """
    check_equivalence(model, arch)
    check_head(model, arch)
    if runtime.strategy == "offload":
        place_around_blocks(model, blocks(model, arch).values(), runtime.device)
    device = model.get_input_embeddings().weight.device

    def batches(of: Tensor, size: int) -> Batches:
        parts = of.split(size)
        if not divergence:
            return [(part, None) for part in parts]
        exact = outputs(model, arch, of, size, runtime.strategy, device)
        return list(zip(parts, exact.split(size), strict=True))

    trained_on, held_batches = batches(windows, batch), None if held_out is None else batches(held_out, 1)
    losses: list[float] = []
    start = best = trainer.snapshot()
    lowest, measure, held = math.inf, None, {}
    torch.manual_seed(seed)  # of dropout
    file = runtime.partial and runtime.partial / "training.safetensors"
    resume = ResumeFile(file, trainer.free, trainer.optimizer)
    if (found_state := resume.restore()) is not None:
        losses, best = found_state
        lowest = min(losses)
    model.train(dropout)
    try:
        scale, strategy = trainer.current.__getitem__, runtime.strategy
        with fake_quantized(model, arch, grid, scale, strategy) as quantize:
            if held_batches is not None:
                measure = functools.partial(trainer.mean_loss, model, held_batches)
                lowest = measure(best)
            for step in track(range(len(losses), steps), "training scales"):
                if measure and step and step % max(1, steps // MEASURED) == 0:
                    best, lowest = _better(trainer.snapshot(), measure, best, lowest)
                loss = trainer.loss(model, *trained_on[step])
                value = loss.item()
                if not math.isfinite(value):
                    raise _diverged(step, value, trainer.snapshot(), best)
                if not measure and value < lowest:
                    best, lowest = trainer.snapshot(), value
                trainer.move(loss, step)
                losses.append(value)
                resume.keep(losses, best)
                on_step(step, value)
            last = trainer.snapshot()
            if measure:
                best, lowest = _better(last, measure, best, lowest)
                held = {"windows": len(held_batches), "start": measure(start), "last": measure(last)}
                held["best"] = lowest
    finally:
        resume.write()
        model.eval()
    found, other = (best, {"last": last}) if held else (last, {"best": best})
    parts = {"start": start, **other}
    scales = on_host(
        found | {f"{part}/{name}": s for part, those in parts.items() for name, s in those.items()}
    )
    end = "last/" if held else ""
    still = [name for name in last if torch.equal(scales[f"{end}{name}"], scales[f"start/{name}"])]
    routed = {site.name for site in sites(model, arch) if site.routed}
    if steps and (idle := [name for name in still if name in routed]):
        log.warning(
            "the scales of %d of %d sites never moved: tokens do not reach all experts", len(idle), len(last)
        )
        still = [name for name in still if name not in routed]
    if steps and still:
        raise NothingDone(
            f"the scales of {still[0]} never moved in {steps} steps ({len(still)} of {len(last)} "
            "sites): the result would be plain rounding under another name; raise train.lr or train.steps"
        )
    info = {"loss": losses, "sites": list(last), "strategy": strategy, "fake_quant": quantize.name}
    if held:
        same = {p: all(torch.equal(scales[n], scales[f"{p}/{n}"]) for n in last) for p in ("start", "last")}
        held["kept"] = next((part for part, equal in same.items() if equal), "between")
        if steps and held["kept"] == "start":
            log.warning("no step lowered the loss on the held-out windows: the scales stay at their start")
        info["held_out"] = held
    return scales, info


def _better(
    scales: dict[str, Tensor],
    measure: Callable[[dict[str, Tensor]], float],
    best: dict[str, Tensor],
    lowest: float,
) -> tuple[dict[str, Tensor], float]:
    """Return the scales of the lower loss, and that loss."""
    loss = measure(scales)
    return (scales, loss) if loss < lowest else (best, lowest)


def _diverged(step: int, loss: float, now: dict[str, Tensor], best: dict[str, Tensor]) -> Diverged:
    broken = [name for name, s in now.items() if not torch.isfinite(s).all()]
    where = f"the scales of {broken[0]} are not finite" if broken else "all scales are still finite"
    return Diverged(
        f"training stopped: the loss is {loss} at step {step} ({where}); lower train.lr, or use "
        "dtype=float32",
        now | {f"best/{name}": s for name, s in best.items()},
    )
