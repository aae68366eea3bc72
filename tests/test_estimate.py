"""Predicted memory is what a real step uses; strategies fit the budget."""

import pytest
import torch
from tiny_jobs import job_of
from transformers import AutoModelForCausalLM

from teq import config
from teq.device import memory
from teq.device.live_bytes import LiveBytes
from teq.device.runtime import Runtime
from teq.models.arch import blocks
from teq.models.checkpoint import LM
from teq.models.synthetic import architecture
from teq.pipeline import estimate, forecast, store
from teq.pipeline import run as pipeline
from teq.spec import UserError


@pytest.mark.parametrize("strategy", ["keep", "checkpoint", "offload"])
@pytest.mark.parametrize(("family", "batch"), [("opt", 1), ("bloom", 3), ("llama", 3), ("qwen3_moe", 3)])
def test_prediction_is_within_15_percent_of_a_real_step(family, strategy, batch):
    run = job_of(family, f"train.batch={batch}").run
    wanted = run.model.source.dimensions()
    wanted.num_hidden_layers = 7  # the prediction looks at two and at three
    predicted = estimate.estimate(run.transform, wanted, run.model.arch, "float32", strategy)
    model = architecture(wanted).eval().requires_grad_(False)
    with LiveBytes() as live:
        run.transform.dry_run(LM(model, None, run.model.arch, ""), strategy)
    waiting = blocks(model, run.model.arch).values() if strategy == "offload" else ()
    elsewhere = sum(p.nbytes for block in waiting for p in block.parameters())
    weights = sum(p.nbytes for p in model.parameters()) - elsewhere
    assert predicted.flops == live.flops
    assert predicted.bytes - weights == pytest.approx(live.peak, rel=0.15)
    assert live.live < live.peak / 2


def test_a_sweeps_jobs_count_what_they_share_once(monkeypatch):
    """Equal settings of jobs that were composed apart; anything else that is asked for is counted."""
    counted, count = [], estimate._counted
    monkeypatch.setattr(estimate, "_KNOWN", {})
    monkeypatch.setattr(estimate, "_counted", lambda *given: counted.append(1) or count(*given))

    def asked(*overrides, dtype="float32"):
        run = job_of("opt", *overrides).run
        return estimate.estimate(run.transform, run.model.source.dimensions(), run.model.arch, dtype, "keep")

    first = asked()
    assert asked() == asked("method=teq+gptq") == first and len(counted) == 1
    assert asked("train.length=32").bytes < first.bytes and asked(dtype="bfloat16").bytes < first.bytes
    assert len(counted) == 3


def test_training_needs_no_more_than_its_steps_are_predicted_to(family):
    """The check of the sites before training, snapshots and all."""
    run = job_of(family, "train.length=96").run
    config_of_four = run.model.source.dimensions()
    config_of_four.num_hidden_layers = 4
    predicted = estimate.estimate(run.transform, config_of_four, run.model.arch, "float32", "keep").bytes
    model = AutoModelForCausalLM.from_config(config_of_four).eval().requires_grad_(False)
    tokens = torch.randint(200, (3, 96), generator=torch.Generator().manual_seed(0))
    with LiveBytes() as live:
        run.transform.train_on(model, run.model.arch, tokens, Runtime())
    weights = sum(p.nbytes for p in model.parameters())
    assert weights + live.peak <= 1.15 * predicted


def test_the_first_strategy_that_fits_is_chosen(monkeypatch):
    job = job_of("llama")
    needed = {"keep": 3_000_000, "checkpoint": 2_000_000, "offload": 1_000_000, "stream": 800_000}
    monkeypatch.setattr(estimate, "estimate", lambda *args: memory.Estimate(needed[args[4]], 0))

    def chosen(amount, device="cuda:0"):
        runtime = Runtime(device=device, memory=amount)
        return estimate.choose(
            job.run.transform, job.run.model.source.dimensions, job.run.model.arch, "float32", runtime
        )

    assert [chosen(amount) for amount in ("3MB", "2.5MB", "1MB", "0.9MB", "offload")] == [
        "keep",
        "checkpoint",
        "offload",
        "stream",
        "offload",
    ]
    with pytest.raises(
        UserError, match=r"memory=0.5MB .* the least that would do is memory=0.81MB, with stream"
    ):
        chosen("0.5MB")
    with pytest.raises(UserError, match=r"the least that would do is memory=0.81MB, with stream"):
        chosen("0.7MB", device="cpu")
    assert chosen("1MB", device="cpu") == "stream"


def test_a_tuning_that_fits_no_strategy_is_refused_on_a_cpu_too():
    (job,) = config.jobs(["model=tiny-llama", "method=rtn", "finetune=scales", "tune.length=32"])
    source, arch = job.run.model.source, job.run.model.arch
    with pytest.raises(UserError, match=r"memory=0.01MB .* too small .*; shorten tune\.length, lower tune"):
        estimate.choose(job.run.finetune, source.dimensions, arch, "float32", Runtime(memory="0.01MB"))


def test_hidden_states_that_wait_on_the_host_leave_a_gpu_and_no_cpu(monkeypatch):
    (job,) = config.jobs(["model=tiny-llama", "method=gptq", "gptq.samples=4", "gptq.length=32"])
    one = memory.Estimate(3_000_000, 0, movable=2_000_000)
    monkeypatch.setattr(type(job.run.quantizer), "estimate", lambda *_: one)

    def chosen(device):
        how = Runtime(device=device, memory="1.5MB")
        source, arch = job.run.model.source, job.run.model.arch
        monkeypatch.setattr(estimate, "weight_bytes", lambda *_: 1_400_000)
        return estimate.choose(job.run.quantizer, source.dimensions, arch, "float32", how)

    assert (chosen("cuda:0"), chosen("cpu")) == ("keep", "stream")


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        (["method=teq"], {"scales": "offload", "weights": "keep", "python-docs": "keep"}),
        (["method=rtn", "finetune=scales"], {"tuned": "offload", "weights": "keep"}),
    ],
)
def test_a_named_strategy_becomes_the_next_lesser_one_in_a_plan_as_in_a_run(argv, wanted):
    """memory=offload, which only trainings have."""
    (job,) = config.jobs(["model=tiny-llama", *argv, "evals=[python-docs]", "memory=offload"])
    run, target = job.run, forecast.target("cpu", "offload")
    planned = forecast.stages(run, run.model.source.dimensions(), target, "offload", 8)
    picked = {one.name: one.strategy.split()[0] for one in planned if "picked" in one.strategy}
    assert picked.items() >= wanted.items()
    stages = {"scales": run.transform, "weights": run.quantizer, "python-docs": run.evals[0]}
    stages |= {"tuned": run.finetune}
    how = Runtime(memory="offload")
    for name, strategy in wanted.items():
        source, arch = run.model.source, run.model.arch
        assert estimate.choose(stages[name], source.dimensions, arch, "float32", how) == strategy


def test_advice_names_options_that_the_stage_reads():
    (job,) = config.jobs(
        ["model=tiny-llama", "method=teq+gptq", "evals=[python-docs,piqa]", "finetune=scales"]
    )
    run = job.run
    said = [estimate.advice(each) for each in (run.transform, run.quantizer, run.finetune, *run.evals)]
    assert said == [
        "shorten train.length",
        "shorten gptq.length",
        "shorten tune.length",
        "shorten ppl.context",
        "lower tasks.batch_size",
    ]
    (job,) = config.jobs(["model=tiny-llama", "method=rtn"])
    assert "length" not in estimate.advice(job.run.quantizer)


@pytest.mark.parametrize("size", [1, 999_999, 26_043_210_000, 1_000_000_000])
def test_the_least_that_would_do_does(size):
    assert size < memory.budget(estimate._amount(size), "cpu") <= size + 10**7


def test_a_small_budget_changes_the_strategy_and_no_result(own_home):
    job = job_of("llama")
    kept, saved = (
        estimate.estimate(
            job.run.transform, job.run.model.source.dimensions(), job.run.model.arch, "float32", strategy
        ).bytes
        for strategy in ("keep", "checkpoint")
    )
    results = {}
    for name, amount in (("keep", "auto"), ("checkpoint", f"{(kept + saved) / 2e6:.6f}MB")):
        home = own_home / name
        pipeline.run(
            job.run,
            store.Store(home / "store"),
            home,
            Runtime(memory=amount),
            None,
        )
        (folder,) = (f for f in (home / "store" / "scales").iterdir() if f.is_dir())
        results[name] = (folder / store.INFO).read_text(), (folder / store.DATA).read_bytes()
        assert f'"strategy": "{name}"' in results[name][0]
    assert results["keep"][1] == results["checkpoint"][1]
