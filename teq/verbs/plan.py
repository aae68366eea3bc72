"""`python -m teq plan [--calibrate] <overrides>`: what each stage of a run would need; no weight is loaded.

Memory is that of live tensors on the device (see `teq.device.memory`): what the run would take here, or,
with `memory=40GB`, a GPU of that size, wherever the plan is made. Seconds are the operations of matrix
products over the rate at which `--calibrate` did those of a small model's training on this device for a
moment; the rate is kept beside the records, one for each device and dtype.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from teq.config import command_line as config
from teq.config.command_line import Job, Options
from teq.device import memory
from teq.device.locks import CUDA
from teq.device.runtime import STRATEGIES, resolve
from teq.evaluate.workload import WORKLOADS, Scoring
from teq.files import disk
from teq.models.arch import Arch
from teq.models.checkpoint import LM, Checkpoint, Outline, Synthetic
from teq.pipeline import cost, estimate
from teq.report import table
from teq.spec import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

REPEATS = 3
RATES = "rates.json"
CALIBRATION = {  # a model whose matrix products dominate its step, as they do in the ones that take long
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
}
# a GPU is through with that before the next operation has been asked for
WIDER = {"hidden_size": 4096, "intermediate_size": 16384, "num_attention_heads": 32}


@dataclass(frozen=True)
class Target:
    """The device that a plan is for."""

    kind: str  # "cuda" or "cpu"
    name: str  # in the output
    budget: int  # bytes
    here: str | None  # the device of this machine whose rate holds for it


def main(argv: Sequence[str]) -> int:
    """Print a table for each run of a command line. Returns the exit status."""
    jobs = config.jobs([word for word in argv if word != "--calibrate"])
    targets = [target(job.options) for job in jobs]
    if "--calibrate" in argv:
        pairs = {(t.here, job.run.dtype) for t, job in zip(targets, jobs, strict=True) if t.here is not None}
        for device, dtype in sorted(pairs):
            calibrate(device, dtype)
    for for_device, job in zip(targets, jobs, strict=True):
        print(shown(job, for_device))
    return 0


def target(options: Options) -> Target:
    """The device here; or a GPU of the size that `memory` names, unless the device is the CPU by name.

    Raises UserError where there is no such device, and none is named by its size.
    """
    memory.check(options.memory)
    if options.memory in STRATEGIES or options.memory == "auto" or options.device == "cpu":
        here = resolve(options.device)
        allowed = memory.budget("auto" if options.memory in STRATEGIES else options.memory, here)
        return Target(here.partition(":")[0], here, allowed, here)
    if options.device != "auto" and not CUDA.fullmatch(options.device):
        resolve(options.device)  # says what is wrong with it
    here = resolve("auto")
    allowed = memory.budget(options.memory, "cuda")
    return Target("cuda", f"a GPU of {options.memory}", allowed, here if here.startswith("cuda") else None)


def shown(job: Job, target: Target) -> str:
    """The table of one run: parameters, peak bytes, strategy and seconds by stage, and what does not fit."""
    run, sizes = job.run, dimensions(job)
    outline = _outline(sizes, run.dtype, run.model.arch)
    parameters = sum(p.numel() for p in outline.model.parameters())
    rate = _rates().get(_rate_name(target.here, run.dtype)) if target.here else None
    rows = [["stage", "peak memory", "strategy", "seconds"]]
    least: dict[str, int] = {}  # bytes, by stage

    def row(
        stage: str, size: int | None, strategy: str = "", flops: int | None = None, about: str = ""
    ) -> None:
        seconds = f"{about}{flops / rate:.0f}" if flops and rate else "not known"
        rows.append([stage, "not known" if size is None else about + _amount(size), strategy, seconds])
        if size is not None:
            least[stage] = min(size, least.get(stage, size))

    def needed(stage: Any, strategy: str = "keep", device: str = "cpu") -> memory.Estimate:
        return estimate.estimate(stage, sizes, run.model.arch, run.dtype, strategy, device)

    if run.transform.dry_run is not None:
        given = job.options.memory
        tried = dict.fromkeys([*memory.possible(target.kind), *([given] if given in STRATEGIES else [])])
        found = {strategy: needed(run.transform, strategy) for strategy in tried}
        fitting = [strategy for strategy, one in found.items() if one.bytes <= target.budget]
        picked = given if given in STRATEGIES else next(iter(fitting), None)
        for strategy, one in found.items():
            mark = f"{strategy} (picked)" if strategy == picked else strategy
            row("scales", one.bytes, mark, one.flops // 2 * run.transform.steps)  # a rehearsal is two steps
    if run.quantizer.dry_run is not None:
        on = "meta" if target.kind == "cuda" else "cpu"  # from a GPU the packed codes go to the host's memory
        row("weights", needed(run.quantizer, device=on).bytes)  # its time is not that of matrix products
    elif run.quantizer.estimate is not None:
        one = run.quantizer.estimate(outline)
        moved = one.movable if target.kind == "cuda" and one.bytes > target.budget else 0
        row("weights", one.bytes - moved, "hidden states on the host" if moved else "", one.flops)
    else:
        row("weights", None)
    for evaluation in run.evals:
        if evaluation.dry_run is not None:
            one = needed(evaluation)
            row(evaluation.name, one.bytes, "", one.flops * evaluation.limit if evaluation.limit else None)
        elif (work := WORKLOADS.get(evaluation.name)) is not None:
            documents = min(getattr(evaluation, "limit", None) or work.documents, work.documents)
            scoring = Scoring(work, documents, job.options.batch_size)
            one = needed(scoring)
            row(evaluation.name, one.bytes, "", scoring.flops(one), "~")
        else:
            row(evaluation.name, None)
    weights = sum(p.nbytes for p in outline.model.parameters())
    head = f"{run.title()}: {parameters:,} parameters, {_amount(weights)} in {run.dtype}, on {target.name}"
    head += "" if target.here is None else f" ({_amount(target.budget)} may be used)"
    return "\n".join([head, "", table.aligned(rows), *_notes(job, target, rows, least, rate)])


def _notes(
    job: Job, target: Target, rows: list[list[str]], least: dict[str, int], rate: float | None
) -> Iterator[str]:
    """The lines below a table."""
    if over := [f"{stage} ({_amount(size)})" for stage, size in least.items() if size > target.budget]:
        yield f"does not fit into the {_amount(target.budget)} that may be used: {', '.join(over)}"
    if any(size.startswith("~") for _, size, *_ in rows):
        yield "~ an estimate from the lengths that documents have for SmolLM2's tokenizer"
    if rate is None and target.here is None:
        yield "seconds are known where such a device is: this machine has none"
    elif rate is None:
        yield f"seconds are known after `python -m teq plan --calibrate {' '.join(job.overrides)}`"


def calibrate(device: str, dtype: str) -> None:
    """Measure the rate of training steps in operations per second on a small model, and keep it."""
    import torch

    (job,) = config.jobs(["model=tiny-llama", "method=teq", "train.length=512", "recipe=paper"])
    transform, family = job.run.transform, job.run.model.arch
    source = Synthetic(config=CALIBRATION | (WIDER if device.startswith("cuda") else {}))
    checkpoint = Checkpoint(name="calibration", source=source, arch=family)
    # counted on fake tensors: a compiler declines for good what it first sees under a counter
    operations = estimate.estimate(transform, checkpoint.source.dimensions(), family, dtype, "keep").flops
    lm = checkpoint.load(dtype, device)
    spent = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        transform.dry_run(lm, "keep")
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        spent.append(time.perf_counter() - start)
    rate = operations / min(spent[1:])  # the first warms up
    disk.write_text(config.home() / RATES, json.dumps(_rates() | {_rate_name(device, dtype): rate}, indent=1))


def _rates() -> dict[str, float]:
    try:
        return json.loads((config.home() / RATES).read_text())
    except FileNotFoundError:
        return {}
    except ValueError:
        raise UserError(f"{config.home() / RATES} is damaged: delete it and calibrate again") from None


def _rate_name(device: str, dtype: str) -> str:
    import torch  # noqa: F401  (the machine's thread count is torch's)

    found = cost.machine(device)
    return f"{found['name']}, {found['threads']} threads, {dtype}"


def dimensions(job: Job) -> "PretrainedConfig":
    """The architecture's dimensions: of the folder that was named, else those that conf/model carries."""
    source = Outline(config=dict(job.dimensions)) if job.dimensions else job.run.model.source
    given = job.run.model.source if job.run.model.source.at_hand else source
    return given.dimensions()


def _outline(dimensions: "PretrainedConfig", dtype: str, arch: Arch) -> LM:
    """The whole model on the meta device: names and shapes."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(dimensions, dtype=getattr(torch, dtype))
    return LM(model, None, arch, "outline")


def _amount(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
