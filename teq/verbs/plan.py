"""`python -m teq plan [--calibrate] <overrides>`: what each stage of a run would need; no weight is loaded.

Memory is what the run would take here, or, with `memory=40GB`, on a GPU of that size, wherever the plan is
made. Seconds are known once `--calibrate` has measured the rate of this device.
"""

from collections.abc import Iterator, Sequence

from teq import config
from teq.config import Job
from teq.console import aligned
from teq.pipeline import estimate, forecast
from teq.pipeline.forecast import Stage, Target


def main(argv: Sequence[str]) -> int:
    """Print a table for each run of a command line. Returns the exit status."""
    jobs = config.jobs([word for word in argv if word != "--calibrate"])
    targets = [forecast.target(job.options.device, job.options.memory) for job in jobs]
    if "--calibrate" in argv:
        pairs = {(t.here, job.run.dtype) for t, job in zip(targets, jobs, strict=True) if t.here is not None}
        (small,) = config.jobs(["model=tiny-llama", "method=teq", "train.length=512", "recipe=paper"])
        for device, dtype in sorted(pairs):
            forecast.calibrate(config.home(), small.run.transform, small.run.model.arch, device, dtype)
    for target, job in zip(targets, jobs, strict=True):
        print(shown(job, target))
    return 0


def shown(job: Job, target: Target) -> str:
    """Return the table of one run: peak bytes, strategy and seconds by stage, and what does not fit."""
    run, sizes = job.run, forecast.dimensions(job.run.model, job.dimensions)
    rate = None
    if target.here is not None:
        rate = forecast.rates(config.home()).get(forecast.rate_name(target.here, run.dtype))
    stages = list(forecast.stages(run, sizes, target, job.options.memory, job.options.batch_size))
    rows = [["stage", "peak memory", "host", "disk", "strategy", "seconds"]]
    for one in stages:
        about = "~" if one.about else ""
        size = "not known" if one.bytes is None else about + _amount(one.bytes)
        seconds = f"{about}{one.flops / rate:.0f}" if one.flops and rate else "not known"
        more = [_amount(count) if count else "" for count in (one.host, one.disk)]
        rows.append([one.name, size, *more, one.strategy, seconds])
    parameters = list(estimate.outline(sizes, run.dtype, run.model.arch).model.parameters())
    count, weights = sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters)
    head = f"{run.title()}: {count:,} parameters, {_amount(weights)} in {run.dtype}, on {target.name}"
    head += "" if target.here is None else f" ({_amount(target.budget)} may be used)"
    return "\n".join([head, "", aligned(rows), *_notes(job, target, stages, rate)])


def _notes(job: Job, target: Target, stages: Sequence[Stage], rate: float | None) -> Iterator[str]:
    """Yield the lines below a table."""
    least: dict[str, int] = {}  # bytes, by stage
    for one in stages:
        if one.bytes is not None:
            least[one.name] = min(one.bytes, least.get(one.name, one.bytes))
    if over := [f"{stage} ({_amount(size)})" for stage, size in least.items() if size > target.budget]:
        yield f"does not fit into the {_amount(target.budget)} that may be used: {', '.join(over)}"
    if any(one.host for one in stages):
        yield (
            "host: what waits in the host's memory while the GPU computes; disk: what the cache holds of it, "
            "or what waits there because the host has too little memory"
        )
    if any(one.about for one in stages):
        yield "~ an estimate from the lengths that documents have for SmolLM2's tokenizer"
    if rate is None and target.here is None:
        yield "seconds are known where such a device is: this machine has none"
    elif rate is None:
        yield f"seconds are known after `python -m teq plan --calibrate {' '.join(job.overrides)}`"


def _amount(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
