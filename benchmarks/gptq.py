"""GPTQ over a model: ours, a plain port of the official algorithm, and the floor, on the same tokens.

    python -m benchmarks.gptq [--samples 32] [--length 512] [--repeats 5] [--blocks N] [--device cpu]
                              [--json FILE] [overrides]

  ours   the project's own
  port   the official algorithm, linear by linear (benchmarks/contenders/gptq_port.py)
  floor  two forward passes of every block and one product X^T X for each distinct input; nothing is quantized

They take turns, each on the model newly loaded, which is not timed. Printed: seconds measuring, quantizing
and the rest (mostly propagating); the error tr(E H E^T) of the first block; the share of the first block's
weights in which ours and the port's differ; perplexity on the first evaluation windows of the embedded text.
`--blocks` stops after the first blocks, which are alike: enough for seconds, and there is no perplexity.

Every turn after the first takes the calibration windows in another order, the same for all contenders: the
Hessian is the same sum in another order. Such runs agree on the first block and still differ in perplexity,
because one code that flips by rounding error changes the inputs of all later blocks. The range of a
contender's perplexities is the noise of a single one.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.contenders import measuring
from benchmarks.contenders.gptq_port import Clock, floor, port
from benchmarks.contenders.measuring import ratio, shown
from teq import config
from teq import data as corpora
from teq.device.runtime import resolve
from teq.models import arch
from teq.models.checkpoint import LM
from teq.pipeline import cost as measure
from teq.quantizers import blockwise
from teq.quantizers.gptq import solver
from teq.quantizers.gptq.settings import Gptq
from teq.spec import UserError

PARTS = ("total", "measuring", "quantizing", "rest")


def ours(lm: LM, settings: Gptq, windows: Tensor, clock: Clock) -> float:
    """The project's own, with its parts timed; returns the first block's error."""
    measuring = clock.timed("measuring", blockwise.measure)
    quantizing = clock.timed("quantizing", solver.solve)
    with mock.patch.object(blockwise, "measure", measuring), mock.patch.object(solver, "solve", quantizing):
        _, info = settings.quantize_on(lm, {}, windows)
    first = next(iter(arch.blocks(lm.model, lm.arch)))
    return sum(e.get("error", 0.0) for name, e in info["gptq"].items() if name.startswith(f"{first}."))


CONTENDERS = {"port": port, "ours": ours, "floor": floor}


@torch.no_grad()
def perplexity(lm: LM, count: int) -> float | None:
    """Perplexity on the first `count` windows of 512 evaluation tokens of the embedded text; None of none."""
    if count == 0:
        return None
    stream, _ = corpora.windows("python-docs", lm.tokenizer, 512, count)
    losses = [lm.model(w[None], labels=w[None]).loss.item() for w in stream.to(lm.device)]
    return math.exp(sum(losses) / len(losses))


def turn(
    name: str, job: config.Job, device: str, number: int, blocks: int | None, windows: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Turn `number` of one contender: what it took and gave, and the first block's weights after it."""
    settings, clock = job.run.quantizer, Clock(device)
    lm = job.run.model.load(job.run.dtype, device)
    tokens = corpora.calibration(settings.calib, lm.tokenizer, settings.samples, settings.length)
    if number:
        tokens = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(number))]
    if blocks is not None:
        del lm.model.get_submodule(lm.arch.blocks)[blocks:]
    with measure.cost(device) as cost:
        total, error = measuring.timed(lambda: CONTENDERS[name](lm, settings, tokens, clock), device)
    found = {"total": total, **{part: clock.spent[part] for part in ("measuring", "quantizing")}}
    found |= {"rest": total - sum(clock.spent.values())}
    if name == "floor":
        return found, {}
    found |= {"first_block_error": error, "perplexity": perplexity(lm, windows)}
    if device.startswith("cuda"):
        found["device_bytes"] = cost["peak_bytes"]
    first, block = next(iter(arch.blocks(lm.model, lm.arch).items()))
    return found, {key: linear.weight.cpu() for key, linear in arch.linears(first, block).items()}


def differing(ours: dict[str, Tensor], port: dict[str, Tensor]) -> float:
    """Return the share of weights that differ by more than rounding error: their codes differ."""
    different = [
        ~torch.isclose(w.float(), port[name].float(), rtol=1e-2, atol=1e-6) for name, w in ours.items()
    ]
    return float(torch.cat([d.flatten() for d in different]).float().mean())


def main(argv: list[str]) -> int:
    """Run all, print the table, write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("samples", 32), ("length", 512), ("windows", 16), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--blocks", type=int, help="only the first so many blocks; all if not given")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda, cuda:<n>")
    parser.add_argument("--dtype", help="of the weights; default: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", default=["model=smollm2-135m"], help="as for run.py")
    arguments = parser.parse_intermixed_args(argv)
    for name, value in (("repeats", arguments.repeats), ("blocks", arguments.blocks)):
        if value is not None and value < 1:
            raise UserError(f"--{name} {value} is not allowed: it must be at least 1")
    windows = arguments.windows if arguments.blocks is None else 0
    device = resolve(arguments.device)
    given = [f"gptq.samples={arguments.samples}", f"gptq.length={arguments.length}", "method=gptq"]
    given += [f"dtype={arguments.dtype or measuring.default_dtype(device)}", "evals=[python-docs]"]
    (job,) = config.jobs([*arguments.overrides, *given])
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.contenders}
    weights: dict[str, dict[str, Tensor]] = {}
    for number in range(arguments.repeats):
        for name in arguments.contenders:
            run, weights[name] = turn(name, job, device, number, arguments.blocks, windows)
            runs[name].append(run)
            told = ", ".join(f"{key} {shown(value, 0)}" for key, value in run.items())
            print(f"turn {number + 1} of {arguments.repeats}, {name}: {told}", file=sys.stderr)
    rows: dict[str, dict[str, Any]] = {}
    for name, made in runs.items():
        rows[name] = {part: measuring.spread([run[part] for run in made]) for part in PARTS}
        perplexities = [run["perplexity"] for run in made if run.get("perplexity") is not None]
        rows[name] |= {key: value for key, value in made[0].items() if key not in (*PARTS, "perplexity")}
        rows[name] |= {"perplexity": measuring.spread(perplexities) if perplexities else None, "turns": made}
    turns = {name: {part: [run[part] for run in made] for part in PARTS} for name, made in runs.items()}
    nothing: dict[str, list[float]] = {}
    port_over_ours = {
        part: ratio(turns.get("port", nothing).get(part), turns.get("ours", nothing).get(part))
        for part in ("total", "measuring", "quantizing")
    }
    over_floor = {
        name: ratio(turns[name]["total"], turns["floor"]["total"])
        for name in ("port", "ours")
        if name in turns and "floor" in turns
    }
    apart = differing(weights["ours"], weights["port"]) if {"ours", "port"} <= weights.keys() else None

    titles = [*PARTS, "first_block_error", "perplexity"]
    print(f"{'seconds, medians':<18}" + "".join(f"{title:>20}" for title in titles))
    for name, row in rows.items():
        values = [row[part]["median"] for part in PARTS] + [row.get("first_block_error")]
        values.append(row["perplexity"] and row["perplexity"]["median"])
        print(f"{name:<18}" + "".join(shown(value, 20, 3) for value in values))
    print("port over ours: " + ", ".join(f"{part} {shown(r, 0)}" for part, r in port_over_ours.items()))
    print("over the floor: " + ", ".join(f"{name} {shown(r, 0)}" for name, r in over_floor.items()))
    print(f"weights of the first block that differ: {'-' if apart is None else f'{apart:.1e}'}")
    if arguments.json:
        found = {"settings": job.run.quantizer.plain(), "overrides": arguments.overrides}
        found |= {"dtype": job.run.dtype, "machine": measure.machine(device), "repeats": arguments.repeats}
        found |= {"blocks": arguments.blocks}
        found |= {"port_over_ours": port_over_ours, "total_over_floor": over_floor}
        measuring.write(arguments.json, found | {"first_block_differing": apart, **rows})
    return 0


if __name__ == "__main__":
    sys.exit(measuring.command_line(main, sys.argv[1:]))
