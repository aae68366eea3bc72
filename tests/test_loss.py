"""The chunked loss is the plain loss, and never holds all logits."""

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from teq import config
from teq.models import loss
from teq.models.blocks import check_head


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
def test_loss_and_gradient_equal_the_plain_ones(tokens, biased):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 24, generator=generator, requires_grad=True)
    weight = torch.randn(500, 24, generator=generator)
    bias = torch.randn(500, generator=generator) if biased else None
    targets = torch.randint(500, (tokens,), generator=generator)
    plain = functional.cross_entropy(functional.linear(hidden, weight, bias), targets)
    (expected,) = torch.autograd.grad(3 * plain, hidden)
    with Largest() as seen:
        ours = loss.ChunkedCrossEntropy.apply(hidden, weight, bias, targets)
        (gradient,) = torch.autograd.grad(3 * ours, hidden)
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)
    assert seen.elements <= max(loss.CHUNK * 500, weight.numel())


@pytest.mark.parametrize("model", ["tiny-opt", "tiny-bloom", "tiny-llama"])
def test_loss_is_the_models_own(model):
    (job,) = config.jobs([f"model={model}"])
    lm = job.run.model.load("float32", "cpu")
    tokens = torch.randint(200, (2, 40), generator=torch.Generator().manual_seed(1))
    check_head(lm.model, lm.arch)
    expected = lm.model(tokens, labels=tokens).loss
    torch.testing.assert_close(loss.causal_loss(lm.model, tokens), expected, rtol=1e-6, atol=0)
