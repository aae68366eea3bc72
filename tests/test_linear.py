"""The linears that TEQ trains through."""

import pytest
import torch
from torch.nn import functional

from teq.data.texts import Calibration
from teq.grid import Grid, fake_quant
from teq.transforms.teq import fake_quant as fused
from teq.transforms.teq.linear import ScaledFakeQuantLinears
from teq.transforms.teq.settings import Teq


def teq(**changes):
    values = {"init": "ones", "steps": 20, "lr": 0.01, "batch": 1, "length": 48}
    values |= {
        "grid": Grid(bits=3, group_size=16),
        "parameter": "clip",
        "profile": "paper",
        "calib": Calibration(),
    }
    return Teq(**{**values, **changes})


class AutogradLinear(torch.autograd.Function):
    """Straight-through rounding alone; everything else is left to autograd."""

    @staticmethod
    def forward(ctx, weight, grid):
        return fake_quant(weight, grid)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


@pytest.mark.parametrize("group_size", [-1, 8, 12])
def test_closed_form_gradient_equals_autograd(group_size):
    generator = torch.Generator().manual_seed(0)
    grid = Grid(bits=3, group_size=group_size)
    x = torch.randn(2, 5, 32, generator=generator, dtype=torch.float64, requires_grad=True)
    s = torch.rand(32, generator=generator, dtype=torch.float64).add(0.5).requires_grad_()
    weights = [torch.randn(n, 32, generator=generator, dtype=torch.float64) for n in (7, 3)]
    biases = (torch.randn(7, generator=generator, dtype=torch.float64), None)
    dys = [torch.randn(2, 5, n, generator=generator, dtype=torch.float64) for n in (7, 3)]
    ours = ScaledFakeQuantLinears.apply(x, s, fused.Eager(grid), biases, *weights)
    plain = [
        functional.linear(x / s, AutogradLinear.apply(weight * s, grid), bias)
        for weight, bias in zip(weights, biases, strict=True)
    ]
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=0)
    gradients = (torch.autograd.grad(outputs, (x, s), dys) for outputs in (ours, plain))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_nothing_of_the_weights_size_is_kept_for_backward(tiny, family):
    lm = tiny(family)
    frozen = {p.data_ptr() for p in lm.model.parameters()}
    sizes = {p.shape for p in lm.model.parameters() if p.ndim == 2}
    sizes |= {torch.Size(reversed(shape)) for shape in sizes}
    kept = []

    def pack(tensor):
        if tensor.shape in sizes and tensor.data_ptr() not in frozen:
            kept.append(tuple(tensor.shape))
        return tensor

    tokens = torch.randint(258, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        teq(steps=1, length=40).train_on(lm.model, lm.arch, tokens)
    assert not kept
