"""Predicted memory is what a real step uses; strategies fit the budget and change once when it runs out."""

import pytest
import torch
from tiny_jobs import STEP, job_of

from teq import config
from teq.device import memory
from teq.device.runtime import Runtime
from teq.pipeline import run as pipeline
from teq.pipeline import store
from teq.spec import UserError
from teq.transforms.teq import train


@pytest.mark.parametrize("amount", ["much", "40", "-1GB", "40 GB", "0.5TB"])
def test_a_budget_that_is_none_is_refused(amount):
    with pytest.raises(UserError, match=r"memory=.* is not allowed: it must be auto, an amount such as 40GB"):
        memory.check(amount)


def test_memory_that_runs_out_is_met_once_and_nothing_trained_is_lost(own_home, monkeypatch, caplog):
    job, seen = job_of("llama", "memory=keep"), []
    plain = train.Trainer.loss

    def loss(self, model, *batch):
        seen.append(len(seen))
        if seen[-1] == 2:
            raise torch.OutOfMemoryError("2 GB more were asked for")
        return plain(self, model, *batch)

    def result(home):
        return pipeline.run(job.run, store.Store(home / "store"), home, Runtime(memory="keep"), None)

    undisturbed = result(own_home / "a").data["training"]
    monkeypatch.setattr(train.Trainer, "loss", loss)
    disturbed = result(own_home / "b").data["training"]
    for key in ("loss", "scales"):
        assert disturbed[key] == undisturbed[key]
    assert (undisturbed["planned_strategy"], undisturbed["strategy"]) == ("keep", "keep")
    assert (disturbed["planned_strategy"], disturbed["strategy"]) == ("keep", "checkpoint")
    assert len(seen) == 4  # steps 0, 1, 2 (lost), 2: the first two were not trained again
    assert "going on with checkpoint" in caplog.text

    monkeypatch.setattr(
        train.Trainer, "loss", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("still"))
    )
    with pytest.raises(UserError, match="memory ran out with strategy checkpoint"):
        result(own_home / "c")


@pytest.mark.parametrize(
    ("given", "fit"),
    [("auto", True), ("keep", True), ("offload", False), ("150MB", True), ("100MB", False)],
)
def test_what_comes_beside_a_model_fits_or_not(given, fit, monkeypatch):
    # free in addition to the weights: 30 MB, and 20 MB that PyTorch holds without using them
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (30_000_000, 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 120_000_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 100_000_000)
    assert memory.fits(40_000_000, 100_000_000, Runtime(device="cuda:0", memory=given)) is fit
    assert memory.fits(40_000_000, 100_000_000, Runtime(device="cpu", memory=given))
    if given == "auto":
        assert not memory.fits(46_000_000, 100_000_000, Runtime(device="cuda:0"))


@pytest.mark.parametrize(
    ("error", "known"),
    [
        (torch.OutOfMemoryError("2 GB"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (UserError("out of memory"), False),
    ],
)
def test_the_ways_in_which_memory_is_said_to_have_run_out(error, known):
    assert memory.exhausted(error) is known


def test_a_search_without_memory_is_streamed_and_then_given_up(own_home, monkeypatch):
    (job,) = config.jobs(["model=tiny-llama", "method=smoothquant", *STEP[3:]])
    tried = []

    def fit(_, __, runtime, *___):
        tried.append(runtime.strategy)
        raise torch.OutOfMemoryError("2 GB")

    monkeypatch.setattr(type(job.run.transform), "fit", fit)
    with pytest.raises(UserError, match=r"memory ran out with strategy stream .* what was finished is kept"):
        pipeline.run(job.run, store.Store(own_home / "store"), own_home, Runtime(), None)
    assert tried == ["keep", "stream"]
