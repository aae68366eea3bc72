"""The b-bit affine grid that every method shares: parameters, codes, dequantization, straight-through.

`weight [out, in]` is cut along `in` into groups of `group_size` consecutive channels (-1: the whole row); a
row whose length is not a multiple of it ends in one shorter group. Groups are shapes `[out, groups]`
everywhere.
"""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from teq.spec import Settings, UserError, option

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Grid(Settings):
    """How finely a weight is represented: `2 ** bits` levels per group of `group_size` input channels.

    Scales are rounded to `scale_dtype` before codes are computed, so that a file of such scales is exact.
    `search` is how a quantizer finds them: from a group's extremes, or see `teq.quantizers.search`.
    """

    bits: int = option(at_least=1, at_most=8)
    group_size: int = option(at_least=-1)
    symmetric: bool = False
    scale_dtype: str = option(
        "float32",
        among=("float32", "float16", "bfloat16"),
        key="quant_grid.scale_dtype",
        omitted="float32",
    )
    search: str = option("none", among=("none", "clip", "hessian"), key="quant_grid.search", omitted="none")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size == 0:
            raise UserError(
                "group_size=0 is not allowed: it must be a positive whole number, or -1 for whole rows"
            )

    @property
    def unsearched(self) -> "Grid":
        """Return the same grid with scales from extremes, for work that a search would be too slow in."""
        return dataclasses.replace(self, search="none")

    @property
    def levels(self) -> int:
        """Return the largest code, `2 ** bits - 1`."""
        return 2**self.bits - 1

    def group_count(self, columns: int) -> int:
        """Return the number of groups in a row of `columns` input channels."""
        return -(-columns // self.width(columns))

    def width(self, columns: int) -> int:
        """Return the number of channels in a group of a row of `columns`; the last group may have fewer."""
        return columns if self.group_size == -1 else self.group_size

    def bits_per_weight(self, shapes: Iterable[tuple[int, int]]) -> float:
        """Return the bits of a weight `[out, in]` with its share of scale and zero, over all `shapes`."""
        count = groups = 0
        for rows, columns in shapes:
            count, groups = count + rows * columns, groups + rows * self.group_count(columns)
        scale = 32 if self.scale_dtype == "float32" else 16
        return round(self.bits + groups / count * (scale + (0 if self.symmetric else self.bits)), 3)

    def spans(self, columns: int) -> list[tuple[int, int]]:
        """Return the `[start, stop)` columns of each group."""
        size = self.width(columns)
        return [(start, min(start + size, columns)) for start in range(0, columns, size)]


def qparams(block: "Tensor", grid: Grid) -> tuple["Tensor", "Tensor"]:
    """Return scale and zero of each group.

    block: `[..., group]`, fp32, one group in the last dimension. Returns scale and zero `[...]`, fp32.

    Asymmetric (GPTQ's `quant.py`, neural-compressor's `quant_weight_asym`): lo = min(w, 0), hi = max(w, 0),
    both 0 -> -1, 1; scale = (hi - lo) / (2^b - 1); zero = round(-lo / scale). Symmetric: scale = 2 max|w| /
    (2^b - 1), zero = 2^(b-1), as GPTQ's code does for a group that has a negative weight.
    """
    return params_between(*extremes(block), grid)


def extremes(block: "Tensor") -> tuple["Tensor", "Tensor"]:
    """Return `min(w, 0)` and `max(w, 0)` `[...]` of groups `[..., group]`."""
    # two passes: torch.aminmax over a short last dimension is ten times slower than both together on a CPU
    return block.amin(-1).clamp_(max=0), block.amax(-1).clamp_(min=0)


def group_extremes(weight: "Tensor", grid: Grid) -> "Tensor":
    """Return the lower and upper extremes `[2, out, groups]` of `weight [out, in]`, -+max|w| if symmetric."""
    import torch

    lo, hi = (torch.cat(each, 1) for each in zip(*map(extremes, grouped(weight, grid)), strict=True))
    if grid.symmetric:
        hi = torch.maximum(hi, lo.neg())
        lo = hi.neg()
    return torch.stack([lo, hi])


def params_between(lo: "Tensor", hi: "Tensor", grid: Grid) -> tuple["Tensor", "Tensor"]:
    """Return scale and zero of groups whose weights lie between lo <= 0 and hi >= 0, which are used up."""
    import torch

    if grid.symmetric:
        hi = torch.maximum(hi, lo.neg())
        lo = hi.neg()
    empty = (lo == 0) & (hi == 0)
    lo, hi = lo.masked_fill_(empty, -1), hi.masked_fill_(empty, 1)
    scale = storable((hi - lo).div_(grid.levels), grid)
    if grid.symmetric:
        return scale, torch.full_like(scale, 2 ** (grid.bits - 1))
    return scale, lo.neg_().div_(scale).round_().clamp_(max=grid.levels)


def storable(scale: "Tensor", grid: Grid) -> "Tensor":
    """Return positive scales rounded to the grid's `scale_dtype`, in their own dtype."""
    import torch

    if grid.scale_dtype == "float32":
        return scale
    dtype = getattr(torch, grid.scale_dtype)
    held = torch.finfo(dtype)
    return scale.clamp(held.smallest_normal * held.eps, held.max).to(dtype).to(scale)


def grouped(weight: "Tensor", grid: Grid) -> list["Tensor"]:
    """Return views `[out, groups, group]` of `weight [out, in]`: whole groups, then a shorter last one."""
    columns = weight.shape[1]
    size = min(grid.width(columns), columns)
    whole = columns - columns % size
    parts = weight[:, :whole].unflatten(1, (-1, size)), weight[:, None, whole:]
    return [part for part in parts if part.numel()]


def group_params(weight: "Tensor", grid: Grid) -> tuple["Tensor", "Tensor"]:
    """Return scale and zero `[out, groups]` of `weight [out, in]` (fp32)."""
    import torch

    scale, zero = zip(*(qparams(part, grid) for part in grouped(weight, grid)), strict=True)
    return torch.cat(scale, 1), torch.cat(zero, 1)


def encode(weight: "Tensor", scale: "Tensor", zero: "Tensor", grid: Grid) -> "Tensor":
    """Return codes `clamp(round(w / scale) + zero, 0, 2^b - 1)`, half to even, fp32; arguments broadcast."""
    return (weight / scale).round_().add_(zero).clamp_(0, grid.levels)


def decode(codes: "Tensor", scale: "Tensor", zero: "Tensor") -> "Tensor":
    """Return `(codes - zero) * scale`, broadcasting."""
    return (codes - zero).mul_(scale)


def spread(params: "Tensor", grid: Grid, columns: int, g_idx: "Tensor | None" = None) -> "Tensor":
    """Return parameters `[out, groups]` by column, `[out, in]`; `g_idx [in]` overrides the grouping."""
    if g_idx is not None:
        return params[:, g_idx.long()]
    return params.repeat_interleave(grid.width(columns), dim=1)[:, :columns]


def in_equal_parts(params: "Tensor", grid: Grid, columns: int) -> "Tensor":
    """Return parameters `[..., out, groups]` of equal parts of a row `[..., out, parts]`.

    Parts are the groups, or equal pieces of them where the last group is shorter.
    """
    import torch

    size = grid.width(columns)
    return params[..., torch.arange(0, columns, math.gcd(columns, size), device=params.device) // size]


def fake_quant(weight: "Tensor", grid: Grid) -> "Tensor":
    """Quantize and dequantize `weight [out, in]` (fp32), as straight-through training does.

    Bit-equal to `decode(encode(...))` over `group_params`; written with in-place passes because it runs over
    every weight at every training step.
    """
    import torch

    out = torch.empty_like(weight)
    for part, target in zip(grouped(weight, grid), grouped(out, grid), strict=True):
        scale, zero = (p[..., None] for p in qparams(part, grid))
        torch.div(part, scale, out=target)
        target.round_().add_(zero).clamp_(0, grid.levels).sub_(zero).mul_(scale)
    return out


def pack(codes: "Tensor", bits: int) -> "Tensor":
    """Return integer codes of any shape as a little-endian bit stream, uint8 `[ceil(n * bits / 8)]`."""
    import torch

    flat = codes.reshape(-1).to(torch.uint8)
    word = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(torch.int64)  # 8 codes, always a copy
    for held, lane in ((bits * count, 8 * count) for count in (1, 2, 4)):
        low, high = _halves(held, lane)
        upper = (word & high).bitwise_right_shift_(lane - held)
        word.bitwise_and_(low).bitwise_or_(upper)
    packed = word.view(torch.uint8).view(-1, 8)[:, :bits].contiguous()
    return packed.view(-1)[: -(-codes.numel() * bits // 8)]


def unpack(packed: "Tensor", bits: int, shape: tuple[int, ...]) -> "Tensor":
    """Return the inverse of `pack`: codes of `shape`, uint8."""
    import torch

    whole = torch.nn.functional.pad(packed, (0, -packed.numel() % bits)).view(-1, bits)
    word = torch.nn.functional.pad(whole, (0, 8 - bits)).view(torch.int64).flatten()
    for held, lane in ((bits * count, 8 * count) for count in (4, 2, 1)):
        low, high = _halves(held, lane)
        upper = (word << (lane - held)).bitwise_and_(high)
        word.bitwise_and_(low).bitwise_or_(upper)
    return word.view(torch.uint8)[: math.prod(shape)].view(shape)


def _halves(held: int, lane: int) -> tuple[int, int]:
    """Return two masks of 64 bits: the low `held` bits of lanes of `lane` bits, even lanes and odd ones."""
    lanes = [((1 << held) - 1) << start for start in range(0, 64, lane)]
    low, high = sum(lanes[::2]), sum(lanes[1::2])
    return low, high - ((high >> 63) << 64)  # int64 has a sign
