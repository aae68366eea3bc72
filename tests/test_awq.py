"""AWQ and SmoothQuant: searches against plain ones, the closed form by hand, and what must stay unchanged."""

import copy
import dataclasses

import pytest
import torch
from conftest import inputs_by_linear
from safetensors.torch import load_file

from teq import config
from teq.data.texts import Calibration, calibration
from teq.device.runtime import Runtime
from teq.grid import Grid, fake_quant
from teq.models import arch, fold
from teq.models.fold import folded_tensors, site_scales
from teq.quantizers.quantized import restore
from teq.quantizers.rtn import Rtn
from teq.spec import UserError
from teq.stage import NothingDone
from teq.transforms.awq.settings import Awq

GRID = Grid(bits=3, group_size=16)
SMALL = {"calib": Calibration(corpus="python-docs"), "samples": 3, "length": 40}


def awq(**changes):
    return Awq(**{"grid": GRID, "clip": False, **SMALL, **changes})


def fitted(transform, lm):
    return transform.fit(lambda: lm, Runtime(), lambda *_: None)


def windows_for(lm):
    return calibration(SMALL["calib"], lm.tokenizer, SMALL["samples"], SMALL["length"])


def outputs_of(model, name, windows):
    """The first output of a module of the model for each window."""
    found = []

    def hook(_, __, output):
        found.append(output[0] if isinstance(output, tuple) else output)

    handle = model.get_submodule(name).register_forward_hook(hook)
    with torch.no_grad():
        for window in windows:
            model(window[None])
    handle.remove()
    return torch.stack(found)


# of the first block: the site's linears, and the module whose output AWQ compares
FIRST_BLOCK = {
    "opt": {
        "self_attn_layer_norm": (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], "self_attn"),
        "final_layer_norm": (["fc1"], "fc1"),
        "fc1": (["fc2"], "fc2"),
    },
    "bloom": {
        "input_layernorm": (["self_attention.query_key_value"], "self_attention"),
        "post_attention_layernorm": (["mlp.dense_h_to_4h"], "mlp"),
    },
    "llama": {
        "input_layernorm": (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], "self_attn"),
        "post_attention_layernorm": (["mlp.gate_proj", "mlp.up_proj"], "mlp"),
    },
}


def test_awq_chooses_what_a_brute_force_search_chooses(tiny, family):
    """Whole-model forward passes with changed weights in the first block, whose inputs no change reaches."""
    lm = tiny(family)
    tensors, info = fitted(awq(ratios=5), lm)
    windows, block = windows_for(lm), f"{lm.arch.blocks}.0"
    inputs = inputs_by_linear(lm, windows)
    for source, (targets, around) in FIRST_BLOCK[family].items():
        x = inputs[f"{block}.{targets[0]}"].flatten(0, 1).abs().mean(0)
        expected = outputs_of(lm.model, f"{block}.{around}", windows)
        errors, scales = [], []
        for ratio in (0, 0.2, 0.4, 0.6, 0.8):
            s = x**ratio
            s = s / (s.max() * s.min()) ** 0.5
            other = copy.deepcopy(lm.model)
            with torch.no_grad():
                for target in targets:
                    weight = other.get_parameter(f"{block}.{target}.weight")
                    weight.copy_(fake_quant(weight * s, GRID) / s)
            changed = outputs_of(other, f"{block}.{around}", windows)
            errors.append(((changed - expected) ** 2).mean().item())
            scales.append(s)
        best = errors.index(min(errors))
        name = f"{block}.{source}"
        assert info["ratios"][name] == pytest.approx(best * 0.2)
        torch.testing.assert_close(tensors[name], scales[best], rtol=1e-4, atol=1e-6)
        assert info["errors"][name] == pytest.approx((errors[0], errors[best]), rel=1e-3)


def test_awq_is_never_worse_than_no_scales_and_better_somewhere(tiny, family):
    _, info = fitted(awq(ratios=6), tiny(family))
    assert all(chosen <= unscaled for unscaled, chosen in info["errors"].values())
    assert any(chosen < 0.95 * unscaled for unscaled, chosen in info["errors"].values())


def test_awq_with_the_first_ratio_alone_is_rounding(tiny, family):
    lm = tiny(family)
    tensors, _ = fitted(awq(ratios=1), lm)
    assert all((s == 1).all() for s in site_scales(tensors).values())
    plain, _ = Rtn(grid=GRID).quantize(lambda: lm, {}, Runtime())
    through, _ = Rtn(grid=GRID).quantize(lambda: lm, folded_tensors(tensors), Runtime())
    assert all(torch.equal(plain[name], through[name]) for name in plain)


def test_awq_that_changes_nothing_is_an_error(tiny):
    lm = tiny("llama")
    with torch.no_grad():
        for site in arch.sites(lm.model, lm.arch):
            for target in site.targets.values():
                target.weight.zero_()
    with pytest.raises(NothingDone, match="AWQ left every scale at 1"):
        fitted(awq(ratios=3), lm)


@pytest.mark.parametrize("group_size", [16, 48, -1])
def test_awq_bounds_are_the_best_of_their_steps(tiny, group_size):
    """For every row and group of some linears, by a loop over bounds on the group's share of the output.

    48 does not divide the 64 and 160 channels of the tiny LLaMA.
    """
    lm, grid = tiny("llama"), Grid(bits=3, group_size=group_size)
    tensors, _ = fitted(awq(grid=grid, clip=True, ratios=3), lm)
    inputs = inputs_by_linear(lm, windows_for(lm))
    folding = fold.Folding.of(arch.sites(lm.model, lm.arch), site_scales(tensors))
    clipped = fold.Folding.of(arch.sites(lm.model, lm.arch), folded_tensors(tensors))
    for leaf in ("self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"):
        name = f"model.layers.1.{leaf}"
        linear = lm.model.get_submodule(name)
        weight, found = folding.weight(name, linear), clipped.weight(name, linear)
        x = inputs[name].flatten(0, 1) / folding.columns.get(name, 1)
        for start, stop in grid.spans(linear.in_features):
            group = weight[:, start:stop]
            outputs, best, lowest = x[:, start:stop] @ group.T, None, None
            for step in range(10):
                bound = group.abs().amax(1, keepdim=True) * (1 - step / 20)
                kept = group.clamp(-bound, bound)
                error = (x[:, start:stop] @ fake_quant(kept, grid).T - outputs).square().sum(0)[:, None]
                if best is None:
                    best, lowest = kept, error
                else:
                    best, lowest = torch.where(error < lowest, kept, best), error.minimum(lowest)
            agree = torch.isclose(found[:, start:stop], best, rtol=1e-5, atol=1e-7).all(1)
            assert agree.float().mean() > 0.98  # two bounds may be equally good to rounding
    assert not any(leaf in name for name in tensors for leaf in ("q_proj", "k_proj"))


def test_clipping_reaches_the_quantized_weights_and_lowers_the_error_of_the_linears(tiny, family):
    lm = tiny(family)
    coarse = Grid(bits=2, group_size=-1)
    tensors, _ = fitted(awq(grid=coarse, clip=True, ratios=3), lm)
    inputs = inputs_by_linear(lm, windows_for(lm))
    found = arch.sites(lm.model, lm.arch)
    folding = fold.Folding.of(found, site_scales(tensors))
    clipped = [name.removeprefix("clip/") for name in tensors if name.startswith("clip/")]
    linears = {n: lm.model.get_submodule(n) for n in clipped}
    exact = {name: folding.weight(name, linear) for name, linear in linears.items()}
    errors = []
    for scales in (site_scales(tensors), folded_tensors(tensors)):
        stored, _ = Rtn(grid=coarse).quantize(lambda: lm, scales, Runtime())
        model = copy.deepcopy(lm.model)
        restore(model, stored, coarse)
        errors.append(
            {
                name: float(
                    (
                        (inputs[name] / folding.columns.get(name, 1))
                        @ (model.get_parameter(f"{name}.weight") - exact[name]).T
                    )
                    .square()
                    .mean()
                )
                for name in linears
            }
        )
    plain, bounded = errors
    assert clipped and all(bounded[name] <= plain[name] * 1.001 for name in clipped)
    assert sum(bounded.values()) < 0.9 * sum(plain.values())


def test_awq_in_bfloat16_scales_weights_in_fp32(tiny):
    lm = tiny("llama", "bfloat16")
    tensors, info = fitted(awq(ratios=3, clip=True), lm)
    assert all(t.dtype == torch.float32 and torch.isfinite(t).all() for t in tensors.values())
    assert any(info["ratios"].values())


METHODS = ("awq", "awq+gptq", "smoothquant", "smoothquant+gptq")
QUICK = ["bits=3", "group_size=32", "awq.ratios=4", "evals=[counts]"]
QUICK += [f"{group}.{key}" for group in ("awq", "smoothquant", "gptq") for key in ("samples=2", "length=48")]


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_methods_run_end_to_end_and_are_not_their_quantizer_alone(family, own_home):
    from teq.pipeline.run import run
    from teq.pipeline.store import Store

    weights, cached = {}, {}
    for method in ("rtn", "gptq", *METHODS, "awq unclipped"):
        name, *unclipped = method.split()
        overrides = [f"method={name}", *(["awq.clip=false"] if unclipped else [])]
        (job,) = config.jobs([f"model=tiny-{family}", *overrides, *QUICK])
        data = run(job.run, Store(own_home / "store"), own_home, Runtime(), None).data
        stages, summaries = data["stages"], data["training"]["scales"]
        weights[method] = load_file(
            own_home / "store" / "weights" / stages["weights"]["key"] / "data.safetensors"
        )
        cached[method] = stages["scales"]["cached"]
        assert bool(summaries) == (name in METHODS)
        assert all(0 <= site["near"] <= 1 for site in summaries.values())
    assert cached["smoothquant+gptq"] and not cached["smoothquant"]
    assert cached["awq unclipped"] and not cached["awq+gptq"]
    others = {method: "gptq" if method.endswith("gptq") else "rtn" for method in METHODS}
    for method, plain in (others | {"awq unclipped": "awq"}).items():
        codes = [name for name in weights[plain] if name.endswith("/codes")]
        assert any(not torch.equal(weights[method][name], weights[plain][name]) for name in codes)


def test_a_recipe_fills_the_calibration_and_the_grid_is_no_matter_to_smoothquant():
    paper, w4 = (
        {m: config.jobs([f"method={m}", f"bits={bits}", "recipe=paper"])[0].run.transform for m in METHODS}
        for bits in (3, 4)
    )
    assert (paper["awq"].samples, paper["awq"].length) == (128, 512)
    assert paper["smoothquant"] == w4["smoothquant"] == w4["smoothquant+gptq"]
    assert paper["awq"] != w4["awq"] and paper["awq"].clip
    assert paper["awq+gptq"] == dataclasses.replace(paper["awq"], clip=False)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["method=awq", "awq.ratios=0"], "awq.ratios=0 is not allowed: it must be a whole number at least 1"),
        (["method=awq", "awq.samples=0"], "awq.samples=0 is not allowed"),
        (["method=awq", "awq.clip=maybe"], "awq.clip='maybe' is not allowed: it must be true or false"),
        (
            ["method=smoothquant", "smoothquant.alpha=2"],
            "smoothquant.alpha=2 is not allowed: it must be a number at least 0 at most 1",
        ),
    ],
)
def test_bad_input_is_one_line(overrides, said):
    with pytest.raises(UserError) as caught:
        config.jobs(["model=tiny-opt", *overrides])
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)
