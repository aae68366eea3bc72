"""The compiled fake quantization is bit-equal to the plain one, or is not used."""

import shutil

import pytest
import torch

from teq.grid import Grid, fake_quant
from teq.transforms import fused

CPU = torch.device("cpu")


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler: install g++")
def test_compiled_codes_are_the_plain_ones_on_every_shape():
    grid = Grid(bits=3, group_size=32)
    quantize, name = fused.compiled(grid, CPU, torch.float32)
    assert name == "compiled"
    generator = torch.Generator().manual_seed(1)
    for shape in ((64, 96), (40, 70)):
        weight, s = torch.randn(shape, generator=generator), torch.rand(shape[1], generator=generator) + 0.1
        expected = fake_quant(weight * s, grid)
        assert torch.equal(quantize(weight, s), expected)
        assert torch.equal(quantize(torch.nn.Parameter(weight), s.requires_grad_()), expected)


def test_a_compiler_that_fails_or_rounds_otherwise_is_not_used(monkeypatch, caplog):
    caplog.set_level("INFO")
    grid, weight = Grid(bits=3, group_size=32), torch.randn(8, 32)

    def broken(*_):
        raise RuntimeError("no compiler")

    def sloppy(weight, s):
        return fused.plain(grid)(weight, s) + 1e-7

    for fake, said in ((broken, "is not compiled: no compiler"), (sloppy, "differs from the plain one")):
        monkeypatch.setattr(torch, "compile", lambda function, fake=fake, **options: fake)
        quantize, name = fused.compiled(grid, CPU, torch.float32)
        assert name == "plain" and said in caplog.text
        assert torch.equal(quantize(weight, None), fake_quant(weight, grid))


def test_a_cpu_takes_the_plain_one():
    assert fused.chosen(Grid(bits=3, group_size=32), CPU, torch.float32)[1] == "plain"
