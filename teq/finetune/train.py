"""The training of scales and norms of a quantized model."""

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from teq.console import track
from teq.device.offload import place_around_blocks
from teq.device.runtime import DEFAULT_RUNTIME, Runtime
from teq.files.resume import ResumeFile
from teq.finetune.tuned import PARAM, Tuned
from teq.grid import Grid
from teq.models.arch import Arch, blocks
from teq.models.head import check_head
from teq.quantizers.quantized import Quantized, linear_from
from teq.stage import Diverged, NothingDone, OnStep
from teq.transforms.activations import outputs

log = logging.getLogger(__name__)
PARTS = ("codes", "scale", "zero", "g_idx")  # of a stored linear
HELD_OUT = 11  # one window in so many is held out


def finetune(
    model: nn.Module,
    arch: Arch,
    weights: Mapping[str, Tensor],
    windows: Tensor,
    *,
    grid: Grid,
    norms: bool,
    steps: int,
    lr: float,
    batch: int,
    divergence: bool,
    runtime: Runtime = DEFAULT_RUNTIME,
    on_step: OnStep = lambda *_: None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train the scales (and norms) of a quantizer's stored `weights` on `windows [window, token]`.

    `model` is the floating-point model, which is used up. Step k uses the learning rate lr (1 - k/n). The
    first windows, one in `HELD_OUT` of them, are held out: where the loss on them is not lower after the
    training, the weights are returned as they were. With `runtime.partial` the training resumes from the
    state that is there; `runtime.strategy` changes where memory goes, not the result: under `stream` the
    blocks are lazy, and codes and zeros stay where `weights` has them.

    Returns the stored tensors and the loss curve. Raises Diverged on a loss that is not finite, NothingDone
    when nothing moved.
    """
    check_head(model, arch)
    strategy, device = runtime.strategy, model.get_input_embeddings().weight.device
    codes_on = device
    if strategy == "offload":
        place_around_blocks(model, blocks(model, arch).values(), runtime.device)
        device = torch.device(runtime.device)
    exact = outputs(model, arch, windows, batch, strategy, device) if divergence else None
    params = {name.removeprefix(PARAM): t for name, t in weights.items() if name.startswith(PARAM)}

    def read(name: str, linear: nn.Linear) -> Quantized:
        if strategy == "stream":  # packed as they are, mapped from a file
            return Quantized(*(weights.get(f"{name}/{part}") for part in PARTS))
        parts = [f"{name}/{part}" for part in PARTS]
        found = {part: weights[part].to(codes_on) for part in parts if part in weights}
        return linear_from(found, name, grid, tuple(linear.weight.shape))

    tuned = Tuned(model, arch, params, read, grid=grid, norms=norms, device=device)
    held = max(2, len(windows) // HELD_OUT)
    rows = torch.arange(steps * batch) % (len(windows) - held) + held

    def loss(chosen: Tensor) -> Tensor:
        return tuned.loss(windows[chosen], None if exact is None else exact[chosen])

    @torch.no_grad()
    def held_out() -> float:
        tuned.refresh()
        parts = torch.arange(held).split(batch)
        return math.fsum(loss(part).item() * len(part) for part in parts) / held

    losses: list[float] = []
    with tuned.running(strategy):
        before = held_out()
        file = runtime.partial and runtime.partial / "tuning.safetensors"
        resume = ResumeFile(file, tuned.free, tuned.optimizer)
        if (state := resume.restore()) is not None:
            losses = state[0]
        try:
            for step in track(range(len(losses), steps), "tuning scales"):
                tuned.refresh()
                now = loss(rows[step * batch : (step + 1) * batch])
                value = now.item()
                if not math.isfinite(value):
                    raise Diverged(
                        f"tuning stopped: the loss is {value} at step {step}; lower tune.lr, or use "
                        "dtype=float32",
                        tuned.tensors(),
                    )
                tuned.move(now, lr * (steps - step) / steps)
                losses.append(value)
                resume.keep(losses)
                on_step(step, value)
        finally:
            resume.write()
        after = held_out()
    if steps and not any(free.any() for free in tuned.free.values()):
        raise NothingDone(f"no scale moved in {steps} steps of tuning: raise tune.lr or tune.steps")
    kept = after < before
    if not kept:
        log.warning("tuning is left out: the loss on held-out text was %.6g, then %.6g", before, after)
    info = {
        "loss": losses,
        "held_out": {"windows": held, "before": _number(before), "after": _number(after)},
        "kept": kept,
        "tokens": len(rows) * windows.shape[1],
        "strategy": strategy,
    }
    return {**weights, **(tuned.tensors() if kept else {})}, info


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def dry_run(
    model: nn.Module,
    arch: Arch,
    tokens: Tensor,
    *,
    grid: Grid,
    norms: bool,
    divergence: bool,
    strategy: str,
) -> None:
    """Do two steps of `finetune` on `tokens [batch, token]`, and for each a pass of the model as it is."""
    device = tokens.device
    exact = [
        outputs(model, arch, tokens, len(tokens), strategy, device) if divergence else None for _ in range(2)
    ]

    def read(_: str, linear: nn.Linear) -> Quantized:
        rows, columns = linear.weight.shape
        groups = torch.ones(rows, grid.group_count(columns), device=device)
        if strategy == "stream":  # codes and zeros of a mapped file: no memory until they are used
            mapped = torch.zeros(1, dtype=torch.uint8, device=device)
            packed = mapped.expand(-(-rows * columns * grid.bits // 8))
            return Quantized(packed, groups, mapped.expand_as(groups))
        if strategy == "offload":  # bytes that are there already, where the weights wait
            codes = linear.weight.data.view(torch.uint8)[:, :columns]
        else:
            codes = torch.zeros(rows, columns, dtype=torch.uint8, device=device)
        return Quantized(codes, groups, groups.clone())

    tuned = Tuned(model, arch, {}, read, grid=grid, norms=norms, device=device)
    resume, copies = ResumeFile(None, tuned.free, tuned.optimizer), {}
    with tuned.running(strategy):
        for reference in exact:
            tuned.refresh()
            tuned.move(tuned.loss(tokens, reference), 0.0)
            copies = resume.copied()  # while the step's before are there
    del copies
