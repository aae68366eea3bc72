"""Jobs of the tiny models that many tests run, and how one is run in this process."""

import dataclasses

from teq import config
from teq.device.runtime import Runtime
from teq.pipeline import run as pipeline
from teq.pipeline.store import Store

QUICK = ["model=tiny-llama", "train.steps=2", "ppl.limit=2", "ppl.context=64", "evals=[python-docs]"]
GPTQ = ["gptq.samples=4", "gptq.length=64"]
STEP = [
    "method=teq",
    "train.length=96",
    "train.steps=3",
    "evals=[python-docs]",
    "ppl.limit=1",
    "ppl.context=64",
]


def run(home, *overrides, **changes):
    """Run one job of QUICK, some fields of its settings replaced; returns its record."""
    (job,) = config.jobs([*QUICK, *GPTQ, *overrides])
    return pipeline.run(
        dataclasses.replace(job.run, **changes), Store(home / "store"), home, Runtime(device="cpu"), None
    )


def job_of(family, *overrides):
    """The job of a few training steps of a family's tiny model."""
    return config.jobs([f"model=tiny-{family}", *STEP, *overrides])[0]
