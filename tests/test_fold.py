"""Folding changes no logits."""

import dataclasses

import pytest
import torch

from teq.data.texts import Calibration
from teq.device.runtime import Runtime
from teq.grid import Grid
from teq.models import arch, fold
from teq.models.arch import families
from teq.models.blocks import no_casts_to_fp32
from teq.models.fold import folded_tensors, site_scales
from teq.spec import UserError
from teq.transforms.awq.settings import Awq
from teq.transforms.smoothquant import SmoothQuant

GRID = Grid(bits=3, group_size=16)
SMALL = {"calib": Calibration(corpus="python-docs"), "samples": 3, "length": 40}


def awq(**changes):
    return Awq(**{"grid": GRID, "clip": False, **SMALL, **changes})


def fitted(transform, lm):
    return transform.fit(lambda: lm, Runtime(), lambda *_: None)


@pytest.mark.parametrize("family", families())
@pytest.mark.parametrize("transform", [awq(ratios=4), SmoothQuant(**SMALL)], ids=["awq", "smoothquant"])
def test_folding_found_scales_changes_no_logits(tiny, family, transform):
    lm = tiny(family, "float64")
    before = {name: p.clone() for name, p in lm.model.named_parameters()}
    tensors, info = fitted(transform, lm)
    assert all(torch.equal(p, before[name]) for name, p in lm.model.named_parameters())
    found = arch.sites(lm.model, lm.arch)
    assert info["sites"] == [site.name for site in found] and site_scales(tensors).keys() == set(
        info["sites"]
    )
    assert all((tensors[f"start/{site.name}"] == 1).all() for site in found)
    tokens = torch.randint(258, (2, 40), generator=torch.Generator().manual_seed(0))
    with no_casts_to_fp32():
        expected = lm.model(tokens).logits
        fold.fold(found, folded_tensors(tensors))
        assert ((lm.model(tokens).logits - expected).norm() / expected.norm()).item() < 1e-9


def random_scales(found):
    generator = torch.Generator().manual_seed(0)
    return {
        site.name: 10 ** torch.empty(site.width, dtype=torch.float64).uniform_(-2, 2, generator=generator)
        for site in found
    }


@pytest.mark.parametrize("family", families())
def test_folding_changes_no_logits(tiny, family):
    lm = tiny(family, "float64")
    tokens = torch.randint(258, (2, 40), generator=torch.Generator().manual_seed(0))
    found = arch.sites(lm.model, lm.arch)
    weights = {name: p.clone() for name, p in lm.model.named_parameters()}
    with no_casts_to_fp32():
        before = lm.model(tokens).logits
        fold.fold(found, random_scales(found))
        after = lm.model(tokens).logits
    assert ((after - before).norm() / before.norm()).item() < 1e-9
    for site in found:
        for name in (site.name, *site.targets):
            assert not torch.allclose(lm.model.get_parameter(f"{name}.weight"), weights[f"{name}.weight"])


@pytest.mark.parametrize("family", families())
def test_equivalence_check_passes_and_leaves_the_model_untouched(tiny, family):
    lm = tiny(family)
    before = {name: p.clone() for name, p in lm.model.named_parameters()}
    fold.check_equivalence(lm.model, lm.arch)
    assert all(torch.equal(p, before[name]) for name, p in lm.model.named_parameters())


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("llama", {"input_layernorm": ["self_attn.q_proj", "self_attn.k_proj"]}),  # v_proj left out
        ("bloom", {"mlp.dense_h_to_4h": ["mlp.dense_4h_to_h"]}),  # GELU between
        ("llama", {"self_attn.v_proj": ["self_attn.o_proj"]}),  # grouped-query attention: other widths
    ],
)
def test_wrong_site_is_refused_by_name(tiny, name, wrong):
    lm = tiny(name)
    broken = dataclasses.replace(lm.arch, sites={**wrong})
    with pytest.raises(UserError, match=next(iter(wrong)).replace(".", r"\.")):
        fold.check_equivalence(lm.model, broken)


def test_folded_weight_is_formed_in_fp32(tiny):
    lm = tiny("llama", "bfloat16")
    found = arch.sites(lm.model, lm.arch)
    scales = {name: s.float() for name, s in random_scales(found).items()}
    folding = fold.Folding.of(found, scales)
    name, linear = next(iter(found[0].targets.items()))
    folded = folding.weight(name, linear)
    assert folded.dtype == torch.float32
    assert torch.equal(folded, linear.weight.float() * scales[found[0].name])
