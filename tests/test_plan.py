"""`python -m teq plan`: true without loading a weight."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from teq import config, memory, plan
from teq.__main__ import main
from teq.models import LM, Checkpoint
from teq.quantizers.gptq_blocks import expected, quantize_blocks
from teq.spec import Runtime

TINY = ["model=tiny-llama", "method=teq+gptq", "train.length=64", "train.steps=10", "gptq.samples=4"]
TINY += ["gptq.length=64", "evals=[python-docs,lastword-python-docs]", "ppl.context=64", "ppl.limit=5"]


@pytest.fixture
def no_weights(monkeypatch):
    """Loading a model is an error."""

    def load(*_):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(Checkpoint, "load", load)


def rows(text):
    """The table's cells by stage and strategy."""
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {(stage, strategy): (size, seconds) for stage, size, strategy, seconds in cells[2:]}


def test_every_stage_is_planned_without_weights(no_weights, capsys):
    assert main(["plan", *TINY]) == 0
    out = capsys.readouterr().out
    found = rows(out)
    assert list(found) == [
        ("scales", "keep (picked)"),
        ("scales", "checkpoint"),
        ("weights", ""),
        ("python-docs", ""),
        ("lastword-python-docs", ""),
    ]
    (job,) = config.jobs(TINY)
    kept = memory.need(job.run.transform, job.run.model.config(), job.run.model.arch, "float32", "keep")
    assert found["scales", "keep (picked)"][0] == f"{kept.bytes / 1e6:.2f} MB"
    assert found["lastword-python-docs", ""] == ("not known", "not known")
    assert "seconds are known after `python -m teq plan --calibrate model=tiny-llama" in out


def test_a_model_of_the_hub_is_planned_without_the_hub(no_weights, capsys):
    assert main(["plan", "model=bloom-560m", "method=teq", "memory=offload", "device=cpu"]) == 0
    out = capsys.readouterr().out
    assert "559,214,592 parameters, 1.12 GB in bfloat16" in out


def test_seconds_follow_from_a_rate(no_weights, own_home, monkeypatch, capsys):
    (job,) = config.jobs(TINY)
    own_home.mkdir()
    (own_home / plan.RATES).write_text(json.dumps({plan._rate_name("cpu", "float32"): 1e6}))
    main(["plan", *TINY])
    found = rows(capsys.readouterr().out)
    two = memory.need(job.run.transform, job.run.model.config(), job.run.model.arch, "float32", "keep")
    assert found["scales", "keep (picked)"][1] == f"{5 * two.flops / 1e6:.0f}"
    assert int(found["weights", ""][1]) > 0 and int(found["python-docs", ""][1]) > 0
    (own_home / plan.RATES).write_text("{")
    assert main(["plan", *TINY]) == 2
    assert "is damaged: delete it and calibrate again" in capsys.readouterr().err


def test_calibration_measures_and_keeps_a_rate(own_home, monkeypatch, capsys):
    small = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 300}
    monkeypatch.setattr(plan, "CALIBRATION", plan.CALIBRATION | small)
    assert main(["plan", "--calibrate", *TINY]) == 0
    (rate,) = json.loads((own_home / plan.RATES).read_text()).values()
    assert 1e6 < rate < 1e15
    assert "not known" not in rows(capsys.readouterr().out)["scales", "keep (picked)"]


def test_a_budget_too_small_names_the_least(no_weights, capsys):
    assert main(["plan", *TINY, "memory=0.1MB"]) == 2
    assert "is too small to train the scales: the least that would do is" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["group_size=-1"], ["gptq.act_order=true", "group_size=16"]])
def test_gptqs_memory_is_within_15_percent(family, options):
    shape = ["gptq.samples=6", "gptq.length=96", "method=gptq", f"model=tiny-{family}", "evals=[python-docs]"]
    (job,) = config.jobs([*shape, *options])
    settings, lm = job.run.quantizer, job.run.model.load("float32", "cpu")
    weights = sum(p.nbytes for p in lm.model.parameters())
    predicted = expected(settings, lm).bytes
    with memory.LiveBytes() as live:
        quantize_blocks(settings, lm, {}, torch.randint(200, (6, 96)))
    assert predicted == pytest.approx(weights + live.peak, rel=0.15)


@pytest.mark.parametrize("overrides", [[], ["group_size=-1", "bits=8"]])
def test_roundings_memory_is_within_15_percent(family, overrides):
    (job,) = config.jobs([f"model=tiny-{family}", "method=rtn", "evals=[python-docs]", *overrides])
    wanted = job.run.model.config()
    wanted.num_hidden_layers = 5  # the prediction looks at two and at three
    predicted = memory.need(job.run.quantizer, wanted, job.run.model.arch, "float32", "keep").bytes
    model = AutoModelForCausalLM.from_config(wanted).eval().requires_grad_(False)
    with memory.LiveBytes() as live:
        job.run.quantizer.quantize(lambda: LM(model, None, job.run.model.arch, ""), {}, Runtime())
    weights = sum(p.nbytes for p in model.parameters())
    assert predicted - weights == pytest.approx(live.peak, rel=0.15)


@pytest.mark.parametrize("options", [[], ["gptq.act_order=true"]])
def test_gptqs_operations_are_those_of_its_matrix_products(family, options):
    """But for what the counter does not know: the factorization and the columns inside a strip."""
    shape = ["gptq.samples=6", "gptq.length=96", "method=gptq", f"model=tiny-{family}", "evals=[python-docs]"]
    (job,) = config.jobs([*shape, *options])
    settings, lm = job.run.quantizer, job.run.model.load("float32", "cpu")
    foreseen = expected(settings, lm).flops
    with memory.LiveBytes() as live:
        quantize_blocks(settings, lm, {}, torch.randint(200, (6, 96)))
    assert foreseen == pytest.approx(live.flops, rel=0.3)
