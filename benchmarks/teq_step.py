"""One TEQ training step by several contenders, side by side.

    python -m benchmarks.teq_step [--tokens 512] [--repeats 7] [--device cpu] [--json FILE]
                                  [--neural-compressor PYTHON] [overrides]

Contenders share the weights, the tokens, the loss and the optimizer, and differ in the quantized linear:
  ours              the project's own, which keeps what the backward pass needs (strategy keep)
  checkpoint        ours, each block computed again in the backward pass (strategy checkpoint)
  offload           ours, with the blocks in the host's memory (strategy offload; left out on a CPU)
  autograd          the same forward pass, left to autograd through a straight-through rounding
  floor             no quantization: forward and input gradient of the frozen model, and the one more matmul
                    per trained linear that any gradient of s needs
  neural-compressor Intel's modules and the model's own loss, in the environment of --neural-compressor (see
                    benchmarks/contenders/neural_compressor_step.py)

Contenders take turns, step by step, after a step each for warming up; a ratio is the median of the ratios
turn by turn. Those that share one loaded model do so in one process, offload and neural-compressor step in
one of their own meanwhile. Memory comes from a process of its own for each: peak bytes of live tensors over
the weights, scales and Adam's state, and resident memory.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders import measuring
from benchmarks.contenders.measuring import ratio, shown
from benchmarks.contenders.steps import Contender
from benchmarks.contenders.worker import Spec, Worker, memory_of, training
from teq import config
from teq.device.memory import exhausted
from teq.device.runtime import resolve
from teq.pipeline import cost
from teq.spec import UserError

SHARING = ("ours", "checkpoint", "autograd", "floor")
OTHERS = "neural-compressor"
ALONE = ("offload", OTHERS)
BASES = ("autograd", "floor", OTHERS)  # what the others are set in relation to
SAME = ("ours", "checkpoint", "offload", "autograd", OTHERS)  # whose losses are one loss
TOLERANCE = {"float32": 1e-5}  # relative, of the first loss; in bfloat16 the two round in different places

Step = Callable[[], tuple[float, float]]  # seconds, loss


def local(contender: Contender, tokens: torch.Tensor, device: str) -> Step:
    """A turn of a contender in this process."""

    def step() -> tuple[float, float]:
        with contender.installed():
            return measuring.timed(lambda: contender.step(tokens), device)

    return step


def turns(
    steps: dict[str, Step], repeats: int, failed: dict[str, str]
) -> dict[str, list[tuple[float, float]]]:
    """Return seconds and loss of each step of each contender, the warm-up first.

    A contender that runs out of memory, or whose process ends, is put into `failed` and drops out.
    """
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(repeats + 1):
        for name in [name for name in steps if name not in failed]:
            try:
                taken[name].append(steps[name]())
            except (UserError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and not exhausted(error):
                    raise
                failed[name] = measuring.brief(error)
    return taken


def measured(
    names: list[str], spec: Spec, repeats: int, python: Path | None
) -> tuple[dict[str, dict[str, Any]], dict[str, str], dict[str, Any]]:
    """For each contender its losses, seconds and memory; why others failed; the machines that say more."""
    pythons = {OTHERS: python} if python else {}
    failed: dict[str, str] = {}
    workers: dict[str, Worker] = {}
    try:
        for name in [name for name in names if name in ALONE]:
            try:
                workers[name] = Worker(
                    dataclasses.replace(spec, name=name), pythons.get(name, sys.executable)
                )
            except UserError as error:
                failed[name] = measuring.brief(error)
        steps: dict[str, Step] = {name: worker.step for name, worker in workers.items()}
        if sharing := [name for name in names if name in SHARING]:
            lm = spec.checkpoint.load(spec.dtype, spec.device)
            tokens = measuring.tokens_of(lm.model, spec.rows, spec.tokens)
            for name in sharing:
                steps[name] = local(Contender(name, lm, spec.settings, spec.device), tokens, spec.device)
        taken = turns({name: steps[name] for name in names if name in steps}, repeats, failed)
    finally:
        for worker in workers.values():
            worker.close()
    machines = {name: worker.hello["machine"] for name, worker in workers.items() if name == OTHERS}
    steps.clear()
    lm = tokens = None  # the processes that measure memory may need the room
    if spec.device.startswith("cuda"):
        torch.cuda.empty_cache()
    rows = {}
    for name in [name for name in taken if name not in failed]:
        try:
            found = memory_of(dataclasses.replace(spec, name=name), pythons.get(name, sys.executable))
        except UserError as error:
            failed[name] = measuring.brief(error)
            continue
        seconds = [seconds for seconds, _ in taken[name][1:]]
        rows[name] = {"losses": [loss for _, loss in taken[name]], "turns": seconds, **found}
    return rows, failed, machines


def add_ratios(rows: dict[str, dict[str, Any]]) -> None:
    """Give each row its seconds and bytes over those of every base that was measured."""
    for row in rows.values():
        row["seconds"] = measuring.spread(row["turns"])
        row["over"] = {
            base: {"seconds": ratio(row["turns"], rows[base]["turns"])}
            | {key: ratio(row[key], rows[base][key]) for key in ("live_bytes", "resident_bytes")}
            for base in BASES
            if base in rows
        }


def differences(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """How far each contender's first loss is from ours, relatively: they compute the same."""
    same = [name for name in SAME if name in rows]
    if not same:
        return {}
    first = rows[same[0]]["losses"][0]
    return {name: abs(rows[name]["losses"][0] - first) / abs(first) for name in same[1:]}


def print_table(rows: dict[str, dict[str, Any]]) -> None:
    """A line for each contender."""
    bases = {"autograd": "/autograd", "floor": "/floor", OTHERS: "/n.-c."}
    print(f"{'':<18}{'s/step':>9}{'min':>9}{'max':>9}" + "".join(f"{t:>10}" for t in bases.values()), end="")
    print(f"{'live MB':>10}" + "".join(f"{t:>10}" for t in bases.values()) + f"{'resident MB':>13}")
    for name, row in rows.items():
        print(
            f"{name:<18}" + "".join(shown(row["seconds"][k], 9, 3) for k in ("median", "min", "max")), end=""
        )
        print("".join(shown(row["over"].get(base, {}).get("seconds"), 10) for base in bases), end="")
        print(shown(row["live_bytes"] / 1e6, 10, 1), end="")
        print("".join(shown(row["over"].get(base, {}).get("live_bytes"), 10) for base in bases), end="")
        print(shown(None if row["resident_bytes"] is None else row["resident_bytes"] / 1e6, 13, 1))


def main(argv: list[str]) -> int:
    """Measure everything, print the table, write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--contenders", nargs="+", choices=(*SHARING, *ALONE), help="default: all there can be"
    )
    parser.add_argument("--neural-compressor", type=Path, metavar="PYTHON", help="python of its environment")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda, cuda:<n>")
    parser.add_argument("--dtype", help="of the weights; default: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", default=["model=smollm2-135m"], help="as for run.py")
    arguments = parser.parse_intermixed_args(argv)
    device = resolve(arguments.device)
    dtype = arguments.dtype or measuring.default_dtype(device)
    (job,) = config.jobs([*arguments.overrides, f"dtype={dtype}"])
    names = arguments.contenders or [*SHARING, *ALONE]
    if not arguments.contenders and device == "cpu":
        names.remove("offload")
    left_out = {}
    if OTHERS in names and arguments.neural_compressor is None:
        names.remove(OTHERS)
        left_out[OTHERS] = "give the python of its environment with --neural-compressor"
    settings = training(job.run)
    spec = Spec("", job.run.model, settings, arguments.tokens, dtype=dtype, device=device)
    spec = dataclasses.replace(spec, threads=torch.get_num_threads())
    rows, failed, machines = measured(names, spec, arguments.repeats, arguments.neural_compressor)
    add_ratios(rows)
    apart = differences(rows)

    said = " ".join(arguments.overrides)
    print(f"{said}, {arguments.tokens} tokens, {dtype} on {device}, {arguments.repeats} steps each, in turn")
    print_table(rows)
    for name, why in (left_out | failed).items():
        print(f"{name:<18}{'left out' if name in left_out else 'failed'}: {why}")
    foreseen = {name: ratio(row["predicted_bytes"], row["live_bytes"]) for name, row in rows.items()}
    if told := [f"{name} {shown(r, 0)}" for name, r in foreseen.items() if r is not None]:
        print(f"live bytes as `python -m teq plan` predicts them, over these: {', '.join(told)}")
    wrong = [name for name, d in apart.items() if not d <= TOLERANCE.get(dtype, 1e-2)]
    if apart:
        print("first loss against ours: " + ", ".join(f"{name} {d:.1e}" for name, d in apart.items()))
    if wrong:
        raise UserError(f"the first loss of {', '.join(wrong)} is not ours: the comparison means nothing")
    if arguments.json:
        found = {"tokens": arguments.tokens, "overrides": arguments.overrides, "repeats": arguments.repeats}
        found |= {"dtype": dtype, "machine": cost.machine(device), "machines": machines}
        found |= {"settings": settings.plain(), "contenders": rows, "first_loss_difference": apart}
        measuring.write(arguments.json, found | {"left_out": left_out, "failed": failed})
    return measuring.INCOMPLETE if failed else 0


if __name__ == "__main__":
    sys.exit(measuring.command_line(main, sys.argv[1:]))
