"""Searched grids: the least error that their measure knows, in every quantizer the same."""

import itertools

import pytest
import torch

from teq import config
from teq.grid import Grid, decode, encode, group_params, spread
from teq.quantizers.gptq import solver
from teq.quantizers.quantized import round_to_nearest
from teq.quantizers.search import GroupGrams, searched_params
from teq.report import match


def problem(grid, columns=64):
    """A weight `[8, columns]` and the Gram matrices of correlated inputs."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(8, columns, generator=draw)
    mixing = torch.randn(columns, columns, generator=draw)
    inputs = torch.randn(1, 200, columns, generator=draw) @ mixing
    grams = GroupGrams(grid, columns, torch.device("cpu"))
    grams.add(inputs)
    return weight, inputs[0], grams.mean()


def errors(weight, params, inputs, grid):
    """Per row and group: the group's squared share of the output's error, and that of its diagonal."""
    columns = weight.shape[1]
    scale, zero = (spread(p, grid, columns) for p in params)
    lost = decode(encode(weight, scale, zero, grid), scale, zero) - weight
    parts = [(inputs[:, a:b] @ lost[:, a:b].T).square().mean(0) for a, b in grid.spans(columns)]
    alone = [lost[:, a:b].square() @ inputs[:, a:b].square().mean(0) for a, b in grid.spans(columns)]
    return torch.stack(parts, 1), torch.stack(alone, 1)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("size", [16, 24, -1])  # 24: the last group has 16
@pytest.mark.parametrize(("search", "measure"), [("clip", 0), ("hessian", 1)])
def test_no_group_ends_worse_than_its_extremes(search, measure, size, symmetric):
    grid = Grid(bits=3, group_size=size, symmetric=symmetric, search=search)
    weight, inputs, grams = problem(grid)
    found = errors(weight, searched_params(weight, grams, grid), inputs, grid)[measure]
    plain = errors(weight, group_params(weight, grid), inputs, grid)[measure]
    assert (found <= plain * (1 + 1e-4)).all() and found.sum() < 0.95 * plain.sum()


def test_the_search_under_the_diagonal_finds_what_brute_force_finds():
    grid = Grid(bits=2, group_size=16, search="hessian")
    weight, inputs, grams = problem(grid)
    found = errors(weight, searched_params(weight, grams, grid), inputs, grid)[1]
    widest, _ = group_params(weight, grid)
    best = torch.full_like(found, torch.inf)
    for share, zero in itertools.product(torch.linspace(0.2, 1.1, 400), range(4)):
        params = widest * share, torch.full_like(widest, zero)
        best = torch.minimum(best, errors(weight, params, inputs, grid)[1])
    assert (found <= 1.1 * best).all() and found.sum() <= 1.01 * best.sum()


def test_zeros_are_integers_in_range_and_scales_are_storable():
    for search in ("clip", "hessian"):
        grid = Grid(bits=3, group_size=16, search=search, scale_dtype="float16")
        weight, _, grams = problem(grid)
        weight[:, :16] = weight[:, :16].abs()
        weight[:, 16:32] = 0
        scale, zero = searched_params(weight, grams, grid)
        assert torch.equal(scale, scale.half().float()) and (scale > 0).all()
        assert torch.equal(zero, zero.round().clamp(0, 7))
        assert not round_to_nearest(weight, grid, (scale, zero)).dequantize(grid)[:, 16:32].any()


@pytest.mark.parametrize("size", [16, 24, -1])
@pytest.mark.parametrize("search", ["clip", "hessian"])
def test_gptq_without_correlations_is_searched_rounding(search, size):
    grid = Grid(bits=3, group_size=size, search=search)
    weight, _, _ = problem(grid)
    spans = [torch.eye(stop - start) for start, stop in grid.spans(64)]
    expected = round_to_nearest(weight, grid, searched_params(weight, spans, grid))
    (solution,) = solver.solve([(weight, torch.eye(64))], grid)
    assert torch.equal(solution.quantized.codes, expected.codes)
    assert torch.equal(solution.quantized.scale, expected.scale)


def test_a_group_has_its_block_of_the_whole_products():
    grid = Grid(bits=3, group_size=24)
    grams, inputs = GroupGrams(grid, 64, torch.device("cpu")), torch.randn(3, 5, 64)
    for sample in inputs.split(1):
        grams.add(sample)
    whole = inputs.flatten(0, 1).T @ inputs.flatten(0, 1) / 15
    for (start, stop), gram in zip(grid.spans(64), grams.mean(), strict=True):
        assert torch.allclose(gram, whole[start:stop, start:stop], atol=1e-5)


@pytest.mark.parametrize("change", ["quant_grid.search=clip", "sites=all"])
def test_a_run_with_it_stands_for_no_other_in_a_table(change):
    plain, changed = (
        config.jobs(["model=tiny-llama", "method=teq", *more])[0].run.plain() for more in ([], [change])
    )
    assert match.group_key(plain) != match.group_key(changed)
