"""The grid: identities and properties that hold for every weight."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from teq.grid import Grid, decode, encode, fake_quant, group_params, pack, spread, unpack
from teq.quantizers.quantized import round_to_nearest

SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 70))
GRIDS = st.builds(
    Grid, bits=st.integers(1, 8), group_size=st.sampled_from([-1, 1, 7, 16, 64]), symmetric=st.booleans()
)


def weights(shape, seed, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def quantized(weight, grid):
    scale, zero = group_params(weight, grid)
    columns = weight.shape[1]
    codes = encode(weight, spread(scale, grid, columns), spread(zero, grid, columns), grid)
    return codes, scale, zero


@given(SHAPES, GRIDS, st.integers(0, 999))
def test_training_and_quantizing_see_one_grid(shape, grid, seed):
    weight = weights(shape, seed)
    codes, scale, zero = quantized(weight, grid)
    stored = decode(codes, spread(scale, grid, shape[1]), spread(zero, grid, shape[1]))
    assert torch.equal(fake_quant(weight, grid), stored)


@given(SHAPES, GRIDS, st.integers(0, 999))
def test_codes_are_on_the_grid_and_errors_at_most_half_a_step(shape, grid, seed):
    weight = weights(shape, seed)
    codes, scale, zero = quantized(weight, grid)
    assert scale.shape == (shape[0], grid.group_count(shape[1])) == zero.shape
    assert ((codes >= 0) & (codes <= grid.levels) & (codes == codes.round())).all()
    step = spread(scale, grid, shape[1])
    error = (decode(codes, step, spread(zero, grid, shape[1])) - weight).abs()
    # rounding the zero may cost another half step at an end of the range; symmetric lacks its top level
    assert (error <= step * (1.001 if not grid.symmetric else 1.501)).all()


@given(SHAPES, st.integers(1, 8), st.integers(0, 999))
def test_packing_loses_nothing_and_takes_bits_per_code(shape, bits, seed):
    codes = torch.randint(2**bits, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack(codes, bits)
    assert packed.numel() == -(-codes.numel() * bits // 8)
    stream = sum(int(code) << (bits * i) for i, code in enumerate(codes.flatten()))
    assert int.from_bytes(bytes(packed.tolist()), "little") == stream
    assert torch.equal(unpack(packed, bits, shape), codes)


def test_zero_group_stays_zero_and_zero_is_always_representable():
    grid = Grid(bits=3, group_size=4)
    weight = torch.tensor([[0.0, 0, 0, 0, 1, 2, 3, 0]])
    assert torch.equal(fake_quant(weight, grid)[0, [0, 1, 2, 3, 7]], torch.zeros(5))


def test_last_group_may_be_shorter():
    grid = Grid(bits=3, group_size=64)
    weight = weights((3, 100), 0)
    tail = Grid(bits=3, group_size=-1)
    assert torch.equal(fake_quant(weight, grid)[:, 64:], fake_quant(weight[:, 64:], tail))
    assert grid.spans(100) == [(0, 64), (64, 100)]


@pytest.mark.parametrize("group_size", [-1, 100, 4096])
def test_a_group_as_wide_as_the_row_is_the_row(group_size):
    weight = weights((3, 100), 0)
    expected = fake_quant(weight, Grid(bits=4, group_size=-1))
    assert torch.equal(fake_quant(weight, Grid(bits=4, group_size=group_size)), expected)


@pytest.mark.parametrize("factor", [0.125, 4.0, 1024.0])
def test_a_scale_of_the_whole_group_changes_no_code(factor):
    weight, grid = weights((4, 64), 3), Grid(bits=3, group_size=16)
    assert torch.equal(quantized(weight, grid)[0], quantized(weight * factor, grid)[0])


def test_rounding_is_half_to_even():
    grid = Grid(bits=3, group_size=-1)
    weight = torch.tensor([[-3.0, 0.5, 1.5, 4.0]])  # scale 1, zero 3
    assert torch.equal(fake_quant(weight, grid), torch.tensor([[-3.0, 0.0, 2.0, 4.0]]))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_are_rounded_before_codes_are_computed(dtype, symmetric):
    name = str(dtype).removeprefix("torch.")
    grid = Grid(bits=8, group_size=16, symmetric=symmetric, scale_dtype=name)
    weight = torch.cat([weights((8, 64), 3), torch.zeros(1, 64), torch.full((1, 64), 1e-9)])
    scale, zero = group_params(weight, grid)
    assert torch.equal(scale, scale.to(dtype).float()) and (scale > 0).all()
    assert zero.min() >= 0 and zero.max() <= grid.levels
    assert torch.equal(fake_quant(weight, grid), round_to_nearest(weight, grid).dequantize(grid))


def test_the_dtype_of_scales_is_in_the_key_where_it_is_not_the_default():
    plain = Grid(bits=3, group_size=16)
    assert plain.key() == Grid(bits=3, group_size=16, scale_dtype="float32").key()
    assert plain.key() != Grid(bits=3, group_size=16, scale_dtype="float16").key()
    assert "scale_dtype" not in plain.plain()


def test_bits_per_weight_count_scales_and_zeros():
    square = [(256, 256), (512, 256)]
    assert Grid(bits=4, group_size=128, scale_dtype="float16").bits_per_weight(square) == 4.156
    assert Grid(bits=4, group_size=128).bits_per_weight(square) == round(4 + (32 + 4) / 128, 3)
    assert Grid(bits=4, group_size=-1, symmetric=True).bits_per_weight(square) == 4 + 32 / 256
    # the shorter group at the end of a row costs as much as a whole one
    ragged = Grid(bits=3, group_size=64, scale_dtype="float16").bits_per_weight([(8, 96)])
    assert ragged == round(3 + 19 * 2 / 96, 3)
