"""A plain port of the official GPTQ code (IST-DASLab/gptq: gptq.py, quant.py and its drivers), and the floor.

The port follows the official code step by step: one Hessian and one Cholesky for each linear, kept as a
running mean; the column loop runs over each linear alone; the block's outputs are computed once more after
quantizing. It shares nothing with teq/quantizers but the catching of the first block's inputs.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders import measuring
from teq.models import arch
from teq.models.blocks import first_inputs, run_block
from teq.models.checkpoint import LM
from teq.quantizers.gptq.settings import Gptq


class Clock:
    """Seconds by part of the work."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.spent: dict[str, float] = defaultdict(float)

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, its time charged to `part`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            measuring.synchronize(self.device)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                measuring.synchronize(self.device)
                self.spent[part] += time.perf_counter() - start

        return call


def port_grid(block: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Scale and zero `[out, 1]` of one group `[out, group]`, asymmetric."""
    nothing = block.new_zeros(block.shape[0])
    low, high = torch.minimum(block.min(1)[0], nothing), torch.maximum(block.max(1)[0], nothing)
    flat = (low == 0) & (high == 0)
    low[flat], high[flat] = -1, 1
    scale = (high - low) / levels
    return scale[:, None], torch.round(-low / scale)[:, None]


def port_solve(weight: Tensor, hessian: Tensor, settings: Gptq) -> Tensor:
    """The official column loop for one linear: dequantized weight `[out, in]`, fp32."""
    weight, hessian, levels = weight.float().clone(), hessian.clone(), settings.grid.levels
    columns = weight.shape[1]
    size = settings.grid.width(columns)
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    weight[:, dead] = 0
    hessian.diagonal().add_(settings.damping * hessian.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    done, losses = torch.zeros_like(weight), torch.zeros_like(weight)
    for start in range(0, columns, settings.block_size):
        stop = min(start + settings.block_size, columns)
        block = weight[:, start:stop].clone()
        rounded, errors, lost = (torch.zeros_like(block) for _ in range(3))
        factor = inverse[start:stop, start:stop]
        for i in range(stop - start):
            column, diagonal = block[:, i], factor[i, i]
            if (start + i) % size == 0:
                scale, zero = port_grid(weight[:, start + i : start + i + size], levels)
            codes = torch.clamp(torch.round(column[:, None] / scale) + zero, 0, levels)
            quantized = (scale * (codes - zero)).flatten()
            rounded[:, i] = quantized
            lost[:, i] = (column - quantized) ** 2 / diagonal**2
            error = (column - quantized) / diagonal
            block[:, i:] -= error[:, None].matmul(factor[i, i:][None])
            errors[:, i] = error
        done[:, start:stop], losses[:, start:stop] = rounded, lost / 2
        weight[:, stop:] -= errors.matmul(inverse[start:stop, stop:])
    losses.sum().item()  # the official code prints it
    return done


@torch.no_grad()
def port(lm: LM, settings: Gptq, windows: Tensor, clock: Clock) -> float:
    """Quantize the model in place; returns the first block's error tr(E H E^T)."""
    hidden, keywords = first_inputs(lm.model, lm.arch, windows)
    solve, run = clock.timed("quantizing", port_solve), run_block
    first = 0.0
    for index, (name, block) in enumerate(arch.blocks(lm.model, lm.arch).items()):
        inside, kwargs = arch.linears(name, block), keywords[index]
        hessians = {k: torch.zeros(m.in_features, m.in_features, device=lm.device) for k, m in inside.items()}
        seen = dict.fromkeys(inside, 0)

        def add(key: str, inputs: Tensor, hessians: dict = hessians, seen: dict = seen) -> None:
            flat = inputs.reshape(-1, inputs.shape[-1]).t()
            hessians[key] *= seen[key] / (seen[key] + 1)
            seen[key] += 1
            flat = math.sqrt(2 / seen[key]) * flat.float()
            hessians[key] += flat.matmul(flat.t())

        hooks = [
            m.register_forward_hook(lambda _, a, __, k=key, f=add: f(k, a[0])) for key, m in inside.items()
        ]
        for sample in hidden:
            clock.timed("measuring", run)(block, sample, kwargs)
        for hook in hooks:
            hook.remove()
        for key, linear in inside.items():
            done = solve(linear.weight, hessians[key], settings)
            lost = done - linear.weight
            first += float(((lost @ hessians[key]) * lost).sum()) if index == 0 else 0.0
            linear.weight.copy_(done)
        for i, sample in enumerate(hidden):
            hidden[i] = run(block, sample, kwargs)
    return first


@torch.no_grad()
def floor(lm: LM, settings: Gptq, windows: Tensor, clock: Clock) -> float:
    """Do the work that no GPTQ can avoid; nothing is quantized.

    Every block runs twice on every sample, with one product `X^T X` in fp32 for each distinct input.
    """
    hidden, keywords = first_inputs(lm.model, lm.arch, windows)
    hessians: dict[int, Tensor] = {}
    given: list[Tensor] = []

    def note(_: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        if any(tensor is args[0] for tensor in given):
            return
        flat = args[0].reshape(-1, args[0].shape[-1]).float()
        hessian = hessians.setdefault(len(given), flat.new_zeros(flat.shape[1], flat.shape[1]))
        hessian.addmm_(flat.t(), flat)
        given.append(args[0])

    for kwargs, (name, block) in zip(keywords, arch.blocks(lm.model, lm.arch).items(), strict=True):
        hooks = [m.register_forward_pre_hook(note) for m in arch.linears(name, block).values()]
        for sample in hidden:
            given.clear()
            clock.timed("measuring", run_block)(block, sample, kwargs)
        for hook in hooks:
            hook.remove()
        hessians.clear()
        hidden = [run_block(block, sample, kwargs) for sample in hidden]
    return 0.0
