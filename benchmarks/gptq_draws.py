"""How far GPTQ's perplexities spread: ours and a plain port of the official code, windows in other orders.

    python -m benchmarks.gptq_draws --json benchmarks/results/gptq_draws.json [--draws 12] [--samples 32]
                                    [--length 512] [--contenders ours port exact] [overrides]

The Hessian of the same windows in another order is the same sum, rounded otherwise: what the perplexities of
such draws span is the noise of a single figure. `exact` is ours with the factor in fp64. Every finished draw
is written at once, and a second call computes those that are missing. Against the port: the F test of equal
variances and Welch's 95 % interval of the difference in means.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from benchmarks import gptq
from benchmarks.contenders import measuring
from teq import config
from teq.pipeline import cost
from teq.quantizers.gptq import solver

REFERENCE = "port"
CONTENDERS = ("ours", "port", "exact")


def exact_factor(hessian: Tensor, diagonal: Tensor, order: Tensor | None) -> tuple[Tensor, Tensor]:
    """The solver's factor from one fp64 factorization: with H = V V^T, V upper, it is V^-1."""
    damped = hessian.double()
    damped.diagonal().copy_(diagonal)
    damped = damped if order is None else damped[order][:, order]
    lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
    one = torch.eye(len(damped), dtype=damped.dtype)
    return torch.linalg.solve_triangular(lower.flip(0, 1), one, upper=True).float(), failed != 0


@contextlib.contextmanager
def contender(name: str) -> Iterator[str]:
    """Context manager: the contender of `benchmarks.gptq` to run; `exact` replaces the solver's factor."""
    if name != "exact":
        yield name
        return
    with mock.patch.object(solver, "_inverse_factor", exact_factor):
        yield "ours"


def against(draws: list[float], reference: list[float]) -> dict[str, Any]:
    """The F test of equal variances (two-sided p) and the 95 % interval of the difference in means."""
    a, b = np.asarray(draws), np.asarray(reference)
    ratio = a.var(ddof=1) / b.var(ddof=1)
    below = stats.f.cdf(ratio, len(a) - 1, len(b) - 1)
    interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    return {
        "variance_ratio": float(ratio),
        "f_test_p": float(2 * min(below, 1 - below)),
        "mean_difference": float(a.mean() - b.mean()),
        "mean_difference_interval": [float(interval.low), float(interval.high)],
    }


def main(argv: list[str]) -> int:
    """Run the missing draws, print and write what all of them tell."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("draws", 12), ("samples", 32), ("length", 512), ("windows", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--contenders", nargs="+", default=["ours", "port"], choices=CONTENDERS)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", default=["model=smollm2-135m"], help="as for run.py")
    arguments = parser.parse_intermixed_args(argv)
    given = [f"gptq.samples={arguments.samples}", f"gptq.length={arguments.length}", "method=gptq"]
    (job,) = config.jobs([*arguments.overrides, *given, "evals=[python-docs]", "device=cpu", "dtype=float32"])
    settings = {
        "gptq": job.run.quantizer.plain(),
        "model": job.run.model.plain(),
        "windows": arguments.windows,
    }
    found: dict[str, Any] = {"settings": settings, "draws": {}}
    if arguments.json.is_file():
        found = measuring.read(arguments.json)
        if found["settings"] != settings:
            raise measuring.UserError(f"{arguments.json} is of other settings: give another file")
    for number in range(arguments.draws):
        for name in arguments.contenders:
            draws = found["draws"].setdefault(name, {})
            if str(number) in draws:
                continue
            with contender(name) as runnable:
                turn, _ = gptq.turn(runnable, job, "cpu", number, None, arguments.windows)
            kept = ("perplexity", "first_block_error", "total")
            draws[str(number)] = {key: turn[key] for key in kept} | {"code": cost.code()}
            print(f"draw {number} of {name}: {turn['perplexity']:.3f}", file=sys.stderr, flush=True)
            found |= {"machine": cost.machine("cpu"), "against_port": {}}
            values = {n: [d["perplexity"] for d in made.values()] for n, made in found["draws"].items()}
            for other, numbers in values.items():
                if other != REFERENCE and min(len(numbers), len(values.get(REFERENCE, []))) > 1:
                    found["against_port"][other] = against(numbers, values[REFERENCE])
            measuring.write(arguments.json, found)
    for name, made in found["draws"].items():
        numbers = np.asarray([draw["perplexity"] for draw in made.values()])
        print(f"{name}: {len(numbers)} draws, mean {numbers.mean():.2f}, sd {numbers.std(ddof=1):.2f}")
    for name, test in found.get("against_port", {}).items():
        low, high = test["mean_difference_interval"]
        variances = f"variances {test['variance_ratio']:.2f} (p = {test['f_test_p']:.2f})"
        means = f"means {test['mean_difference']:+.2f} ({low:+.2f} to {high:+.2f})"
        print(f"{name} against {REFERENCE}: {variances}, {means}")
    return 0


if __name__ == "__main__":
    sys.exit(measuring.command_line(main, sys.argv[1:]))
