"""Starts of TEQ's scales that a search finds, and the best scales on held-out windows."""

import copy
import dataclasses

import pytest
import torch

from teq import config
from teq.data.texts import Calibration, calibration
from teq.device.runtime import STRATEGIES, Runtime
from teq.grid import Grid
from teq.models.fold import folded_tensors, site_scales
from teq.models.loss import causal_loss
from teq.quantizers.quantized import restore
from teq.quantizers.rtn import Rtn
from teq.spec import UserError
from teq.transforms.awq.settings import Awq
from teq.transforms.smoothquant import SmoothQuant
from teq.transforms.teq.settings import HELD_OUT, SEARCHES, Teq

GRID, TEXT = Grid(bits=3, group_size=16), Calibration(corpus="python-docs")
SEARCH = {
    "awq": Awq(grid=GRID, calib=TEXT, samples=3, length=40, ratios=4, clip=False),
    "smoothquant": SmoothQuant(calib=TEXT, samples=3, length=40),
}


def teq(init="ones", **changes):
    values = {"steps": 20, "lr": 0.01, "batch": 1, "length": 48, "parameter": "log", "profile": "paper"}
    return Teq(**{**values, "grid": GRID, "calib": TEXT, "init": init, **SEARCH, **changes})


def fitted(transform, lm, **runtime):
    return transform.fit(lambda: lm, Runtime(**runtime), lambda *_: None)


def held_out_loss(lm, settings, scales):
    """Of the folded, stored and restored model, on the windows that the settings hold out."""
    model = copy.deepcopy(lm.model)
    stored, _ = Rtn(grid=GRID).quantize(lambda: lm, folded_tensors(scales), Runtime())
    restore(model, stored, GRID)
    windows = dataclasses.replace(settings, keep="best").held_out(lm.tokenizer)
    return sum(causal_loss(model, window[None]).item() for window in windows) / len(windows)


@pytest.mark.parametrize("init", SEARCHES)
def test_a_searched_start_is_what_the_search_finds(tiny, family, init):
    lm = tiny(family, "float32", "sites=all")
    found, _ = fitted(SEARCH[init], lm)
    trained, info = fitted(teq(init, steps=0), lm)
    for name, s in site_scales(found).items():
        torch.testing.assert_close(trained[name], s, rtol=1e-6, atol=0)  # exp(log s)
        assert torch.equal(trained[f"start/{name}"], trained[name])
    assert trained.keys() == {f"{p}{n}" for n in site_scales(found) for p in ("", "start/", "last/")}
    assert info["held_out"]["kept"] == "start" and info["search"]["sites"] == info["sites"]


@pytest.mark.parametrize("init", ["ones", *SEARCHES])
def test_the_best_scales_are_those_of_the_lowest_held_out_loss(tiny, init):
    lm = tiny("llama")
    settings = teq(init, keep="best", lr=0.02)
    trained, info = fitted(settings, lm)
    start = {name: trained[f"start/{name}"] for name in info["sites"]}
    held = info["held_out"]
    assert held["kept"] in ("between", "last") and held["windows"] == HELD_OUT
    assert held["best"] < held["start"] and held["best"] <= held["last"]
    assert held_out_loss(lm, settings, start) == pytest.approx(held["start"], rel=1e-4)
    assert held_out_loss(lm, settings, trained) == pytest.approx(held["best"], rel=1e-4)
    last, _ = fitted(dataclasses.replace(settings, keep="last"), lm)
    assert held_out_loss(lm, settings, last) == pytest.approx(held["last"], rel=1e-4)


def test_training_that_gets_worse_ends_where_it_began(tiny, caplog):
    lm, settings = tiny("llama"), teq("awq", steps=4, lr=8.0)
    held_out = settings.held_out(lm.tokenizer)
    windows = settings.windows(lm.tokenizer)
    there = held_out.repeat(10, 1)
    good, _ = teq(steps=40, lr=0.02).train_on(lm.model, lm.arch, there, held_out=held_out)
    trained, info = settings.train_on(lm.model, lm.arch, windows, start=site_scales(good), held_out=held_out)
    assert info["held_out"]["kept"] == "start" and info["held_out"]["last"] > info["held_out"]["start"]
    assert all(torch.equal(trained[name], trained[f"start/{name}"]) for name in info["sites"])
    assert "no step lowered the loss on the held-out windows" in caplog.text


def test_measuring_changes_no_step(tiny):
    """Losses and last scales are those of a training that measures nothing, with dropout too."""
    lm = tiny("opt")
    for profile in ("paper", "inc"):
        runs = {k: fitted(teq(keep=k, profile=profile), lm) for k in ("last", "best")}
        assert runs["best"][1]["loss"] == runs["last"][1]["loss"]


def test_no_strategy_changes_the_best_scales(tiny):
    lm = tiny("llama")
    (kept, first), *others = (fitted(teq(keep="best", steps=6), lm, strategy=s) for s in STRATEGIES)
    for scales, info in others:
        assert info["held_out"] == first["held_out"]
        assert all(torch.equal(kept[name], scales[name]) for name in kept)


def test_an_interrupted_training_keeps_the_same_best_scales(tiny, tmp_path):
    lm, settings = tiny("llama"), teq("smoothquant", steps=12, lr=0.5)
    expected, whole = fitted(settings, lm)

    def fail(step, _):
        if step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        settings.fit(lambda: lm, Runtime(partial=tmp_path), fail)
    resumed, info = fitted(settings, lm, partial=tmp_path)
    assert info["held_out"] == whole["held_out"]
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_held_out_windows_follow_those_of_the_steps(tiny):
    tokenizer, settings = tiny("llama").tokenizer, teq(keep="best")
    windows, held_out = settings.windows(tokenizer), settings.held_out(tokenizer)
    assert torch.equal(torch.cat([windows, held_out]), calibration(TEXT, tokenizer, 20 + HELD_OUT, 48))
    assert torch.equal(windows, teq(keep="last").windows(tokenizer))
    assert teq(keep="last").held_out(tokenizer) is None


def test_a_searched_start_without_a_search_is_refused():
    with pytest.raises(UserError, match=r"init=awq needs the settings of that search and its calibration"):
        teq("awq", awq=None)


def test_settings_of_a_search_are_in_the_key_where_it_is_used():
    def run(*overrides):
        (job,) = config.jobs(["model=tiny-llama", "method=teq", "evals=[python-docs]", *overrides])
        return job.run

    plain = run()
    assert plain.key() == run("awq.samples=7", "smoothquant.alpha=0.3", "train.keep=last").key()
    assert not {"awq", "smoothquant", "keep"} & plain.transform.plain().keys()
    assert run("train.keep=best").key() != plain.key()
    awq = run("init=awq")
    assert awq.transform.keep == "best" and awq.transform.awq.clip is False
    assert awq.key() == run("init=awq", "smoothquant.alpha=0.3").key() != plain.key()
    assert awq.key() != run("init=awq", "awq.samples=7").key()
    assert run("init=smoothquant").key() != run("init=smoothquant", "smoothquant.alpha=0.3").key()
    assert run("init=awq", "train.keep=last").transform.keep == "last"


@pytest.mark.parametrize(("init", "steps"), [("awq", 3), ("smoothquant", 3), ("awq", 0)])
def test_a_run_from_a_searched_start_says_what_was_kept(own_home, init, steps):
    from teq.pipeline.run import run
    from teq.pipeline.store import Store

    small = [f"{group}.{key}" for group in SEARCHES for key in ("samples=2", "length=48")]
    overrides = [f"train.steps={steps}", "ppl.limit=2", "ppl.context=64", "evals=[python-docs]", "sites=all"]
    (job,) = config.jobs(["model=tiny-llama", "method=teq", f"init={init}", *small, *overrides])
    data = run(job.run, Store(own_home / "store"), own_home, Runtime(), None).data
    assert data["training"]["held_out"]["kept"] in ("start", "between", "last")
    assert data["run"]["transform"][init]["samples"] == 2 and len(data["training"]["loss"]) == steps
