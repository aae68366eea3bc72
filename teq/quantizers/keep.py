"""The unquantized model: the floating-point baseline, or a transform's folded model as it is."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from teq.device.runtime import Runtime
from teq.models.fold import FoldedModel, site_scales
from teq.stage import Load, Made, Quantizer

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Keep(Quantizer):
    """No grid."""

    grid: None = None

    def quantize(self, load: Load, scales: "Mapping[str, Tensor]", runtime: Runtime) -> Made:
        """Return every parameter that folding changes, in floating point; none without scales.

        Bounds of weights are for rounding: they stay unread.
        """
        if not scales:
            return {}, {}
        lm, changed = load(), {}
        for block in FoldedModel(lm.model, lm.arch, site_scales(scales)):
            changed |= block.changed
            for name, linear in block.linears.items():
                changed[f"{name}.weight"] = block.exact_weight(name).to(linear.weight.dtype)
        return {f"param/{name}": value for name, value in changed.items()}, {}
