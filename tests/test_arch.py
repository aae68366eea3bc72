"""Sites: folding changes no logits, wrong sites are refused by name."""

import dataclasses

import pytest
from omegaconf import OmegaConf

from teq import config
from teq.models import arch
from teq.spec import UserError


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


def test_every_model_file_has_an_arch_whose_configuration_transformers_knows():
    from transformers import AutoConfig

    for name in set(config.groups()["model"]) - {"auto"}:
        file = config.folder("conf") / "model" / f"{name}.yaml"
        values = OmegaConf.to_container(OmegaConf.load(file).config)
        assert AutoConfig.for_model(values.pop("model_type"), **values).num_hidden_layers >= 2
