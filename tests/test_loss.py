"""The chunked loss is the plain loss, and never holds all logits."""

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from teq.models import loss
from teq.models.arch import families
from teq.models.head import Head


class Largest(TorchDispatchMode):
    """The most elements that any tensor made inside has."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("tokens", [1, loss.CHUNK, 2 * loss.CHUNK + 45])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("divisor", "cap"), [(1.0, None), (4.0, None), (1.0, 3.0), (4.0, 3.0)])
def test_loss_and_gradient_equal_the_plain_ones(tokens, biased, divisor, cap):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 24, generator=generator, requires_grad=True)
    weight = torch.randn(500, 24, generator=generator)
    bias = torch.randn(500, generator=generator) if biased else None
    targets = torch.randint(500, (tokens,), generator=generator)
    logits = functional.linear(hidden, weight, bias) / divisor
    plain = functional.cross_entropy(logits if cap is None else cap * (logits / cap).tanh(), targets)
    (expected,) = torch.autograd.grad(3 * plain, hidden)
    with Largest() as seen:
        ours = loss.ChunkedCrossEntropy.apply(hidden, Head(weight, bias, divisor, cap), targets)
        (gradient,) = torch.autograd.grad(3 * ours, hidden)
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)
    assert seen.elements <= max(loss.CHUNK * 500, weight.numel())


@pytest.mark.parametrize("name", families())
def test_loss_is_the_models_own(tiny, name):
    lm = tiny(name)
    tokens = torch.randint(200, (2, 40), generator=torch.Generator().manual_seed(1))
    expected = lm.model(tokens, labels=tokens).loss
    torch.testing.assert_close(loss.causal_loss(lm.model, tokens), expected, rtol=1e-6, atol=0)
