"""The format `pack-quantized` of compressed-tensors: vLLM's and llm-compressor's, any bits, groups or rows.

Dense packing of 3, 5, 6 and 7 bits is read by compressed-tensors 0.18 and newer; 2, 4 and 8 bits by older
versions too.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from teq.export.plan import Plan
from teq.export.words import codes_of, words
from teq.grid import Grid
from teq.models.layers import multiplying_itself
from teq.quantizers.quantized import Quantized

if TYPE_CHECKING:
    from torch import Tensor

NAME = "compressed-tensors"
MODULE = "compressed_tensors"  # that loads it
INSTALL = ("compressed-tensors>=0.18", "loguru")
PACKED = "weight_packed"  # the tensor that every quantized linear has


def refusal(plan: Plan) -> str | None:
    """Return why the format cannot hold a model, or None."""
    if plan.reordered:
        return f"{NAME} holds no column order (g_idx), which act-order with groups needs"
    if (layer := multiplying_itself(plan.outline)) is not None:
        return f"{NAME} is loaded into {layer}, whose class reads a weight that is packed there"
    return f"{NAME} holds 2 to 8 bits, this run has 1" if plan.grid.bits == 1 else None


def dtype(run: str) -> str:
    """Return the dtype of everything that is not quantized: the run's own."""
    return run


def stored(plan: Plan) -> Grid:
    """Return the grid as stored: loaders multiply in the dtype of scales, so it is the run's or float32."""
    same = plan.grid.scale_dtype == plan.dtype
    return plan.grid if same else dataclasses.replace(plan.grid, scale_dtype="float32")


def packed(linear: Quantized, grid: Grid) -> "dict[str, Tensor]":
    """Return a linear's tensors by suffix. Codes and zeros are unsigned: the format's offset cancels."""
    import torch

    tensors = {
        "weight_packed": words(linear.codes, grid.bits),
        "weight_scale": linear.scale.to(getattr(torch, grid.scale_dtype)),
        "weight_shape": torch.tensor(linear.codes.shape),
    }
    if not grid.symmetric:
        tensors["weight_zero_point"] = words(linear.zero.T, grid.bits).T.contiguous()
    return tensors


def unpacked(tensors: "Mapping[str, Tensor]", grid: Grid) -> Quantized:
    """Return the linear that tensors by suffix hold."""
    import torch

    rows, columns = tensors["weight_shape"].tolist()
    scale = tensors["weight_scale"].float()
    zero = torch.full_like(scale, 2 ** (grid.bits - 1))
    if not grid.symmetric:
        zero = codes_of(tensors["weight_zero_point"].T.contiguous(), grid.bits, rows).T.float()
    return Quantized(codes_of(tensors["weight_packed"], grid.bits, columns), scale, zero)


def configuration(plan: Plan) -> dict[str, Any]:
    """Return the entry `quantization_config` of config.json.

    Asymmetric models ask to be dequantized at load, because versions 0.18 to 0.20 do not load them otherwise;
    so do models with scales of another dtype than theirs, which are rounded otherwise.
    """
    whole = plan.grid.group_size == -1
    weights = {
        "num_bits": plan.grid.bits,
        "type": "int",
        "symmetric": plan.grid.symmetric,
        "strategy": "channel" if whole else "group",
        "group_size": None if whole else plan.grid.group_size,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
        "block_structure": None,
    }
    group = {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}
    return {
        "quant_method": NAME,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": plan.kept,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "config_groups": {"group_0": {**group, "input_activations": None, "output_activations": None}},
    } | ({} if plan.grid.symmetric and stored(plan).scale_dtype == plan.dtype else {"dequantize": True})
