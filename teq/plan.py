"""`python -m teq plan [--calibrate] <overrides>`: what each stage of a run would need; no weight is loaded.

Memory is that of live tensors on the device (see `teq.memory`). Seconds are the operations of matrix products
over the rate at which `--calibrate` did those of a small model's training on this device for a moment; the
rate is kept beside the records, one for each device and dtype.
"""

import dataclasses
import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from teq import config, files, measure, memory, pipeline, tables
from teq.arch import Arch
from teq.config import Job
from teq.models import LM, Checkpoint, Folder, Outline, Synthetic
from teq.spec import Runtime, UserError

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


@runtime_checkable
class Foreseen(Protocol):
    """A stage that tells what it needs from the model's shapes: its work cannot be done on fake tensors."""

    def expected(self, lm: LM) -> memory.Need: ...


def main(argv: Sequence[str]) -> int:
    """Print a table for each run of a command line. Returns the exit status."""
    jobs = config.jobs([word for word in argv if word != "--calibrate"])
    devices = [pipeline.resolve_device(job.options.device) for job in jobs]
    for job in jobs:
        memory.check(job.options.memory)
    if "--calibrate" in argv:
        for device, dtype in sorted({(d, job.run.dtype) for d, job in zip(devices, jobs, strict=True)}):
            calibrate(device, dtype)
    for device, job in zip(devices, jobs, strict=True):
        print(shown(job, device))
    return 0


def shown(job: Job, device: str) -> str:
    """The table of one run: parameters, peak bytes, strategy and seconds by stage."""
    run, sizes = job.run, dimensions(job)
    outline = _outline(sizes, run.dtype, run.model.arch)
    parameters = sum(p.numel() for p in outline.model.parameters())
    rate = _rates().get(_rate_name(device, run.dtype))
    rows = [["stage", "peak memory", "strategy", "seconds"]]

    def row(stage: str, size: int | None, strategy: str = "", flops: int | None = None) -> None:
        seconds = f"{flops / rate:.0f}" if flops and rate else "not known"
        rows.append([stage, "not known" if size is None else _amount(size), strategy, seconds])

    def needed(stage: Any, strategy: str) -> memory.Need:
        return memory.need(stage, sizes, run.model.arch, run.dtype, strategy)

    if isinstance(run.transform, memory.Rehearsable):
        runtime = Runtime(device=device, memory=job.options.memory)
        picked = memory.choose(run.transform, lambda: sizes, run.model.arch, run.dtype, runtime)
        for strategy in memory.possible(device):
            one = needed(run.transform, strategy)
            mark = f"{strategy} (picked)" if strategy == picked else strategy
            row("scales", one.bytes, mark, one.flops // 2 * run.transform.steps)  # a rehearsal is two steps
    if isinstance(run.quantizer, memory.Rehearsable):
        row("weights", needed(run.quantizer, "keep").bytes)  # its time is not that of matrix products
    elif isinstance(run.quantizer, Foreseen):
        one = run.quantizer.expected(outline)
        row("weights", one.bytes, "", one.flops)
    else:
        row("weights", None)
    for evaluation in run.evals:
        if isinstance(evaluation, memory.Rehearsable):
            one = needed(evaluation, "keep")
            row(evaluation.name, one.bytes, "", one.flops * evaluation.limit if evaluation.limit else None)
        else:
            row(evaluation.name, None)
    weights = sum(p.nbytes for p in outline.model.parameters())
    head = f"{run.title()}: {parameters:,} parameters, {_amount(weights)} in {run.dtype}, on {device}"
    command = f"python -m teq plan --calibrate {' '.join(job.overrides)}"
    unknown = "" if rate else f"\nseconds are known after `{command}`"
    return f"{head}\n\n{tables.aligned(rows)}{unknown}"


def calibrate(device: str, dtype: str) -> None:
    """Measure the rate of training steps in operations per second on a small model, and keep it."""
    import torch

    (job,) = config.jobs(["model=tiny-llama", "method=teq", "train.length=512", "recipe=paper"])
    transform, family = job.run.transform, job.run.model.arch
    source = Synthetic(config=CALIBRATION | (WIDER if device.startswith("cuda") else {}))
    checkpoint = Checkpoint(name="calibration", source=source, arch=family)
    # counted on fake tensors: a compiler declines for good what it first sees under a counter
    operations = memory.need(transform, checkpoint.config(), family, dtype, "keep").flops
    lm = checkpoint.load(dtype, device)
    spent = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        transform.rehearse(lm, "keep")
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        spent.append(time.perf_counter() - start)
    rate = operations / min(spent[1:])  # the first warms up
    files.write_text(
        config.home() / RATES, json.dumps(_rates() | {_rate_name(device, dtype): rate}, indent=1)
    )


def _rates() -> dict[str, float]:
    try:
        return json.loads((config.home() / RATES).read_text())
    except FileNotFoundError:
        return {}
    except ValueError:
        raise UserError(f"{config.home() / RATES} is damaged: delete it and calibrate again") from None


def _rate_name(device: str, dtype: str) -> str:
    import torch  # noqa: F401  (the machine's thread count is torch's)

    found = measure.machine(device)
    return f"{found['name']}, {found['threads']} threads, {dtype}"


def dimensions(job: Job) -> "PretrainedConfig":
    """The architecture's dimensions: of the folder that was named, else those that conf/model carries."""
    source = Outline(config=dict(job.dimensions)) if job.dimensions else job.run.model.source
    given = job.run.model.source if isinstance(job.run.model.source, Folder) else source
    return dataclasses.replace(job.run.model, source=given).config()


def _outline(dimensions: "PretrainedConfig", dtype: str, arch: Arch) -> LM:
    """The whole model on the meta device: names and shapes."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(dimensions, dtype=getattr(torch, dtype))
    return LM(model, None, arch, "outline")


def _amount(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
