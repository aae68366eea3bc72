"""SmoothQuant against its formula."""

import pytest
import torch
from conftest import inputs_by_linear

from teq.data.texts import Calibration, calibration
from teq.device.runtime import Runtime
from teq.models import arch
from teq.transforms.smoothquant import SmoothQuant

SMALL = {"calib": Calibration(corpus="python-docs"), "samples": 3, "length": 40}


def fitted(transform, lm):
    return transform.fit(lambda: lm, Runtime(), lambda *_: None)


def windows_for(lm):
    return calibration(SMALL["calib"], lm.tokenizer, SMALL["samples"], SMALL["length"])


@pytest.mark.parametrize("alpha", [0, 0.3, 1])
def test_smoothquant_is_its_formula(tiny, family, alpha):
    """At alpha 1 the scaled activations all reach 1, at 0 the scaled weights do."""
    lm = tiny(family)
    tensors, _ = fitted(SmoothQuant(**SMALL, alpha=alpha), lm)
    inputs = inputs_by_linear(lm, windows_for(lm))
    for site in arch.sites(lm.model, lm.arch):
        s = tensors[site.name]
        x = inputs[next(iter(site.targets))].flatten(0, 1).abs().amax(0)
        w = torch.cat([target.weight for target in site.targets.values()]).abs().amax(0)
        live = x > 0
        torch.testing.assert_close(s[live], (x**alpha / w ** (1 - alpha))[live], rtol=1e-4, atol=1e-6)
        assert (s[~live] == 1).all()
        if alpha == 1:
            torch.testing.assert_close((x / s)[live], torch.ones_like(x[live]), rtol=1e-4, atol=0)
        if alpha == 0:
            torch.testing.assert_close((w * s)[live], torch.ones_like(w[live]), rtol=1e-4, atol=0)


def test_smoothquant_keeps_one_where_a_maximum_is_zero():
    x, w = torch.tensor([0.0, 4.0, 4.0]), torch.tensor([1.0, 0.0, 0.25])
    assert SmoothQuant(**SMALL).scale(x, w).tolist() == [1, 1, 4]
