"""Round to nearest: every weight on its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from teq.console import track
from teq.device.runtime import Runtime
from teq.grid import Grid, encode, group_params, spread
from teq.models.fold import FoldedBlock, FoldedModel
from teq.quantizers.quantized import Quantized, stored
from teq.stage import Load, Made, NothingDone, Quantizer

if TYPE_CHECKING:
    from torch import Tensor

    from teq.models.checkpoint import LM


@dataclass(frozen=True, kw_only=True)
class Rtn(Quantizer):
    """Round to nearest on `grid`."""

    grid: Grid

    def quantize(self, load: Load, scales: "Mapping[str, Tensor]", runtime: Runtime) -> Made:
        """Return codes of the folded weights `W diag(s)`, formed in fp32.

        Raises NothingDone when no weight changes.
        """
        lm, tensors, count, moved = load(), {}, 0, False
        for block in track(FoldedModel(lm.model, lm.arch, scales).blocks(), "rounding blocks"):
            rounded, differs = self._rounded(block)
            tensors |= stored({}, block.changed, self.grid) | rounded
            count, moved = count + len(block.linears), moved or bool(differs)
        if not moved:
            raise NothingDone("rounding changed no weight: the quantized model is the floating-point model")
        return tensors, {"linears": count}

    def dry_run(self, lm: "LM", strategy: str) -> None:
        """Round all blocks."""
        packed = [self._rounded(block)[0] for block in FoldedModel(lm.model, lm.arch, {}).blocks()]
        del packed

    def _rounded(self, block: FoldedBlock) -> "tuple[dict[str, Tensor], Tensor]":
        """Return a block's stored tensors in host memory, packed, and whether a weight was changed.

        A model's codes at once would be a byte for every weight.
        """
        import torch

        quantized, differs = {}, []
        for name in block.linears:
            weight = block.weight(name)
            quantized[name] = round_to_nearest(weight, self.grid)
            differs.append((quantized[name].dequantize(self.grid) != weight).any())
        packed = {name: tensor.cpu() for name, tensor in stored(quantized, {}, self.grid).items()}
        return packed, torch.stack(differs).any()


def round_to_nearest(weight: "Tensor", grid: Grid) -> Quantized:
    """Return `weight [out, in]` (fp32) on the grid."""
    import torch

    scale, zero = group_params(weight, grid)
    columns = weight.shape[1]
    codes = encode(weight, spread(scale, grid, columns), spread(zero, grid, columns), grid)
    return Quantized(codes.to(torch.uint8), scale, zero)
