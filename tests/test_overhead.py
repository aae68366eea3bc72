"""What folding adds to a model: nothing."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from teq import config
from teq.device.runtime import Runtime
from teq.evaluate.overhead import Overhead
from teq.pipeline import run as pipeline
from teq.pipeline.store import Store
from teq.spec import UserError


def test_a_folded_model_is_its_original_architecture_and_function(own_home, family):
    given = [f"model=tiny-{family}", "train.steps=3", "train.lr=0.05", "evals=[overhead,python-docs]"]
    given += ["ppl.context=64", "ppl.limit=2"]
    jobs = {method: config.jobs([*given, f"method={method}"])[0] for method in ("fp", "teq-fp")}
    finished = {}
    for method, job in jobs.items():
        finished[method] = pipeline.run(job.run, Store(own_home / "store"), own_home, Runtime(), None)
    weights = finished["teq-fp"].data["stages"]["weights"]["key"]
    changed = load_file(own_home / "store" / "weights" / weights / "data.safetensors")
    plain = jobs["fp"].run.model.load("float32", "cpu").model.state_dict()
    assert any((changed[name] != plain[name.removeprefix("param/")]).any() for name in changed)
    for one in finished.values():
        counts = one.metrics["overhead"]["values"]
        assert counts["modules"] == counts["original_modules"] > 0
        assert counts["parameters"] == counts["original_parameters"] > 0
        assert counts["latency"] == np.median(one.array("overhead", "ratio")) > 0
    fp, folded = (one.metrics["python-docs"]["values"]["ppl"] for one in finished.values())
    assert folded == pytest.approx(fp, rel=1e-5)


def test_an_altered_architecture_is_refused(tiny):
    lm = tiny("llama")
    lm.model.model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"not of its original architecture.*extra"):
        Overhead(length=8, repeats=3).measure(lm, Runtime())
