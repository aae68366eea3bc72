"""The relative error of every quantized linear, as records hold it."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from teq.grid import Grid
from teq.quantizers.quantized import Quantized
from teq.record import OUTPUT_ERROR

if TYPE_CHECKING:
    from torch import Tensor


def output_errors(
    exact: "Mapping[str, Tensor]",
    quantized: Mapping[str, Quantized],
    grams: "Mapping[tuple[str, ...], Tensor]",
    grid: Grid,
) -> "dict[str, Tensor]":
    """Return `||(W - Q) X||^2 / ||W X||^2` of each linear, W its folded weight `exact`, `[out, in]` fp32.

    `grams` are `X X^T [in, in]` or a multiple of it, by the linears that read the input X.
    """
    shares = {}
    for names, gram in grams.items():
        for name in names:
            lost = quantized[name].dequantize(grid).sub_(exact[name])
            shares[name] = _through(lost, gram) / _through(exact[name], gram)
    return shares


def weight_error(lost: "Tensor", weight: "Tensor") -> "Tensor":
    """Return `||W - Q||_F^2 / ||W||_F^2` in fp64, `lost` being the difference."""
    return _squared(lost) / _squared(weight)


def read_back(shares: "Mapping[str, Tensor]") -> dict[str, float]:
    """Return the numbers of some linears, read in one go: every read waits for the device."""
    import torch

    return dict(zip(shares, torch.stack([*shares.values()]).tolist(), strict=True))


def defined(shares: Mapping[str, float]) -> dict[str, float]:
    """Leave out linears without a relative error: their weight or output is zero."""
    return {name: share for name, share in shares.items() if math.isfinite(share)}


def collected(report: "Mapping[str, dict[str, Any]]") -> dict[str, float]:
    """Take the errors of all linears out of a report, which lacks them where older code wrote a block's."""
    parts = [entry.pop(OUTPUT_ERROR, {}) for entry in report.values()]
    return defined({name: error for part in parts for name, error in part.items()})


def _through(matrix: "Tensor", gram: "Tensor") -> "Tensor":
    """Return `tr(M G M^T)` in fp64."""
    import torch

    return (matrix @ gram).mul_(matrix).sum(dtype=torch.float64)


def _squared(matrix: "Tensor") -> "Tensor":
    import torch

    return matrix.square().sum(dtype=torch.float64)
