"""Quantized linears, their stored form, and the model restored from it.

The stored form is complete: `<linear>/codes` (bit-packed), `/scale` and `/zero` `[out, groups]`, `/g_idx
[in]` under act-order, and `param/<name>` for every other parameter that folding changed. What is evaluated is
what `restore` makes of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from teq.grid import Grid, decode, encode, group_params, pack, spread, unpack

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Quantized:
    """A linear on the grid: codes `[out, in]` uint8, scale and zero `[out, groups]` fp32, g_idx `[in]`."""

    codes: "Tensor"
    scale: "Tensor"
    zero: "Tensor"
    g_idx: "Tensor | None" = None

    def dequantize(self, grid: Grid) -> "Tensor":
        """Return the weight `[out, in]` in fp32 that these codes stand for."""
        codes, columns, groups = self.codes.float(), self.codes.shape[1], self.scale.shape[1]
        if self.g_idx is None and columns == groups * (columns if groups == 1 else grid.group_size):
            return decode(
                codes.unflatten(1, (groups, -1)), self.scale[..., None], self.zero[..., None]
            ).flatten(1)
        scale = spread(self.scale, grid, columns, self.g_idx)
        return decode(codes, scale, spread(self.zero, grid, columns, self.g_idx))


def round_to_nearest(
    weight: "Tensor", grid: Grid, params: "tuple[Tensor, Tensor] | None" = None
) -> Quantized:
    """Return `weight [out, in]` (fp32) on the grid; scale and zero are its extremes' where none are given."""
    import torch

    scale, zero = params or group_params(weight, grid)
    columns = weight.shape[1]
    codes = encode(weight, spread(scale, grid, columns), spread(zero, grid, columns), grid)
    return Quantized(codes.to(torch.uint8), scale, zero)


def stored(
    quantized: Mapping[str, Quantized], changed: Mapping[str, "Tensor"], grid: Grid
) -> dict[str, "Tensor"]:
    """Return an artefact's tensors: quantized linears by name, parameters that folding changed."""
    import torch

    tensors = {f"param/{name}": value for name, value in changed.items()}
    for name, q in quantized.items():
        tensors[f"{name}/codes"] = pack(q.codes, grid.bits)
        tensors[f"{name}/scale"] = q.scale.float()
        tensors[f"{name}/zero"] = q.zero.to(torch.uint8)
        if q.g_idx is not None:
            tensors[f"{name}/g_idx"] = q.g_idx.to(torch.int32)
    return tensors


def linear_from(tensors: Mapping[str, "Tensor"], name: str, grid: Grid, shape: tuple[int, ...]) -> Quantized:
    """Return the linear `name` of `shape` [out, in] out of an artefact's tensors."""
    return Quantized(
        codes=unpack(tensors[f"{name}/codes"], grid.bits, shape),
        scale=tensors[f"{name}/scale"],
        zero=tensors[f"{name}/zero"].float(),
        g_idx=tensors.get(f"{name}/g_idx"),
    )


def shapes(tensors: Mapping[str, "Tensor"], grid: Grid) -> dict[str, tuple[int, int]]:
    """Return `[out, in]` of each linear of an artefact: `out` from its scales, `in` from its codes."""
    found = {}
    for key, codes in tensors.items():
        name, _, part = key.rpartition("/")
        if part == "codes":
            rows = tensors[f"{name}/scale"].shape[0]
            found[name] = rows, codes.numel() * 8 // (grid.bits * rows)
    return found


def restore(model: "nn.Module", tensors: Mapping[str, "Tensor"], grid: Grid | None) -> None:
    """Put an artefact into a freshly loaded model, in place: dequantized weights and changed parameters."""
    import torch

    with torch.no_grad():
        for key, value in tensors.items():
            name, _, part = key.rpartition("/")
            if name == "param":
                model.get_parameter(part).copy_(value)
            elif part == "codes":
                weight = model.get_parameter(f"{name}.weight")
                weight.copy_(linear_from(tensors, name, grid, tuple(weight.shape)).dequantize(grid))
