"""Sites: folding changes no logits, wrong sites are refused by name."""

import dataclasses

import pytest
import torch

from teq.models import arch, fold
from teq.spec import UserError


def random_scales(found):
    generator = torch.Generator().manual_seed(0)
    return {
        site.name: 10 ** torch.empty(site.width, dtype=torch.float64).uniform_(-2, 2, generator=generator)
        for site in found
    }


def test_folding_changes_no_logits(tiny, family):
    lm = tiny(family, "float64")
    tokens = torch.randint(258, (2, 40), generator=torch.Generator().manual_seed(0))
    before = lm.model(tokens).logits
    found = arch.sites(lm.model, lm.arch)
    weights = {name: p.clone() for name, p in lm.model.named_parameters()}
    fold.fold(found, random_scales(found))
    after = lm.model(tokens).logits
    assert ((after - before).norm() / before.norm()).item() < 1e-9
    for site in found:
        for name in site.targets:
            assert not torch.allclose(lm.model.get_parameter(f"{name}.weight"), weights[f"{name}.weight"])


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


def test_post_layernorm_models_are_refused_with_the_reason(tiny):
    opt, bloom = tiny("opt"), tiny("bloom")
    opt.model.config.do_layer_norm_before = False
    with pytest.raises(UserError, match=r"do_layer_norm_before=False .*pre-LN"):
        arch.sites(opt.model, opt.arch)
    bloom.model.config.apply_residual_connection_post_layernorm = True
    with pytest.raises(UserError, match=r"apply_residual_connection_post_layernorm=True .*residual"):
        arch.sites(bloom.model, bloom.arch)


def test_foreign_arch_is_refused(tiny):
    opt, llama = tiny("opt"), tiny("llama")
    with pytest.raises(UserError, match=r"arch=llama looks for blocks at 'model\.layers'"):
        arch.sites(opt.model, llama.arch)
    with pytest.raises(UserError, match="no site"):
        arch.sites(llama.model, dataclasses.replace(llama.arch, sites={}))


@pytest.mark.parametrize(("name", "per_block"), [("opt", 3), ("bloom", 2), ("llama", 2)])
def test_sites_per_block_are_the_papers(tiny, name, per_block):
    lm = tiny(name)
    assert len(arch.sites(lm.model, lm.arch)) == 2 * per_block


def test_folded_weight_is_formed_in_fp32(tiny):
    lm = tiny("llama", "bfloat16")
    found = arch.sites(lm.model, lm.arch)
    scales = {name: s.float() for name, s in random_scales(found).items()}
    folding = fold.Folding.of(found, scales)
    name, linear = next(iter(found[0].targets.items()))
    folded = folding.weight(name, linear)
    assert folded.dtype == torch.float32
    assert torch.equal(folded, linear.weight.float() * scales[found[0].name])
