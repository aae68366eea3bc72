"""Sites beyond the paper's: exact foldings, and what row and column factors do to codes."""

import copy
import dataclasses

import pytest
import torch

from teq import config
from teq.data.texts import Calibration
from teq.device.runtime import Runtime
from teq.grid import Grid
from teq.models.arch import blocks, families, linears, sites
from teq.models.blocks import no_casts_to_fp32
from teq.models.fold import Folding, check_equivalence, fold, folded_tensors
from teq.models.loss import causal_loss
from teq.quantizers.gptq import solver
from teq.quantizers.quantized import restore, round_to_nearest
from teq.quantizers.rtn import Rtn
from teq.spec import UserError
from teq.transforms.awq.settings import Awq
from teq.transforms.smoothquant import SmoothQuant
from teq.transforms.teq.settings import Teq

GRID = Grid(bits=3, group_size=16)
MORE = {  # of a block of the tiny models: source, target, channels of the vector, repeats
    "llama": [("self_attn.v_proj", "self_attn.o_proj", 32, 2), ("mlp.up_proj", "mlp.down_proj", 160, 1)],
    "opt": [("self_attn.v_proj", "self_attn.out_proj", 64, 1)],
    "bloom": [("self_attention.query_key_value", "self_attention.dense", 64, 1)],
}
TEXT = {"calib": Calibration(corpus="python-docs"), "samples": 3, "length": 40}
AWQ, SMOOTH = Awq(grid=GRID, ratios=4, **TEXT), SmoothQuant(**TEXT)
TEQ = Teq(
    grid=GRID,
    calib=TEXT["calib"],
    init="ones",
    steps=4,
    lr=0.01,
    batch=1,
    length=40,
    parameter="log",
    profile="paper",
)


def every_site(tiny, family, dtype="float32"):
    """A tiny model with `sites=all`, and its sites."""
    lm = tiny(family, dtype, "sites=all")
    return lm, sites(lm.model, lm.arch)


def tokens():
    return torch.randint(258, (2, 40), generator=torch.Generator().manual_seed(0))


def random_factors(count, generator):
    return 10 ** torch.empty(count, dtype=torch.float64).uniform_(-2, 2, generator=generator)


def more(lm, family):
    """The sites of the first block that are not the paper's."""
    found = {site.name: site for site in sites(lm.model, lm.arch) if site.block == 0}
    return [found[f"{lm.arch.blocks}.0.{source}"] for source, *_ in MORE[family]]


def test_all_sites_are_the_papers_and_these(tiny, family):
    lm, found = every_site(tiny, family)
    paper = sites(lm.model, tiny(family).arch)
    assert len(found) - len(paper) == 2 * len(MORE[family])
    for site, (_, target, width, repeats) in zip(more(lm, family), MORE[family], strict=True):
        assert list(site.targets) == [f"{lm.arch.blocks}.0.{target}"]
        assert (site.width, site.inputs) == (width, width * repeats)
        assert site.largest().shape == (width,)


@pytest.mark.parametrize("family", [name for name in families() if not name.startswith("falcon")])
def test_folding_random_scales_into_all_sites_changes_no_logits(tiny, family):
    """Every source has other weights than before: so has a fused one, in the rows of its part."""
    lm, found = every_site(tiny, family, "float64")
    check_equivalence(lm.model, lm.arch)
    generator = torch.Generator().manual_seed(0)
    weights = {site.name: site.source.weight.clone() for site in found}
    with no_casts_to_fp32():
        before = lm.model(tokens()).logits
        fold(found, {site.name: random_factors(site.width, generator) for site in found})
        assert ((lm.model(tokens()).logits - before).norm() / before.norm()).item() < 1e-9
    assert not any(torch.equal(site.source.weight, weights[site.name]) for site in found)


def test_scales_of_each_further_site_reach_both_its_ends(tiny, family):
    """One at a time: the probe of the equivalence would pass for a site that does nothing."""
    lm, _ = every_site(tiny, family, "float64")
    before = lm.model(tokens()).logits
    for site in more(lm, family):
        s, other = random_factors(site.width, torch.Generator().manual_seed(0)), copy.deepcopy(lm.model)
        (same,) = (each for each in sites(other, lm.arch) if each.name == site.name)
        fold([same], {site.name: s})
        assert ((other(tokens()).logits - before).norm() / before.norm()).item() < 1e-9
        for module in (site.name, *site.targets):
            old, new = (m.get_parameter(f"{module}.weight") for m in (lm.model, other))
            changed = (new != old).float().mean().item()
            parts = site.parts if module == site.name else 1
            assert changed == pytest.approx(1 / parts)


@pytest.mark.parametrize("family", ["llama", "bloom"])
@pytest.mark.parametrize("wrong", [{"heads": "num_hidden_layers"}, {"part": 0, "parts": 2}])
def test_wrong_wiring_is_refused_by_name(tiny, family, wrong):
    lm, _ = every_site(tiny, family)
    source, target, *_ = MORE[family][0]
    right = lm.arch.more_sites[source]
    if family == "llama" and "heads" in wrong:
        wrong = {"heads": "num_attention_heads"}  # query heads for key-value heads
    broken = dataclasses.replace(lm.arch, sites={}, more_sites={source: right | wrong})
    with pytest.raises(UserError, match=rf"{source} -> .*{target}.* is refused"):
        check_equivalence(lm.model, broken)


def test_unknown_words_of_a_wiring_are_refused(tiny):
    lm, _ = every_site(tiny, "llama")
    for wiring, message in (
        ({"head": "x"}, r"sets 'head': did you mean heads\?"),
        ({"heads": "kv_heads"}, "reads 'kv_heads', which the model's configuration does not have"),
        ({"kept": ["self_attn.k_proj"]}, r"keeps .*layers\.0\.self_attn\.k_proj in floating point, which is"),
    ):
        entry = {"self_attn.v_proj": {"targets": ["self_attn.o_proj"], **wiring}}
        with pytest.raises(UserError, match=message):
            sites(lm.model, dataclasses.replace(lm.arch, more_sites=entry))


def codes(lm, folding, name):
    """Codes of a linear that was folded, in fp64: no tie is decided by rounding errors."""
    return round_to_nearest(folding.weight(name, lm.model.get_submodule(name)), GRID).codes


def test_row_factors_change_no_code_and_column_factors_do(tiny, family):
    """Why a site's scale is free for its source: the grid is affine by row and takes in any factor."""
    lm, _ = every_site(tiny, family, "float64")
    generator = torch.Generator().manual_seed(0)
    for name, linear in linears(*next(iter(blocks(lm.model, lm.arch).items()))).items():
        plain = codes(lm, Folding({}, {}), name)
        rows = Folding({}, {name: random_factors(linear.out_features, generator)})
        columns = Folding({name: random_factors(linear.in_features, generator)}, {})
        assert torch.equal(codes(lm, rows, name), plain)
        assert (codes(lm, columns, name) != plain).float().mean() > 0.3


def test_row_factors_change_no_code_of_gptq():
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(*shape, generator=generator) for shape in ((24, 64), (200, 64)))
    factors = 2.0 ** torch.randint(-5, 6, (24, 1), generator=generator)  # exact in floating point
    plain, scaled = solver.solve([(w, x.T @ x) for w in (weight, weight * factors)], GRID)
    assert torch.equal(plain.quantized.codes, scaled.quantized.codes)
    assert torch.equal(plain.quantized.scale * factors, scaled.quantized.scale)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_scales_between_queries_and_keys_change_neither_the_function_nor_a_code(tiny, family):
    """They are row factors on both sides: nothing for a transform of weights to gain."""
    lm = tiny(family, "float64")
    settings, before = lm.model.config, lm.model(tokens()).logits
    keys = getattr(settings, "num_key_value_heads", settings.num_attention_heads)
    size = settings.hidden_size // settings.num_attention_heads
    one = random_factors(keys * size // 2, torch.Generator().manual_seed(0)).view(keys, 1, size // 2)
    s = torch.cat([one, one], -1)  # rotary embedding mixes a channel with one half a head away
    name = f"{lm.arch.blocks}.0.self_attn"
    repeats = settings.num_attention_heads // keys
    rows = {
        f"{name}.q_proj": s.expand(-1, repeats, -1).flatten(),
        f"{name}.k_proj": 1 / s.flatten(),
    }
    folding = Folding({}, rows)
    for linear in rows:
        assert torch.equal(codes(lm, folding, linear), codes(lm, Folding({}, {}), linear))
        module = lm.model.get_submodule(linear)
        changed = {f"{linear}.weight": folding.weight(linear, module), **folding.divided(linear, module)}
        with torch.no_grad():
            for parameter, value in changed.items():
                lm.model.get_parameter(parameter).copy_(value)
    assert ((lm.model(tokens()).logits - before).norm() / before.norm()).item() < 1e-9


@pytest.mark.parametrize("transform", [AWQ, SMOOTH, TEQ], ids=lambda transform: type(transform).__name__)
def test_transforms_find_scales_of_all_sites_that_fold_exactly(tiny, family, transform):
    lm, found = every_site(tiny, family, "float64")
    tensors, info = transform.fit(lambda: lm, Runtime(), lambda *_: None)
    assert info["sites"] == [site.name for site in found]
    assert all(tensors[site.name].shape == (site.width,) for site in found)
    assert any(tensors[site.name].std() > 0 for site in more(lm, family))  # AWQ may leave one at 1
    before = lm.model(tokens()).logits
    scales = {name: s for name, s in folded_tensors(tensors).items() if not name.startswith("clip/")}
    fold(found, scales)
    assert ((lm.model(tokens()).logits - before).norm() / before.norm()).item() < 1e-9


def test_training_all_sites_sees_the_very_model_that_is_stored(tiny, family):
    """Sources' rows, which training leaves as they are, are divided in what is stored."""
    lm, _ = every_site(tiny, family)
    windows = torch.randint(258, (4, 40), generator=torch.Generator().manual_seed(1))
    settings = dataclasses.replace(TEQ, init="inv_sqrt", lr=1e-6)
    trained, info = settings.train_on(lm.model, lm.arch, windows)
    stored, _ = Rtn(grid=GRID).quantize(lambda: lm, folded_tensors(trained), Runtime())
    restore(lm.model, stored, GRID)
    assert causal_loss(lm.model, windows[3:]).item() == pytest.approx(info["loss"][3], rel=1e-4)


def test_tied_channels_are_measured_over_their_query_heads(tiny):
    """SmoothQuant's largest activation and AWQ's mean, of a vector that two query heads share."""
    lm, _ = every_site(tiny, "llama")
    (site,) = (each for each in more(lm, "llama") if each.name.endswith("v_proj"))
    x = torch.arange(64.0)  # [2 key-value heads, 2 query heads of each, 16]
    assert torch.equal(site.tied(x), torch.stack([x.view(2, 2, 16)[:, r].flatten() for r in (0, 1)], 1))
    s = torch.rand(32)
    assert torch.equal(site.tied(site.over_inputs(s)), s[:, None].expand(-1, 2))


def test_the_papers_sites_are_the_default_and_others_another_run(family):
    def run(*overrides):
        (job,) = config.jobs([f"model=tiny-{family}", "evals=[python-docs]", *overrides])
        return job.run

    assert run("method=awq", "sites=paper").key() == run("method=awq").key()
    assert "more_sites" not in run("method=awq").model.arch.plain()
    assert run("method=awq", "sites=all").key() != run("method=awq").key()
    assert run("method=rtn", "sites=all").key() == run("method=rtn").key()  # which has no scales
    with pytest.raises(UserError, match="sites=some is not allowed: it must be paper or all"):
        run("sites=some")
    with pytest.raises(UserError, match=r"sites=all: arch=\w+ has the paper's sites alone"):
        run("sites=all", "model.arch.more_sites=null")
