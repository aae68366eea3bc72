"""GPTQ over a model, ours against a plain port of the official algorithm, on the same calibration tokens.

    python benchmarks/gptq.py [--samples 32] [--length 512] [--windows 16] [--json FILE] [overrides]

The port follows the official code (IST-DASLab/gptq: gptq.py, quant.py and its drivers) step by step: one
Hessian and one Cholesky for each linear, kept as a running mean; the column loop runs over each linear alone;
the block's outputs are computed once more after quantizing. It shares nothing with teq/quantizers but the
catching of the first block's inputs. Printed for both: seconds measuring, quantizing and the rest (mostly
propagating); the error tr(E H E^T) of the first block; perplexity on the first evaluation windows of the
embedded text.

Two correct runs agree on the first block's error and still differ in perplexity: a code that falls the other
way by rounding error in one block changes what all later blocks see. Their distance is the noise of such a
figure.
"""

import argparse
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from teq import arch, config, corpora, measure
from teq.models import LM
from teq.quantizers import gptq_blocks
from teq.quantizers.gptq import Gptq


class Clock:
    """Seconds by part of the work."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, its time charged to `part`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.spent[part] += time.perf_counter() - start

        return call


def port_grid(block: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Scale and zero `[out, 1]` of one group `[out, group]`, asymmetric."""
    nothing = torch.zeros(block.shape[0])
    low, high = torch.minimum(block.min(1)[0], nothing), torch.maximum(block.max(1)[0], nothing)
    flat = (low == 0) & (high == 0)
    low[flat], high[flat] = -1, 1
    scale = (high - low) / levels
    return scale[:, None], torch.round(-low / scale)[:, None]


def port_solve(weight: Tensor, hessian: Tensor, settings: Gptq) -> Tensor:
    """The official column loop for one linear: dequantized weight `[out, in]`."""
    weight, hessian, levels = weight.clone(), hessian.clone(), settings.grid.levels
    columns = weight.shape[1]
    size = columns if settings.grid.group_size == -1 else settings.grid.group_size
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    weight[:, dead] = 0
    hessian.diagonal().add_(settings.damping * hessian.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    done = torch.zeros_like(weight)
    for start in range(0, columns, settings.block_size):
        stop = min(start + settings.block_size, columns)
        block, errors = weight[:, start:stop].clone(), torch.zeros(weight.shape[0], stop - start)
        factor = inverse[start:stop, start:stop]
        for i in range(stop - start):
            if (start + i) % size == 0:
                scale, zero = port_grid(weight[:, start + i : start + i + size], levels)
            column = block[:, i]
            codes = torch.clamp(torch.round(column[:, None] / scale) + zero, 0, levels)
            done[:, start + i] = (scale * (codes - zero)).flatten()
            errors[:, i] = (column - done[:, start + i]) / factor[i, i]
            block[:, i:] -= errors[:, i : i + 1].matmul(factor[i : i + 1, i:])
        weight[:, stop:] -= errors.matmul(inverse[start:stop, stop:])
    return done


@torch.no_grad()
def port(lm: LM, settings: Gptq, windows: Tensor, clock: Clock) -> float:
    """Quantize the model in place; returns the first block's error."""
    caught = [arch.block_inputs(lm.model, lm.arch, window[None]) for window in windows]
    hidden, kwargs = [one for one, _ in caught], caught[0][1]
    solve, run = clock.timed("quantizing", port_solve), arch.run_block
    first = 0.0
    for index, (name, block) in enumerate(arch.blocks(lm.model, lm.arch).items()):
        inside = arch.linears(name, block)
        hessians = {key: torch.zeros(m.in_features, m.in_features) for key, m in inside.items()}
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


def ours(lm: LM, settings: Gptq, windows: Tensor, clock: Clock) -> float:
    """The project's own, with its parts timed."""
    parts = {"_measure": "measuring", "solve": "quantizing"}
    kept = {name: getattr(gptq_blocks, name) for name in parts}
    try:
        for name, part in parts.items():
            setattr(gptq_blocks, name, clock.timed(part, kept[name]))
        _, info = gptq_blocks.quantize_blocks(settings, lm, {}, windows)
    finally:
        for name, function in kept.items():
            setattr(gptq_blocks, name, function)
    first = next(iter(arch.blocks(lm.model, lm.arch)))
    return sum(e.get("error", 0.0) for name, e in info["gptq"].items() if name.startswith(f"{first}."))


@torch.no_grad()
def perplexity(lm: LM, count: int) -> float:
    """Perplexity on the first `count` windows of 512 evaluation tokens of the embedded text."""
    stream, _ = corpora.windows("python-docs", lm.tokenizer, 512, count)
    losses = [lm.model(w[None], labels=w[None]).loss.item() for w in stream]
    return math.exp(sum(losses) / len(losses))


def main() -> None:
    """Run both, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("samples", 32), ("length", 512), ("windows", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", default=["model=smollm2-135m"], help="as for run.py")
    arguments = parser.parse_args()
    given = [f"gptq.samples={arguments.samples}", f"gptq.length={arguments.length}"]
    (job,) = config.jobs([*arguments.overrides, *given, "method=gptq", "evals=[python-docs]"])
    settings, rows = job.run.quantizer, {}
    for name, contender in (("port", port), ("ours", ours)):
        lm, clock = job.run.model.load("float32", "cpu"), Clock()
        windows = corpora.calibration(settings.calib, lm.tokenizer, settings.samples, settings.length)
        start = time.perf_counter()
        error = contender(lm, settings, windows, clock)
        total = time.perf_counter() - start
        rest = {"rest": total - sum(clock.spent.values()), "first_block_error": error}
        rows[name] = {"total": total, **clock.spent, **rest}
        rows[name]["perplexity"] = perplexity(lm, arguments.windows)
    print(f"{'':<6}" + "".join(f"{title:>20}" for title in rows["port"]))
    for name, row in rows.items():
        print(f"{name:<6}" + "".join(f"{row[title]:>20.3f}" for title in rows["port"]))
    ratios = {key: rows["port"][key] / rows["ours"][key] for key in ("total", "measuring", "quantizing")}
    print("port over ours: " + ", ".join(f"{key} {ratio:.2f}" for key, ratio in ratios.items()))
    if arguments.json:
        found = {
            "settings": settings.plain(),
            "machine": measure.machine("cpu"),
            "port_over_ours": ratios,
            **rows,
        }
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
