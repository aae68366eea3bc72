"""The AWQ format, version "gemm": 4 bits, the oldest asymmetric format that servers read."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from teq.export.gptq import INSTALL, MODULE, dtype, grouped, scale_and_zero, stored
from teq.export.plan import Part, Plan
from teq.export.words import codes_of, words
from teq.grid import Grid
from teq.quantizers.quantized import Quantized

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["INSTALL", "MODULE", "NAME", "PACKED", "configuration", "dtype"]
__all__ += ["packed", "refusal", "stored", "unpacked"]
NAME = "awq"
PACKED = "qweight"
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight outputs each half byte of a word holds
GROUPS = (-1, 16, 32, 64, 128)
SCALED = {  # by model type: activations that loaders scale, and the linears whose outputs they read
    "bloom": ("gelu_impl", "dense_h_to_4h"),
    "falcon": ("act", "dense_h_to_4h"),
    "gpt_neox": ("act", "dense_h_to_4h"),
}


def refusal(plan: Plan) -> str | None:
    """Return why the format cannot hold a model, or None."""
    if plan.grid.bits != 4:
        return f"awq holds 4 bits, this run has {plan.grid.bits}"
    if plan.reordered:
        return "awq holds no column order (g_idx), which act-order with groups needs"
    if plan.grid.group_size not in GROUPS:
        return f"awq holds groups of {', '.join(map(str, GROUPS))}, this run has {plan.grid.group_size}"
    odd = next((name for name, (rows, _) in plan.shapes.items() if rows % 8), None)
    return odd and f"awq holds multiples of 8 outputs, {odd} has {plan.shapes[odd][0]}"


def packed(linear: Quantized, grid: Grid) -> "dict[str, Tensor]":
    """Return a linear's tensors by suffix: codes `[in, out / 8]`, zeros `[groups, out / 8]`, scales fp16."""
    import torch

    scale, zero = scale_and_zero(linear, grid)
    return {
        "qweight": _interleaved(linear.codes.T),
        "qzeros": _interleaved(zero.T),
        "scales": scale.T.to(torch.float16).contiguous(),
    }


def activation_scales(plan: Plan, part: Part) -> "dict[str, Tensor]":
    """Return scales of one for the activations of a part that loaders scale: they leave none unscaled."""
    import torch

    scaled = SCALED.get(plan.checkpoint.source.dimensions().model_type)
    if scaled is None:
        return {}
    paths = ((name.rpartition("."), linear) for name, linear in part.linears.items())
    return {
        f"{path}.{scaled[0]}.scales": torch.ones(len(linear.codes))
        for (path, _, last), linear in paths
        if last == scaled[1]
    }


def unpacked(tensors: "Mapping[str, Tensor]", grid: Grid) -> Quantized:
    """Return the linear that tensors by suffix hold."""
    codes, zero = _plain(tensors["qweight"]), _plain(tensors["qzeros"]).float()
    return Quantized(codes, *grouped(tensors["scales"].T.float(), zero, grid))


def configuration(plan: Plan) -> dict[str, Any]:
    """Return the entry `quantization_config` of config.json."""
    return {
        "quant_method": NAME,
        "bits": plan.grid.bits,
        "group_size": stored(plan).group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": plan.kept,
    }


def _interleaved(codes: "Tensor") -> "Tensor":
    """Return codes `[n, out]` as words `[n, out / 8]` in the format's order."""
    return words(codes.unflatten(1, (-1, 8))[..., list(ORDER)].flatten(1), 4)


def _plain(packed: "Tensor") -> "Tensor":
    """Return the codes `[out, n]` that words `[n, out / 8]` hold."""
    import torch

    codes = codes_of(packed, 4, packed.shape[1] * 8).unflatten(1, (-1, 8))
    return codes[..., torch.argsort(torch.tensor(ORDER)).tolist()].flatten(1).T.contiguous()
