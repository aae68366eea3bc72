"""The GPTQ format, version 2 (zeros as they are): the only one with a column order (g_idx)."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from teq.export.plan import Plan
from teq.export.words import codes_of, words
from teq.grid import Grid
from teq.quantizers.quantized import Quantized

if TYPE_CHECKING:
    from torch import Tensor

NAME = "gptq"
MODULE = "gptqmodel"
INSTALL = (
    "optimum==2.3.0",
    "gptqmodel==7.7.0",
    "defuser",
    "device-smi",
    "logbar",
    "pypcre",
    "tokenicer",
    "torchao==0.18.0",
)
PACKED = "qweight"
BITS = (2, 3, 4, 8)
GROUPS = (-1, 16, 32, 64, 128, 256, 512, 1024)  # that GPTQModel's kernels take


def refusal(plan: Plan) -> str | None:
    """Return why the format cannot hold a model, or None."""
    if plan.grid.bits not in BITS:
        return f"gptq holds {', '.join(map(str, BITS))} bits, this run has {plan.grid.bits}"
    if plan.grid.group_size not in GROUPS:
        return f"gptq holds groups of {', '.join(map(str, GROUPS))}, this run has {plan.grid.group_size}"
    odd = next((name for name, shape in plan.shapes.items() if any(side % 32 for side in shape)), None)
    return odd and f"gptq holds sides that are multiples of 32, {odd} is {plan.shapes[odd]}"


def dtype(run: str) -> str:
    """Return the dtype of everything that is not quantized: the kernels compute in half precision."""
    return run if run in ("float16", "bfloat16") else "float16"


def stored(plan: Plan) -> Grid:
    """Return the grid as stored: GPTQModel's CPU kernels of 4 bits take no whole rows.

    Such rows are stored in groups which all have the scale and zero of their row.
    """
    widths = {width for _, width in plan.shapes.values()}
    size = next((size for size in (128, 64, 32) if not any(width % size for width in widths)), -1)
    whole = plan.grid.bits == 4 and plan.grid.group_size == -1
    return dataclasses.replace(plan.grid, group_size=size) if whole else plan.grid


def scale_and_zero(linear: Quantized, grid: Grid) -> "tuple[Tensor, Tensor]":
    """Return a linear's scale and zero `[out, groups]` in the groups of a stored grid."""
    count = grid.group_count(linear.codes.shape[1])
    return linear.scale.expand(-1, count), linear.zero.expand(-1, count)


def grouped(scale: "Tensor", zero: "Tensor", grid: Grid) -> "tuple[Tensor, Tensor]":
    """Return a stored scale and zero `[out, groups]` in the groups of a run's grid."""
    count = 1 if grid.group_size == -1 else scale.shape[1]
    return scale[:, :count].contiguous(), zero[:, :count].contiguous()


def packed(linear: Quantized, grid: Grid) -> "dict[str, Tensor]":
    """Return a linear's tensors by suffix; codes are packed along the inputs, zeros along the outputs."""
    import torch

    columns, (scale, zero) = linear.codes.shape[1], scale_and_zero(linear, grid)
    return {
        "qweight": words(linear.codes, grid.bits).T.contiguous(),
        "qzeros": words(zero.T, grid.bits),
        "scales": scale.T.to(torch.float16).contiguous(),
        "g_idx": _natural(columns, grid.width(columns)) if linear.g_idx is None else linear.g_idx,
    }


def unpacked(tensors: "Mapping[str, Tensor]", grid: Grid) -> Quantized:
    """Return the linear that tensors by suffix hold; it has a g_idx where that is not the natural one."""
    import torch

    g_idx, scale = tensors["g_idx"], tensors["scales"].T.float()
    columns, zero = len(g_idx), codes_of(tensors["qzeros"], grid.bits, len(scale)).T.float()
    natural = torch.equal(g_idx, _natural(columns, columns // scale.shape[1]))
    return Quantized(
        codes_of(tensors["qweight"].T.contiguous(), grid.bits, columns),
        *grouped(scale, zero, grid),
        None if natural else g_idx,
    )


def configuration(plan: Plan) -> dict[str, Any]:
    """Return the entry `quantization_config` of config.json: all linears inside blocks are quantized."""
    return {
        "quant_method": NAME,
        "bits": plan.grid.bits,
        "group_size": stored(plan).group_size,
        "sym": plan.grid.symmetric,
        "desc_act": plan.reordered,
        "true_sequential": True,
        "damp_percent": 0.01,
        "checkpoint_format": "gptq_v2",
        "lm_head": False,
    }


def _natural(columns: int, size: int) -> "Tensor":
    """Return the group of each column where groups are `size` consecutive columns, int32 `[in]`."""
    import torch

    return torch.arange(columns, dtype=torch.int32) // size
