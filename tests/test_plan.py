"""`python -m teq plan`: true without loading a weight."""

import json
import re
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from teq import config
from teq.__main__ import main
from teq.device import host_memory, waiting
from teq.device.live_bytes import LiveBytes
from teq.device.runtime import STRATEGIES, Runtime
from teq.evaluate.workload import WORKLOADS
from teq.files import disk
from teq.pipeline import estimate, forecast
from teq.transforms.teq.settings import HELD_OUT

TINY = ["model=tiny-llama", "method=teq+gptq", "train.length=64", "train.steps=10", "gptq.samples=4"]
TINY += ["gptq.length=64", "evals=[python-docs,lastword-python-docs]", "ppl.context=64", "ppl.limit=5"]


BOTH = ("keep (picked)", "stream")


def rows(text):
    """The table's cells by stage and strategy."""
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {(stage, strategy): (size, seconds) for stage, size, _, _, strategy, seconds in cells[2:]}


def test_every_stage_is_planned_without_weights(no_weights, capsys):
    assert main(["plan", *TINY]) == 0
    out = capsys.readouterr().out
    found = rows(out)
    assert list(found) == [
        ("scales", "keep (picked)"),
        ("scales", "checkpoint"),
        ("scales", "stream"),
        *((stage, s) for stage in ("weights", "python-docs", "lastword-python-docs") for s in BOTH),
    ]
    (job,) = config.jobs(TINY)
    kept = estimate.estimate(
        job.run.transform, job.run.model.source.dimensions(), job.run.model.arch, "float32", "keep"
    )
    assert found["scales", "keep (picked)"][0] == f"{kept.bytes / 1e6:.2f} MB"
    assert (
        found["lastword-python-docs", "keep (picked)"][0].startswith("~")
        and "~ an estimate from the lengths" in out
    )
    assert "seconds are known after `python -m teq plan --calibrate model=tiny-llama" in out


def test_the_reference_of_a_divergence_is_planned(no_weights, own_home, capsys):
    """Its hidden states are mapped from the files in which finished windows are kept."""
    sizes = {}
    argv = ["model=tiny-llama", "method=rtn", "evals=[python-docs]", "ppl.context=64", "ppl.limit=5000"]
    for place in ("device=cpu", "memory=40GB"):
        assert main(["plan", *argv, "ppl.kl=true", place]) == 0
        found = rows(capsys.readouterr().out)
        names = [name for name, _ in found]
        assert names.index("reference/python-docs") + 2 == names.index("python-docs")
        sizes[place] = float(found["reference/python-docs", "keep (picked)"][0].removesuffix(" MB"))
    (job,) = config.jobs(argv)
    kept = 5000 * 64 * job.run.model.source.dimensions().hidden_size * 4 / 1e6
    assert 0 < sizes["memory=40GB"] < kept and 0 < sizes["device=cpu"] < kept


def test_hidden_states_that_the_host_has_no_memory_for_are_planned_on_disk(no_weights, monkeypatch, capsys):
    argv = [*TINY, "train.objective=block", "gptq.samples=64", "finetune=scales", "tune.length=64"]
    argv.append("evals=[python-docs]")

    def planned():
        assert main(["plan", *argv, "memory=stream", "device=cpu"]) == 0
        lines = [line.split("|") for line in capsys.readouterr().out.splitlines() if "| stream" in line]
        return {
            cells[1].strip(): [float((c.strip(" ~").split() or [0])[0]) for c in (cells[2], cells[4])]
            for cells in lines
        }

    roomy = planned()
    monkeypatch.setattr(waiting, "fits", lambda size: not size)
    full = planned()
    (job,) = config.jobs(argv)
    states = {"weights": 64 * 64, "tuned": job.run.finetune.waiting_tokens, "python-docs": 5 * 64}
    states["scales"] = 2 * (10 + HELD_OUT) * 64  # a block's inputs, and what the float model's puts out
    for stage, tokens in states.items():
        size = tokens * job.run.model.source.dimensions().hidden_size * 4 / 1e6
        assert roomy[stage][0] - full[stage][0] == pytest.approx(size, abs=0.02)
        assert full[stage][1] - roomy[stage][1] == pytest.approx(size, abs=0.02)


@pytest.mark.parametrize("limit", [2, 9])
def test_the_references_prediction_is_within_15_percent(own_home, monkeypatch, limit):
    """But for what is mapped from files."""
    plain = disk.read_tensors

    def mapped(*given):
        with _disable_current_modes():  # the counter's among them
            return plain(*given)

    monkeypatch.setattr(disk, "read_tensors", mapped)
    argv = ["model=tiny-llama", "method=rtn", "evals=[python-docs]", "ppl.kl=true", "ppl.context=96"]
    (job,) = config.jobs([*argv, f"ppl.limit={limit}"])
    run, lm = job.run, job.run.model.load("float32", "cpu")
    (planned,) = (
        stage
        for stage in forecast.stages(run, lm.model.config, forecast.target("cpu", "auto"), "auto", 8)
        if stage.name == "reference/python-docs" and stage.strategy == "keep (picked)"
    )
    # in inference mode nobody counts a linear's operations
    with mock.patch("torch.inference_mode", torch.no_grad), torch.no_grad(), LiveBytes() as live:
        kept = run.evals[0].reference(lm, Runtime(device="cpu", partial=own_home))
    weights = sum(p.nbytes for p in lm.model.parameters())
    assert planned.bytes == pytest.approx(weights + live.peak, rel=0.15)
    assert planned.flops == pytest.approx(live.flops, rel=0.01) and len(kept) == limit


def test_a_model_of_the_hub_is_planned_without_the_hub(no_weights, capsys):
    argv = ["model=bloom-560m", "method=rtn", "evals=[wikitext2]", "memory=offload", "device=cpu"]
    assert main(["plan", *argv]) == 0
    out = capsys.readouterr().out
    assert "559,214,592 parameters, 1.12 GB in bfloat16" in out


@pytest.fixture(scope="module")
def counted():
    """What LLaMA-13B needs, by stage and strategy: counted once for all budgets."""
    return {}


@pytest.fixture
def llama(counted, no_weights, monkeypatch):
    """The command of docs/memory.md for LLaMA-13B."""
    plain = estimate.estimate

    def need(stage, sizes, arch, dtype, strategy, device):
        key = (stage, strategy, device)
        counted[key] = counted.get(key) or plain(stage, sizes, arch, dtype, strategy, device)
        return counted[key]

    monkeypatch.setattr(estimate, "estimate", need)
    return ["plan", *LLAMA]


LLAMA = ["model=llama-13b", "method=teq+gptq", "grid=w4", "evals=[wikitext2,piqa]"]


def test_a_model_that_does_not_fit_here_is_planned_all_the_same(llama, monkeypatch, capsys):
    monkeypatch.setattr(host_memory, "available", lambda: 24 * 10**9)
    assert main(llama) == 0
    out = capsys.readouterr().out
    assert list(rows(out)) == [
        ("scales", "keep"),
        ("scales", "checkpoint"),
        ("scales", "stream (picked)"),
        *((stage, s) for stage in ("weights", "wikitext2", "piqa") for s in ("keep", "stream (picked)")),
    ]
    assert "does not fit" not in out


@pytest.mark.parametrize(
    ("amount", "picked", "waiting", "over"),
    [
        ("40GB", "keep", "keep (picked)", []),
        ("33GB", "keep", "keep (picked)", []),
        ("29GB", "checkpoint", "stream (picked)", []),
        ("8GB", "offload", "stream (picked)", []),
        ("1GB", None, "stream", ["scales", "weights", "wikitext2", "piqa"]),
    ],
)
def test_a_named_budget_is_a_gpu_of_that_size_on_any_machine(amount, picked, waiting, over, llama, capsys):
    assert main([*llama, f"memory={amount}", "device=cuda:5"]) == 0
    out = capsys.readouterr().out
    strategies = [strategy for stage, strategy in rows(out) if stage == "scales"]
    assert strategies == [f"{s} (picked)" if s == picked else s for s in STRATEGIES]
    assert f"on a GPU of {amount}\n" in out and ("weights", waiting) in rows(out)
    (said,) = [line for line in out.splitlines() if line.startswith("does not fit")] or [""]
    assert re.findall(r"([\w-]+) \(", said) == over


def test_a_cpu_by_name_is_a_cpu_of_the_named_memory(no_weights, capsys):
    argv = ["model=tiny-llama", "method=rtn", "evals=[python-docs]", "memory=40GB"]
    assert main(["plan", *argv, "device=cpu"]) == 0
    assert "on cpu (40.00 GB may be used)" in capsys.readouterr().out
    assert main(["plan", *argv, "device=tpu"]) == 2
    assert "device=tpu is not allowed" in capsys.readouterr().err


@pytest.mark.parametrize(("model", "size"), [("llama-7b", "14.37 GB"), ("llama-13b", "27.43 GB")])
def test_packed_codes_leave_the_gpu(model, size, no_weights, capsys):
    plain = [f"model={model}", "method=rtn", "grid=w4_g128", "evals=[wikitext2]", "memory=80GB"]
    assert main(["plan", *plain]) == 0
    assert rows(capsys.readouterr().out)["weights", "keep (picked)"][0] == size


def test_a_tasks_limit_and_batch_size_count(no_weights, own_home, capsys):
    (job,) = config.jobs(["model=opt-125m", "method=fp", "evals=[piqa]"])
    own_home.mkdir()
    (own_home / forecast.RATES).write_text(json.dumps({forecast.rate_name("cpu", job.run.dtype): 1e9}))
    found = []
    for more in ([], ["tasks.limit={piqa: 183, hellaswag: 7}"], ["tasks.batch_size=2"]):
        assert main(["plan", "model=opt-125m", "method=fp", "evals=[piqa]", *more]) == 0
        found.append(rows(capsys.readouterr().out)["piqa", "keep (picked)"])
    (whole, few, small) = ((float(size[1:-3]), float(seconds[1:])) for size, seconds in found)
    assert few[0] == whole[0] > small[0]
    assert few[1] == pytest.approx(whole[1] * 183 / WORKLOADS["piqa"].documents, rel=0.01)
