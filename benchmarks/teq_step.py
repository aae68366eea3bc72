"""One TEQ training step, ours against plain autograd and against the floor, side by side.

    python benchmarks/teq_step.py [--tokens 512] [--repeats 7] [--json FILE] [overrides]

Contenders share the model, the tokens, the loss and the optimizer; they differ in the quantized linear only:
  ours       closed-form gradient, Wq made again in the backward pass
  checkpoint ours, with gradient checkpointing per block
  autograd   the same forward pass, left to autograd through a straight-through rounding: keeps every Wq
  floor      no quantization: forward and input gradient of the frozen model, and the one more matmul per
             trained linear that any gradient of s needs

Seconds come from one process in which the contenders take turns, step by step. Memory comes from a process of
its own for each: peak bytes of live tensors over the weights (the profiler's allocation events), and resident
memory.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from teq import arch, config, measure
from teq.grid import Grid, fake_quant
from teq.transforms.loss import causal_loss
from teq.transforms.training import ScaledFakeQuantLinear

GRID = Grid(bits=3, group_size=64)


class StraightThrough(torch.autograd.Function):
    """FakeQuant forward, the gradient unchanged backward."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return fake_quant(weight, GRID)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class FloorLinear(torch.autograd.Function):
    """A frozen linear whose backward pass does the arithmetic that a trained scale cannot do without."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, s: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, *([] if s is None else [x]))
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, *rest = ctx.saved_tensors
        dx = dy @ weight
        return dx, (dy @ weight).flatten(0, -2).sum(0) if rest else None, None, None


def ours(linear: nn.Linear, s: Tensor | None, x: Tensor) -> Tensor:
    """The project's own linear."""
    return ScaledFakeQuantLinear.apply(x, s, linear.weight, linear.bias, GRID)


def autograd(linear: nn.Linear, s: Tensor | None, x: Tensor) -> Tensor:
    """The plain version."""
    weight = linear.weight if s is None else linear.weight * s
    return functional.linear(x if s is None else x / s, StraightThrough.apply(weight), linear.bias)


def floor(linear: nn.Linear, s: Tensor | None, x: Tensor) -> Tensor:
    """The floor."""
    return FloorLinear.apply(x, s, linear.weight, linear.bias)


CONTENDERS: dict[str, Callable[..., Tensor]] = {
    "ours": ours,
    "checkpoint": ours,
    "autograd": autograd,
    "floor": floor,
}


class Trainer:
    """One contender, ready to step."""

    def __init__(self, name: str, model: nn.Module, family: arch.Arch) -> None:
        self.name, self.model, self.blocks = name, model, arch.blocks(model, family)
        sites = arch.sites(model, family)
        self.scales = {site.name: nn.Parameter(torch.ones(site.width)) for site in sites}
        self.site_of = {target: site.name for site in sites for target in site.targets}
        self.optimizer = torch.optim.Adam(self.scales.values(), lr=1e-3, betas=(0.9, 0.9))

    def step(self, tokens: Tensor) -> float:
        """One step on `tokens [1, token]`; returns the loss."""
        for block_name, block in self.blocks.items():
            for name, linear in arch.linears(block_name, block).items():
                s = self.scales.get(self.site_of.get(name, ""))
                linear.forward = functools.partial(CONTENDERS[self.name], linear, s)
            if self.name == "checkpoint":
                block.forward = functools.partial(checkpoint, type(block).forward, block, use_reentrant=False)
        loss = causal_loss(self.model, tokens)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        for block in self.blocks.values():
            for module in block.modules():
                vars(module).pop("forward", None)
        return loss.item()


def load(overrides: list[str]) -> tuple[nn.Module, arch.Arch]:
    """The model, frozen, and its family."""
    (job,) = config.jobs(overrides)
    lm = job.run.model.load("float32", "cpu")
    return lm.model, lm.arch


def tokens_of(model: nn.Module, count: int) -> Tensor:
    """Seeded token ids `[1, count]`: what they say does not matter here."""
    vocabulary = model.get_input_embeddings().num_embeddings
    return torch.randint(vocabulary, (1, count), generator=torch.Generator().manual_seed(0))


def seconds(names: list[str], overrides: list[str], count: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of each step of each contender, which take turns; the first round is a warm-up."""
    model, family = load(overrides)
    tokens = tokens_of(model, count)
    trainers = [Trainer(name, model, family) for name in names]
    taken: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(repeats + 1):
        for trainer in trainers:
            start = time.perf_counter()
            trainer.step(tokens)
            taken[trainer.name].append(time.perf_counter() - start)
    return {name: times[1:] for name, times in taken.items()}


def memory(name: str, overrides: list[str], count: int) -> dict[str, int]:
    """Peak bytes of live tensors over the weights, and of resident memory over the loaded model."""
    model, family = load(overrides)
    tokens = tokens_of(model, count)
    trainer = Trainer(name, model, family)
    with measure.cost("cpu") as cost:
        before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        trainer.step(tokens)
    with torch.profiler.profile(
        profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]
    ) as profile:
        trainer.step(tokens)
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return {"live_bytes": peak, "resident_bytes": max(0, (cost["peak_bytes"] or 0) - before)}


def main() -> None:
    """Measure everything, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", default=["model=smollm2-135m"], help="as for run.py")
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(json.dumps(memory(arguments.memory_of, arguments.overrides, arguments.tokens)))
        return
    taken = seconds(arguments.contenders, arguments.overrides, arguments.tokens, arguments.repeats)
    rows = {}
    for name in arguments.contenders:
        command = [sys.executable, __file__, "--memory-of", name, "--tokens", str(arguments.tokens)]
        done = subprocess.run([*command, *arguments.overrides], capture_output=True, text=True, check=True)
        ratios = (
            [a / b for a, b in zip(taken[name], taken["autograd"], strict=True)]
            if "autograd" in taken
            else []
        )
        rows[name] = {
            "seconds": {
                "median": statistics.median(taken[name]),
                "min": min(taken[name]),
                "max": max(taken[name]),
            },
            "seconds_over_autograd": statistics.median(ratios) if ratios else None,
            **json.loads(done.stdout.splitlines()[-1]),
        }
    print(f"{arguments.overrides}, {arguments.tokens} tokens, {arguments.repeats} steps each, taking turns")
    columns = [("s/step", 8), ("min", 8), ("max", 8), ("/autograd", 11)]
    columns += [("live MB", 9), ("/autograd", 11), ("resident MB", 13)]
    print(" " * 12 + "".join(f"{title:>{width}}" for title, width in columns))
    base = rows.get("autograd", {}).get("live_bytes")
    for name, row in rows.items():
        spent, relative = row["seconds"], row["seconds_over_autograd"]
        print(
            f"{name:<12}{spent['median']:>8.2f}{spent['min']:>8.2f}{spent['max']:>8.2f}"
            f"{relative or float('nan'):>11.2f}{row['live_bytes'] / 1e6:>9.0f}"
            f"{row['live_bytes'] / base if base else float('nan'):>11.2f}{row['resident_bytes'] / 1e6:>13.0f}"
        )
    if arguments.json:
        found = {"tokens": arguments.tokens, "overrides": arguments.overrides, "repeats": arguments.repeats}
        found |= {"machine": measure.machine("cpu"), "contenders": rows}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
