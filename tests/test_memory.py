"""Predicted memory is what a real step uses; strategies fit the budget and change once when it runs out."""

import dataclasses
import gc
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM

from teq import config
from teq.device import memory, offload
from teq.device.live_bytes import LiveBytes
from teq.device.runtime import Runtime
from teq.models.arch import blocks
from teq.models.checkpoint import LM, Checkpoint
from teq.pipeline import estimate, loaded, store
from teq.pipeline import run as pipeline
from teq.quantizers.gptq import blocks as gptq_blocks
from teq.spec import UserError
from teq.transforms.teq import train
from teq.transforms.teq.settings import Teq

STEP = [
    "method=teq",
    "train.length=96",
    "train.steps=3",
    "evals=[python-docs]",
    "ppl.limit=1",
    "ppl.context=64",
]


def job_of(family, *overrides):
    return config.jobs([f"model=tiny-{family}", *STEP, *overrides])[0]


@pytest.mark.parametrize("strategy", ["keep", "checkpoint", "offload"])
@pytest.mark.parametrize("batch", [1, 3])
def test_prediction_is_within_15_percent_of_a_real_step(family, strategy, batch):
    run = job_of(family, f"train.batch={batch}").run
    wanted = run.model.source.dimensions()
    wanted.num_hidden_layers = 7  # the prediction looks at two and at three
    predicted = estimate.estimate(run.transform, wanted, run.model.arch, "float32", strategy)
    model = AutoModelForCausalLM.from_config(wanted).eval().requires_grad_(False)
    with LiveBytes() as live:
        run.transform.dry_run(LM(model, None, run.model.arch, ""), strategy)
    waiting = blocks(model, run.model.arch).values() if strategy == "offload" else ()
    elsewhere = sum(p.nbytes for block in waiting for p in block.parameters())
    weights = sum(p.nbytes for p in model.parameters()) - elsewhere
    assert predicted.flops == live.flops
    assert predicted.bytes - weights == pytest.approx(live.peak, rel=0.15)
    assert live.live < live.peak / 2


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


def test_live_bytes_counts_a_storage_once_and_only_while_it_lives():
    given = torch.ones(1000)
    with LiveBytes() as live:
        view = (given * 2)[:500]  # 4000 bytes, kept alive by a view
        given.add_(1)
        torch.exp(view)  # 2000 bytes more, at once gone
    assert (live.live, live.peak) == (4000, 6000)
    del view
    assert live.live == 0


def test_the_first_strategy_that_fits_is_chosen(monkeypatch):
    job = job_of("llama")
    needed = {"keep": 3_000_000, "checkpoint": 2_000_000, "offload": 1_000_000}
    monkeypatch.setattr(estimate, "estimate", lambda *args: memory.Estimate(needed[args[-1]], 0))

    def chosen(amount, device="cuda:0"):
        runtime = Runtime(device=device, memory=amount)
        return estimate.choose(
            job.run.transform, job.run.model.source.dimensions, job.run.model.arch, "float32", runtime
        )

    assert [chosen(amount) for amount in ("3MB", "2.5MB", "1MB", "offload")] == [
        "keep",
        "checkpoint",
        "offload",
        "offload",
    ]
    with pytest.raises(UserError, match=r"memory=0.5MB .* the least that would do is memory=1.01MB"):
        chosen("0.5MB")
    with pytest.raises(UserError, match=r"the least that would do is memory=2.01MB, with checkpoint"):
        chosen("1MB", device="cpu")


@pytest.mark.parametrize("size", [1, 999_999, 26_043_210_000, 1_000_000_000])
def test_the_least_that_would_do_does(size):
    assert size < memory.budget(estimate._amount(size), "cpu") <= size + 10**7


@pytest.mark.parametrize("amount", ["much", "40", "-1GB", "40 GB", "0.5TB"])
def test_a_budget_that_is_none_is_refused(amount):
    with pytest.raises(UserError, match=r"memory=.* is not allowed: it must be auto, an amount such as 40GB"):
        memory.check(amount)


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


def test_memory_that_runs_out_is_met_once_and_nothing_trained_is_lost(own_home, monkeypatch, caplog):
    job, seen = job_of("llama", "memory=keep"), []
    plain = train.Trainer.loss

    def loss(self, model, tokens):
        seen.append(len(seen))
        if seen[-1] == 2:
            raise torch.OutOfMemoryError("2 GB more were asked for")
        return plain(self, model, tokens)

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


def test_offload_holds_three_blocks_at_most_and_copies_each_twice_a_step(monkeypatch):
    run = job_of("llama").run
    dimensions = run.model.source.dimensions()
    dimensions.num_hidden_layers = count = 7
    model = AutoModelForCausalLM.from_config(dimensions).eval().requires_grad_(False)
    alive, most, copies = weakref.WeakSet(), [], []
    plain = offload.Stream._copied

    def copied(self, index):
        parameters = plain(self, index)
        copies.append(index)
        alive.add(parameters["block.mlp.down_proj.weight"])
        most.append(len(alive))
        return parameters

    monkeypatch.setattr(offload.Stream, "_copied", copied)
    settings = dataclasses.replace(run.transform, steps=4)
    tokens = torch.randint(200, (4, 32))
    settings.train_on(model, run.model.arch, tokens, Runtime(strategy="offload"))
    assert isinstance(settings, Teq)
    assert max(most) <= 3
    # forward 0 .. n-1, backward n-2 .. 0: the two turning points serve both ways
    assert len(copies) == 4 * (2 * count - 2) + 1


@pytest.mark.parametrize(
    ("given", "fit"),
    [("auto", True), ("keep", True), ("offload", False), ("150MB", True), ("100MB", False)],
)
def test_what_comes_beside_a_model_fits_or_not(given, fit, monkeypatch):
    model = torch.nn.Linear(25_000, 1000, bias=False, device="meta")  # 100 MB
    # free in addition to the weights: 30 MB, and 20 MB that PyTorch holds without using them
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (30_000_000, 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 120_000_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 100_000_000)
    assert memory.fits(40_000_000, model, Runtime(device="cuda:0", memory=given)) is fit
    assert memory.fits(40_000_000, model, Runtime(device="cpu", memory=given))
    if given == "auto":
        assert not memory.fits(46_000_000, model, Runtime(device="cuda:0"))


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


def test_gptq_goes_on_with_its_hidden_states_in_host_memory(monkeypatch, caplog):
    (job,) = config.jobs(["model=tiny-llama", "method=gptq", "gptq.samples=2", "gptq.length=16"])
    loaded, waited = [], []

    def load():
        loaded.append(job.run.model.load("float32", "cpu"))
        return loaded[-1]

    def quantize(*_, waiting, **__):
        waited.append(waiting)
        if waiting is None:
            raise torch.OutOfMemoryError("2 GB")
        return {}, {"gptq": {}}

    monkeypatch.setattr(gptq_blocks, "quantize_blocks", quantize)
    job.run.quantizer.quantize(load, {}, Runtime(device="cuda:0", memory="keep"))
    assert waited == [None, "cpu"] and len(loaded) == 2
    assert "GPTQ: its hidden states go to the host" in caplog.text
    with pytest.raises(torch.OutOfMemoryError):
        job.run.quantizer.quantize(load, {}, Runtime(device="cpu"))


@pytest.fixture
def only_counted_references():
    """Without the garbage collector, which may or may not come in time: cycles stay until they are freed."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def in_a_cycle(lm):
    """Make the model of `lm` refer to itself, as a kept traceback would; returns a weak reference to it."""
    lm.model.itself = [lm.model]
    return weakref.ref(lm.model)


def test_a_model_in_a_reference_cycle_is_gone_before_another_is_loaded(monkeypatch, only_counted_references):
    (job,) = config.jobs(["model=tiny-llama"])
    alive, load = [], Checkpoint.load

    def noting(*args):
        alive.append([model() is not None for model in models])
        return load(*args)

    monkeypatch.setattr(Checkpoint, "load", noting)
    models = []
    for _ in range(2):  # two runs, two models each
        bench = loaded.LoadedModel(job.run.model, "float32", "cpu")
        models.append(in_a_cycle(bench.to_use_up()))
        models.append(in_a_cycle(bench.to_use_up()))
        del bench
    assert alive == [[], [False], [False] * 2, [False] * 3]


def test_gptqs_first_model_is_gone_before_the_second_is_loaded(monkeypatch, only_counted_references):
    (job,) = config.jobs(["model=tiny-llama", "method=gptq", "gptq.samples=2", "gptq.length=16"])
    models = []

    def load():
        assert not any(model() is not None for model in models)
        lm = job.run.model.load("float32", "cpu")
        models.append(in_a_cycle(lm))
        return lm

    def quantize(*_, waiting, **__):
        if waiting is None:
            raise torch.OutOfMemoryError("2 GB")
        return {}, {"gptq": {}}

    monkeypatch.setattr(gptq_blocks, "quantize_blocks", quantize)
    job.run.quantizer.quantize(load, {}, Runtime(device="cuda:0", memory="keep"))
    assert len(models) == 2


def test_a_search_that_has_no_other_way_is_not_made_twice(own_home, monkeypatch):
    (job,) = config.jobs(["model=tiny-llama", "method=smoothquant", *STEP[3:]])
    tried = []

    def fit(*_):
        tried.append(1)
        raise torch.OutOfMemoryError("2 GB")

    monkeypatch.setattr(type(job.run.transform), "fit", fit)
    with pytest.raises(torch.OutOfMemoryError):
        pipeline.run(job.run, store.Store(own_home / "store"), own_home, Runtime(), None)
    assert len(tried) == 1
