"""GPTQ against golden tensors of the official code, and the identities it must satisfy."""

import pathlib

import pytest
import torch
from safetensors.torch import load_file

from teq.data.texts import Calibration
from teq.grid import Grid, group_params, spread
from teq.quantizers.gptq import solver
from teq.quantizers.gptq.settings import ORDERS, Gptq
from teq.quantizers.gptq.solver import Hessian
from teq.quantizers.quantized import round_to_nearest
from teq.spec import UserError

ORACLE = load_file(pathlib.Path(__file__).parent / "oracles" / "gptq.safetensors")
CASES = [name for name in ORACLE if name.startswith(("gptq.", "rtn."))]


def settings(bits=3, group_size=32, symmetric=False, **kwargs):
    grid = Grid(bits=bits, group_size=group_size, symmetric=symmetric)
    return Gptq(grid=grid, calib=Calibration(), samples=1, length=2, **kwargs)


def parse(name):
    """`gptq.b3.g32.asym.act_order` -> (Grid, options); the name ends with the official code's flags."""
    _, bits, group, kind, *options = name.split(".")
    order = {"static_groups": "static", "act_order": "act"}[options[-1]] if options else "natural"
    return Grid(bits=int(bits[1:]), group_size=int(group[1:]), symmetric=kind == "sym"), {"order": order}


def hessian():
    total = Hessian(224, torch.device("cpu"))
    for batch in ORACLE["inputs"].split(64):
        total.add(batch[None])
    return total.mean()


@pytest.mark.parametrize("name", CASES)
def test_codes_equal_the_official_codes(name):
    grid, options = parse(name)
    if name.startswith("rtn."):
        ours = round_to_nearest(ORACLE["weight"], grid)
    else:
        chosen = Gptq(grid=grid, calib=Calibration(), samples=1, length=2, **options)
        ours = chosen.solve([(ORACLE["weight"], hessian())])[0].quantized
    dequantized = ours.dequantize(grid)
    torch.testing.assert_close(dequantized, ORACLE[name], rtol=1e-5, atol=1e-6)
    # equal values on the same grid are equal codes: recover the oracle's codes with our own parameters
    scale = spread(ours.scale, grid, 224, ours.g_idx)
    theirs = (ORACLE[name] / scale).round() + spread(ours.zero, grid, 224, ours.g_idx)
    assert torch.equal(theirs, ours.codes.float())


@pytest.mark.parametrize("width", [256, 257, 600, 2100])  # one band, a band of one row, some, wider ones
def test_the_hessian_made_in_bands_is_twice_the_mean_product(width):
    inputs = torch.randn(3, 2, 8, width, generator=torch.Generator().manual_seed(0))
    total = Hessian(width, torch.device("cpu"))
    for batch in inputs:
        total.add(batch)
    flat = inputs.flatten(0, -2).double()
    torch.testing.assert_close(total.mean().double(), flat.T @ flat * (2 / 6), rtol=1e-5, atol=1e-4)


def test_the_cross_term_is_twice_the_mean_product_of_the_inputs_errors():
    inputs, exact = torch.randn(2, 3, 2, 8, 300, generator=torch.Generator().manual_seed(0))
    total = Hessian(300, torch.device("cpu"))
    for batch in zip(inputs, exact, strict=True):
        total.add(*batch)
    flat, other = (part.flatten(0, -2).double() for part in (inputs, exact))
    expected = (other - flat).T @ flat * (2 / 6)
    torch.testing.assert_close(total.mean_cross().double(), expected, rtol=1e-5, atol=1e-4)


def test_identity_hessian_is_rounding():
    weight = ORACLE["weight"]
    chosen = settings(group_size=32)
    ours = chosen.solve([(weight, torch.eye(224))])[0].quantized
    assert torch.equal(ours.codes, round_to_nearest(weight, chosen.grid).codes)


def test_error_is_below_that_of_rounding():
    weight, h, chosen = ORACLE["weight"], hessian(), settings()
    lost = round_to_nearest(weight, chosen.grid).dequantize(chosen.grid) - weight
    rounding = float(((lost @ h) * lost).sum())
    assert chosen.solve([(weight, h)])[0].error < 0.7 * rounding


@pytest.mark.parametrize("cross", [[], [torch.ones(224, 224) / 100]], ids=["plain", "corrected"])
@pytest.mark.parametrize(
    "options", [{}, {"order": "act"}, {"order": "group"}, {"group_size": -1}, {"block_size": 50}]
)
def test_error_is_that_of_the_weights_under_the_hessian(options, cross):
    h, chosen = hessian(), settings(**options)
    h[7, :] = h[:, 7] = 0
    (solution,) = chosen.solve([(ORACLE["weight"], h, *cross)])
    lost = solution.quantized.dequantize(chosen.grid) - ORACLE["weight"]
    lost[:, 7] = 0
    assert solution.error == pytest.approx(float(((lost.double() @ h.double()) * lost).sum()), rel=1e-4)


def drifted(count=64):
    """A layer, its inputs, and the float model's, a tenth of each off those: weight, x, x_float."""
    weight, x = ORACLE["weight"][:, -count:], ORACLE["inputs"][:, -count:]
    other = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return weight, x, x + 0.1 * (x.roll(1, 1) + other * x.std())


def reference(weight, h, cross, params, grid, order):
    """GPTAQ's loop column by column in fp64, each inverse by itself; params are those of columns."""
    scale, zero = (p.double() for p in params)
    w, h, cross = weight.double()[:, order], h.double()[order][:, order], cross.double()[order][:, order]
    h += 0.01 * h.diagonal().mean() * torch.eye(len(h))
    codes = torch.zeros_like(w)
    for i, at in enumerate(order):
        column, rest, inverse = w[:, i].clone(), slice(i + 1, None), torch.linalg.inv(h[i:, i:])
        code = ((column / scale[:, at]).round() + zero[:, at]).clamp(0, grid.levels)
        lost = column - scale[:, at] * (code - zero[:, at])
        w[:, rest] -= torch.outer(lost, inverse[0, 1:] / inverse[0, 0])
        w[:, rest] += torch.outer(column, cross[i, rest] @ torch.linalg.inv(h[rest, rest]))
        codes[:, at] = code
    return codes


@pytest.mark.parametrize("block_size", [1, 24, 128])
@pytest.mark.parametrize("share", [0.25, 1.0])
@pytest.mark.parametrize(
    ("group_size", "order"), [(-1, "natural"), (-1, "act"), (-1, "group"), (16, "static")]
)
def test_corrected_codes_are_those_of_a_plain_fp64_loop(group_size, order, share, block_size):
    weight, x, exact = drifted()
    h, cross = x.T @ x, share * ((exact - x).T @ x)
    chosen = settings(group_size=group_size, order=order, block_size=block_size)
    ours = chosen.solve([(weight, h, cross)])[0].quantized.codes
    visited = torch.arange(64) if order == "natural" else h.diagonal().argsort(descending=True)
    params = [spread(p, chosen.grid, 64) for p in group_params(weight, chosen.grid)]
    assert torch.equal(ours.double(), reference(weight, h, cross, params, chosen.grid, visited))
    assert not torch.equal(ours, chosen.solve([(weight, h)])[0].quantized.codes)


@pytest.mark.parametrize("order", ORDERS)
def test_inputs_without_an_error_give_gptqs_codes(order):
    chosen, weight = settings(order=order), ORACLE["weight"]
    plain, corrected = (
        chosen.solve([(weight, hessian(), *cross)])[0] for cross in ([], [torch.zeros(224, 224)])
    )
    assert torch.equal(plain.quantized.codes, corrected.quantized.codes)
    assert torch.equal(plain.quantized.scale, corrected.quantized.scale)
    assert corrected.error == pytest.approx(float(plain.error), rel=1e-4)


@pytest.mark.parametrize("order", ORDERS)
def test_correction_comes_closer_to_the_float_models_outputs(order):
    weight, x, exact = drifted(224)
    chosen, lost = settings(order=order), []
    for share in (0, 0.25, 0.5, 1):
        cross = share * ((exact - x).T @ x)
        q = chosen.solve([(weight, x.T @ x, cross)])[0].quantized.dequantize(chosen.grid)
        lost.append(float((x @ q.T - exact @ weight.T).norm()))
    assert lost[2] < 0.96 * lost[0] and all(each < lost[0] for each in lost[1:])


def importance():
    """A Hessian's diagonal in which neither groups of 32 nor columns in them are sorted."""
    return torch.rand(224, generator=torch.Generator().manual_seed(0)) + 0.1


def test_group_order_on_a_sorted_diagonal_is_the_natural_order():
    h = hessian()
    sorted_by = h.diagonal().argsort(descending=True)
    weight, h = ORACLE["weight"][:, sorted_by], h[sorted_by][:, sorted_by]
    natural, group = (settings(order=o).solve([(weight, h)])[0].quantized for o in ("natural", "group"))
    assert group.g_idx is None and torch.equal(group.scale, natural.scale)
    assert torch.equal(group.codes, natural.codes)


@pytest.mark.parametrize("size", [32, 96, 300])  # whole groups, a shorter last one, that alone
def test_group_order_keeps_groups_together(size):
    order = solver.group_order(importance(), size)
    runs, values = order.split(size), importance()
    assert torch.equal(order.sort().values, torch.arange(224))
    assert all(len((run // size).unique()) == 1 for run in runs)
    assert all((values[run].diff() <= 0).all() for run in runs)
    whole = [run for run in runs if len(run) == size]
    assert [float(values[run[0]]) for run in whole] == sorted(
        (float(part.max()) for part in values.split(size)[: len(whole)]), reverse=True
    )


@pytest.mark.parametrize("size", [32, 96])
def test_group_order_equals_natural_order_on_permuted_columns(size):
    h = hessian()
    order = solver.group_order(h.diagonal(), size)
    by_hand = settings(group_size=size).solve([(ORACLE["weight"][:, order], h[order][:, order])])[0].quantized
    chosen = settings(group_size=size, order="group")
    ours = chosen.solve([(ORACLE["weight"], h)])[0].quantized
    assert torch.equal(ours.codes[:, order], by_hand.codes)
    assert torch.equal(ours.dequantize(chosen.grid)[:, order], by_hand.dequantize(chosen.grid))


def test_orders_lower_the_error_and_only_dynamic_groups_need_an_index():
    found = {o: settings(order=o).solve([(ORACLE["weight"], hessian())])[0] for o in ORDERS}
    assert all(found[o].error < 1.05 * found["natural"].error for o in ORDERS)
    assert [o for o in ORDERS if found[o].quantized.g_idx is not None] == ["act"]


def test_rows_solved_together_equal_rows_solved_alone():
    chosen = settings()
    together = chosen.solve([(ORACLE["weight"], hessian())])[0].quantized
    alone = [chosen.solve([(part, hessian())])[0].quantized for part in ORACLE["weight"].split(4)]
    assert torch.equal(together.codes, torch.cat([part.codes for part in alone]))


def test_dead_columns_become_zero():
    h = hessian()
    h[7, :] = h[:, 7] = 0
    for group_size in (-1, 32):
        chosen = settings(group_size=group_size)
        q = chosen.solve([(ORACLE["weight"], h)])[0].quantized
        assert not q.dequantize(chosen.grid)[:, 7].any()


def test_whole_row_grid_is_taken_before_dead_columns_are_zeroed():
    weight = ORACLE["weight"].clone()
    weight[:, 7] = 10.0
    h = hessian()
    h[7, :] = h[:, 7] = 0
    chosen = settings(group_size=-1)
    assert torch.equal(chosen.solve([(weight, h)])[0].quantized.scale, group_params(weight, chosen.grid)[0])


def test_damping_ladder_is_climbed_and_recorded():
    x = torch.randn(3, 224, generator=torch.Generator().manual_seed(0))
    singular = x.T @ x - 0.02 * torch.eye(224) * (x.T @ x).diagonal().mean()
    (solution,) = settings().solve([(ORACLE["weight"], singular)])
    assert solution.damping == pytest.approx(0.1)


def test_hopeless_hessian_is_refused():
    with pytest.raises(UserError, match="not positive definite"):
        settings().solve([(ORACLE["weight"], torch.eye(224) - 200 * torch.ones(224, 224) / 224)])
