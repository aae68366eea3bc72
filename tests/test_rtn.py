"""Round to nearest."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from teq import config
from teq.device.live_bytes import LiveBytes
from teq.device.runtime import Runtime
from teq.grid import Grid
from teq.models.checkpoint import LM
from teq.pipeline import estimate
from teq.quantizers.rtn import Rtn
from teq.stage import NothingDone


def test_rounding_that_changes_nothing_is_an_error(own_home, tiny):
    lm = tiny("llama")
    grid = Grid(bits=8, group_size=64)
    with torch.no_grad():
        for parameter in lm.model.parameters():
            if parameter.ndim == 2:
                parameter.fill_(0)
    with pytest.raises(NothingDone, match="rounding changed no weight"):
        Rtn(grid=grid).quantize(lambda: lm, {}, Runtime())


@pytest.mark.parametrize("overrides", [[], ["group_size=-1", "bits=8"]])
def test_roundings_memory_is_within_15_percent(family, overrides):
    (job,) = config.jobs([f"model=tiny-{family}", "method=rtn", "evals=[python-docs]", *overrides])
    wanted = job.run.model.source.dimensions()
    wanted.num_hidden_layers = 5  # the prediction looks at two and at three
    predicted = estimate.estimate(job.run.quantizer, wanted, job.run.model.arch, "float32", "keep").bytes
    model = AutoModelForCausalLM.from_config(wanted).eval().requires_grad_(False)
    with LiveBytes() as live:
        job.run.quantizer.quantize(lambda: LM(model, None, job.run.model.arch, ""), {}, Runtime())
    weights = sum(p.nbytes for p in model.parameters())
    assert predicted - weights == pytest.approx(live.peak, rel=0.15)
