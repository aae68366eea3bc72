"""Bounds of the weights that TEQ learns block by block: their gradient, where they begin, what is stored."""

import copy

import pytest
import torch
from test_objectives import block_outputs, teq, unequal, windows
from torch.nn import functional
from transformers import AutoModelForCausalLM

from teq import config
from teq.device.live_bytes import LiveBytes
from teq.device.runtime import Runtime
from teq.grid import Grid, decode, encode, extremes, fake_quant, group_extremes, grouped, params_between
from teq.models.arch import blocks, linears, sites
from teq.models.fold import CLIP, Folding, folded_tensors, site_scales
from teq.pipeline import estimate
from teq.quantizers.keep import Keep
from teq.quantizers.quantized import restore
from teq.quantizers.rtn import Rtn
from teq.spec import UserError
from teq.transforms.teq.bounds import ClippedLinear
from teq.transforms.teq.fake_quant import Eager
from teq.transforms.teq.linear import ScaledFakeQuantLinears

GRID = Grid(bits=3, group_size=16)


def exact(grid):
    """Fake quantization in the weight's own precision."""
    return lambda weight, _: fake_quant(weight, grid)


def by_autograd(weight, s, factors, grid):
    """The definition, differentiated by torch: extremes are constants, and so is what rounding adds."""
    done, start = [], 0
    for part in grouped(weight * s, grid):
        factor = factors[:, :, start : start + part.shape[1], None]
        start += part.shape[1]
        lo, hi = (end[..., None].detach() for end in extremes(part))
        if grid.symmetric:
            hi = torch.maximum(hi, -lo) * factor[0]
            lo = -hi
        else:
            lo, hi = lo * factor[0], hi * factor[1]
        scale = (hi - lo) / grid.levels
        clipped = torch.minimum(torch.maximum(part, lo), hi)
        with torch.no_grad():
            found = params_between(lo.clone(), hi.clone(), grid)
            rounded = decode(encode(clipped, *found, grid), *found) / found[0]
        steps = clipped / scale
        done.append((scale * (steps + (rounded - steps).detach())).flatten(1))
    return torch.cat(done, 1)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("size", [16, 12, -1])  # 12: the last group has 8
def test_the_gradient_is_autograds(size, symmetric):
    generator = torch.Generator().manual_seed(0)
    grid, float64 = Grid(bits=3, group_size=size, symmetric=symmetric), {"dtype": torch.float64}
    linear = torch.nn.Linear(32, 7, **float64).requires_grad_(False)
    linear.weight.normal_(generator=generator)
    x = torch.randn(2, 5, 32, generator=generator, **float64).requires_grad_()
    s = torch.rand(32, generator=generator, **float64).add(0.5).requires_grad_()
    shape = 1 if symmetric else 2, 7, grid.group_count(32)
    factors = torch.rand(shape, generator=generator, **float64).mul(0.4).add(0.5).requires_grad_()
    dy = torch.randn(2, 5, 7, generator=generator, **float64)
    ours = ClippedLinear.apply(x, s, factors, linear, grid, exact(grid))
    plain = functional.linear(x / s, by_autograd(linear.weight, s, factors, grid), linear.bias)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    gradients = (torch.autograd.grad(out, (x, s, factors), dy) for out in (ours, plain))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_where_nothing_is_clipped_the_scales_have_teqs_gradient():
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(32, 7)
    x, dy = (torch.randn(2, 5, n, generator=generator) for n in (32, 7))
    s = torch.rand(32, generator=generator).add(0.5).requires_grad_()
    quantize, factors = Eager(GRID), torch.ones(2, 7, 2)
    ours = ClippedLinear.apply(x, s, factors, linear, GRID, quantize)
    (plain,) = ScaledFakeQuantLinears.apply(x, s, quantize, (linear.bias,), linear.weight)
    assert torch.equal(ours, plain)
    mine, theirs = (torch.autograd.grad(out, s, dy)[0] for out in (ours, plain))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def learned(lm, grid=GRID, steps=6, **changes):
    """Some steps of two windows for each block, bounds beside the scales, with four windows held out."""
    chosen = {"objective": "block", "batch": 2, "lr": 0.02, "bounds_lr": 0.02, "grid": grid, **changes}
    every, count = windows(84), 2 * max(steps, 1)
    return teq(steps=steps, **chosen).train_on(lm.model, lm.arch, every[:count], held_out=every[80:])


@pytest.mark.parametrize("grid", [GRID, Grid(bits=2, group_size=48, symmetric=True)])
def test_bounds_begin_as_plain_rounding(tiny, family, grid):
    """To the bit. 48 does not divide the channels of the tiny models."""
    lm = tiny(family)
    tensors, _ = learned(lm, grid, steps=0)
    folded = folded_tensors(tensors)
    assert {name for name in folded if name.startswith(CLIP)} == {
        CLIP + name for block in blocks(lm.model, lm.arch).items() for name in linears(*block)
    }
    bounded, plain = (
        Rtn(grid=grid).quantize(lambda: lm, scales, Runtime())[0] for scales in (folded, site_scales(tensors))
    )
    assert bounded.keys() == plain.keys()
    assert all(torch.equal(bounded[name], plain[name]) for name in plain)


@pytest.mark.parametrize("overrides", [(), ("sites=all",)])
def test_what_is_stored_is_what_training_computed_with(tiny, overrides):
    """Blocks of the model that RTN makes have the loss on held-out windows that the record says."""
    lm = unequal(tiny("llama", "float32", *overrides))
    tensors, info = learned(lm, Grid(bits=2, group_size=16), steps=20)
    assert {entry["kept"] for entry in info["blocks"].values()} == {"last"}
    stored, _ = Rtn(grid=Grid(bits=2, group_size=16)).quantize(lambda: lm, folded_tensors(tensors), Runtime())
    model = copy.deepcopy(lm.model)
    restore(model, stored, Grid(bits=2, group_size=16))
    tokens = windows(84)[80:]
    exact_outputs, ours = (block_outputs(lm, m, tokens) for m in (lm.model, model))
    for name, entry in info["blocks"].items():
        expected = functional.mse_loss(ours[name], exact_outputs[name]).item()
        assert entry["loss"]["last"] == pytest.approx(expected, rel=1e-4)


def test_bounds_lower_the_loss_on_held_out_windows_beyond_scales_alone(tiny, family):
    lm, grid = unequal(tiny(family)), Grid(bits=2, group_size=-1)
    (_, alone), (tensors, both) = (learned(lm, grid, steps=40, bounds_lr=rate) for rate in (None, 0.02))
    first = next(iter(both["blocks"]))  # later ones read other inputs
    scales_only, entry = alone["blocks"][first], both["blocks"][first]
    assert entry["kept"] == "last" and entry["loss"]["start"] == scales_only["loss"]["start"]
    assert entry["loss"]["last"] < 0.9 * scales_only["loss"]["last"]
    folding = Folding.of(sites(lm.model, lm.arch), site_scales(tensors))
    for name, linear in linears(first, lm.model.get_submodule(first)).items():
        ends, bounds = group_extremes(folding.weight(name, linear), grid), tensors[CLIP + name]
        assert bounds.shape == ends.shape and (bounds.abs() <= ends.abs()).all()
        assert (bounds != ends).any()


@pytest.mark.parametrize("symmetric", [False, True])
def test_plan_predicts_their_memory(symmetric):
    (job,) = config.jobs(["model=tiny-llama", "method=teq"])
    grid = Grid(bits=3, group_size=16, symmetric=symmetric)
    settings, checkpoint = teq(objective="block", steps=2, batch=2, bounds_lr=0.01, grid=grid), job.run.model
    dimensions = checkpoint.source.dimensions()
    dimensions.num_hidden_layers = 5
    model = AutoModelForCausalLM.from_config(dimensions).eval().requires_grad_(False)
    predicted = estimate.estimate(settings, dimensions, checkpoint.arch, "float32", "keep")
    with LiveBytes() as live:
        live.count([*model.parameters(), *model.buffers()])
        settings.train_on(model, checkpoint.arch, windows(4), held_out=windows(8)[4:])
    waiting = settings.waiting_tokens * dimensions.hidden_size * 4
    assert predicted.bytes + waiting == pytest.approx(live.peak, rel=0.15)


OPTIONS = ["model=tiny-llama", "method=teq", "train.bounds_lr=0.01"]


def test_without_an_objective_that_reads_it_the_rate_is_refused():
    with pytest.raises(UserError, match=r"train\.bounds_lr=0\.01 has no effect beside train\.objective=lm: "):
        config.jobs(OPTIONS)
    with pytest.raises(UserError, match=r"train\.bounds_lr=0 is not allowed: it must be a number .*above 0"):
        config.jobs([*OPTIONS, "train.objective=block", "train.bounds_lr=0"])


def test_the_rate_is_in_the_key_where_it_is_given():
    with_it, without = (
        config.jobs([*words, "train.objective=block"])[0].run.transform for words in (OPTIONS, OPTIONS[:2])
    )
    assert with_it.plain()["bounds_lr"] == 0.01 and "bounds_lr" not in without.plain()


def test_a_model_that_is_not_rounded_is_not_clipped(tiny):
    lm = unequal(tiny("llama"))
    tensors, _ = learned(lm, Grid(bits=2, group_size=-1))
    clipped, plain = (
        Keep().quantize(lambda: lm, scales, Runtime())[0]
        for scales in (folded_tensors(tensors), site_scales(tensors))
    )
    assert all(torch.equal(clipped[name], plain[name]) for name in plain)
