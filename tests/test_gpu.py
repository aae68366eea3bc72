"""What only a GPU can show. On a machine without one all of it is skipped."""

import dataclasses

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

from teq import config, memory
from teq.arch import blocks
from teq.grid import Grid, fake_quant
from teq.quantizers.gptq_blocks import quantize_blocks
from teq.spec import STRATEGIES, Runtime
from teq.transforms import fused, training

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = torch.device("cuda:0")


def loaded(family, method, device):
    """The run's settings and its tiny model on `device`."""
    (job,) = config.jobs([f"model=tiny-{family}", f"method={method}", "group_size=16"])
    return job.run, job.run.model.load("float32", device)


def test_all_strategies_train_the_same_scales(family):
    trained = {}
    for strategy in STRATEGIES:
        run, lm = loaded(family, "teq", "cpu" if strategy == "offload" else str(GPU))
        settings = dataclasses.replace(run.transform, steps=5)
        tokens = torch.randint(200, (5, 48), generator=torch.Generator().manual_seed(0))
        runtime = Runtime(device=str(GPU), strategy=strategy)
        trained[strategy], _ = training.train(settings, lm.model, lm.arch, tokens, lambda *_: None, runtime)
    for strategy in ("checkpoint", "offload"):
        for name, s in trained["keep"].items():
            torch.testing.assert_close(trained[strategy][name].cpu(), s.cpu(), rtol=1e-5, atol=1e-6)


def test_gptq_gives_the_same_codes_wherever_hidden_states_wait(family):
    found = []
    for waiting in (None, torch.device("cpu")):
        run, lm = loaded(family, "gptq", str(GPU))
        tokens = torch.randint(200, (6, 48), generator=torch.Generator().manual_seed(0))
        found.append(quantize_blocks(run.quantizer, lm, {}, tokens, waiting)[0])
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_offload_never_holds_more_than_a_few_blocks_however_far_the_host_runs_ahead():
    """What is reserved counts: memory that waits for the device to be done with it is not allocated."""
    (job,) = config.jobs(["model=tiny-llama", "method=teq", "group_size=64"])
    dimensions = job.run.model.config()
    dimensions.num_hidden_layers, dimensions.hidden_size, dimensions.intermediate_size = 24, 1024, 4096
    model = AutoModelForCausalLM.from_config(dimensions).eval().requires_grad_(False)
    block = sum(p.nbytes for p in next(iter(blocks(model, job.run.model.arch).values())).parameters())
    settings = dataclasses.replace(job.run.transform, steps=3)
    tokens = torch.randint(200, (3, 48), generator=torch.Generator().manual_seed(0))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    runtime = Runtime(device=str(GPU), strategy="offload")
    training.train(settings, model, job.run.model.arch, tokens, lambda *_: None, runtime)
    assert torch.cuda.max_memory_reserved() - before < 8 * block


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_predicted_memory_is_what_is_allocated(strategy):
    (job,) = config.jobs(["model=tiny-llama", "method=teq", "group_size=64", "train.length=256"])
    dimensions = job.run.model.config()
    dimensions.num_hidden_layers, dimensions.hidden_size, dimensions.intermediate_size = 12, 512, 2048
    run = job.run
    predicted = memory.need(run.transform, dimensions, run.model.arch, "bfloat16", strategy).bytes
    model = AutoModelForCausalLM.from_config(dimensions, dtype=torch.bfloat16).eval().requires_grad_(False)
    model.to("cpu" if strategy == "offload" else GPU)
    settings = dataclasses.replace(run.transform, steps=3)
    tokens = torch.randint(200, (3, 256), generator=torch.Generator().manual_seed(0))
    there = 0 if strategy == "offload" else sum(p.nbytes for p in model.parameters())
    others = torch.cuda.memory_allocated() - there
    torch.cuda.reset_peak_memory_stats()
    runtime = Runtime(device=str(GPU), strategy=strategy)
    training.train(settings, model, run.model.arch, tokens, lambda *_: None, runtime)
    assert torch.cuda.max_memory_allocated() - others == pytest.approx(predicted, rel=0.15)


def test_every_shape_of_every_grid_has_a_compiled_pass_of_the_plain_ones_bits():
    for grid in (Grid(bits=3, group_size=-1), Grid(bits=3, group_size=32), Grid(bits=4, group_size=64)):
        quantize, name = fused.chosen(grid, GPU, torch.bfloat16)
        assert name == "compiled"
        counters.clear()
        generator = torch.Generator(GPU).manual_seed(1)
        for rows in range(64, 64 + 12 * 8, 8):
            weight = torch.nn.Parameter(torch.randn(rows, 80, device=GPU, generator=generator).bfloat16())
            s = torch.rand(80, device=GPU, generator=generator) + 0.1
            assert torch.equal(quantize(weight, s), fake_quant(weight.detach().float() * s, grid))
        assert counters["stats"]["unique_graphs"] == 12
