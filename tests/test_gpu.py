"""What only a GPU can show. On a machine without one all of it is skipped."""

import dataclasses

import pytest
import torch

from teq import config
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


@pytest.mark.parametrize("group_size", [-1, 32])
def test_the_compiled_fake_quantization_has_the_plain_ones_bits(group_size):
    grid = Grid(bits=3, group_size=group_size)
    quantize, name = fused.chosen(grid, GPU, torch.bfloat16)
    assert name == "compiled"
    generator = torch.Generator(GPU).manual_seed(1)
    weight = torch.randn(96, 80, device=GPU, generator=generator).bfloat16()
    s = torch.rand(80, device=GPU, generator=generator) + 0.1
    assert torch.equal(quantize(weight, s), fake_quant(weight.float() * s, grid))
