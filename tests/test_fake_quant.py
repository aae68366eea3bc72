"""The compiled fake quantization is bit-equal to the plain one, is compiled once, or is not used."""

import dataclasses
import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from teq import config
from teq.grid import Grid, fake_quant
from teq.transforms.teq import fake_quant as fused
from teq.transforms.teq import linear

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    """Forget what other tests have compiled, and what this one has."""
    fused.compiled.cache_clear()
    torch._dynamo.reset()
    yield
    fused.compiled.cache_clear()


def graphs(work):
    """How many graphs `work` compiles, and what it returns."""
    before = counters["stats"]["unique_graphs"]
    result = work()
    return counters["stats"]["unique_graphs"] - before, result


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler: install g++")
def test_compiled_codes_are_the_plain_ones_on_every_shape():
    grid = Grid(bits=3, group_size=32)
    quantize = fused.compiled(grid, CPU, torch.float32)
    generator = torch.Generator().manual_seed(1)
    for shape in ((64, 96), (40, 70)):
        weight, s = torch.randn(shape, generator=generator), torch.rand(shape[1], generator=generator) + 0.1
        expected = fake_quant(weight * s, grid)
        assert torch.equal(quantize(weight, s), expected)
        assert torch.equal(quantize(torch.nn.Parameter(weight), s.requires_grad_()), expected)
    assert quantize.name == "compiled"


@pytest.fixture
def without_code(monkeypatch):
    """Make, count and limit graphs as ever, but run them eagerly: making code of them takes seconds."""
    original = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, options, **rest: original(function, backend="eager", **rest)
    )


def trained(tiny, bits):
    """What a training of two steps on a tiny model says of its fake quantization."""
    (job,) = config.jobs(["model=tiny-llama", "method=teq", "group_size=16", f"bits={bits}"])
    lm = tiny("llama")
    tokens = torch.randint(200, (2, 16), generator=torch.Generator().manual_seed(0))
    settings = dataclasses.replace(job.run.transform, steps=2)
    return settings.train_on(lm.model, lm.arch, tokens)[1]["fake_quant"]


def test_a_second_training_compiles_nothing_and_one_past_the_compilers_limit_is_not_called_compiled(
    tiny, monkeypatch, without_code
):
    monkeypatch.setattr(linear, "select_fake_quant", fused.compiled)
    first, name = graphs(lambda: trained(tiny, bits=3))
    assert first > 4 and name == "compiled"
    assert graphs(lambda: trained(tiny, bits=3)) == (0, "compiled")
    with torch._dynamo.config.patch(accumulated_recompile_limit=first + 3):
        assert graphs(lambda: trained(tiny, bits=4)) == (3, "plain")  # given up at the second shape
        assert graphs(lambda: trained(tiny, bits=2)) == (0, "plain")  # given up before the first
        assert graphs(lambda: trained(tiny, bits=3)) == (0, "compiled")  # all its graphs are there


def test_weights_are_the_plain_ones_when_the_compiler_gives_up_between_two_shapes(without_code, caplog):
    caplog.set_level("INFO")
    grid, weight = Grid(bits=3, group_size=32), torch.randn(8, 64)
    quantize = fused.compiled(grid, CPU, torch.float32)
    assert quantize.name == "compiled"
    with torch._dynamo.config.patch(accumulated_recompile_limit=2):
        assert torch.equal(quantize(weight, None), fake_quant(weight, grid))
    assert quantize.name == "plain" and "no longer compiled" in caplog.text


def test_a_compiler_that_is_switched_off_is_not_called_compiled(monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    assert fused.compiled(Grid(bits=3, group_size=32), CPU, torch.float32).name == "plain"
    assert "switched off" in caplog.text


def test_a_compiler_that_fails_or_rounds_otherwise_is_not_used(monkeypatch, caplog):
    caplog.set_level("INFO")
    grid, weight = Grid(bits=3, group_size=32), torch.randn(8, 32)

    def broken(*_):
        raise RuntimeError("no compiler")

    def sloppy(weight, s):
        return fused.Eager(grid)(weight, s) + 1e-7

    for fake, said in ((broken, "is not compiled: no compiler"), (sloppy, "differs from the plain one")):
        fused.compiled.cache_clear()
        monkeypatch.setattr(torch, "compile", lambda function, fake=fake, **options: fake)
        quantize = fused.compiled(grid, CPU, torch.float32)
        assert quantize.name == "plain" and said in caplog.text
        assert torch.equal(quantize(weight, None), fake_quant(weight, grid))


def test_a_cpu_takes_the_plain_one():
    assert fused.select_fake_quant(Grid(bits=3, group_size=32), CPU, torch.float32).name == "plain"
