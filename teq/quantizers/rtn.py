"""Round to nearest: every weight on its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from teq.arch import Folding, blocks, linears, sites
from teq.grid import Grid, encode, group_params, spread
from teq.progress import track
from teq.quantizers import Quantized, stored
from teq.spec import Runtime, Settings
from teq.transforms import Load, NothingDone

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Rtn(Settings):
    """Round to nearest on `grid`."""

    grid: Grid

    def corpus(self) -> None:
        """Reads no text."""

    def quantize(
        self, load: Load, scales: Mapping[str, "Tensor"], runtime: Runtime
    ) -> tuple[dict[str, "Tensor"], dict[str, Any]]:
        """Codes of the folded weights `W diag(s)`, formed in fp32. Raises NothingDone when no weight
        changes.
        """
        lm = load()
        found = sites(lm.model, lm.arch)
        folding, quantized, changed = Folding.of(found, scales), {}, {}
        for site in found:
            changed |= folding.divided(site.name, site.source)
        moved = False
        for block_name, block in track(blocks(lm.model, lm.arch).items(), "rounding blocks"):
            for name, linear in linears(block_name, block).items():
                weight = folding.weight(name, linear).float()
                quantized[name] = round_to_nearest(weight, self.grid)
                moved = moved or bool((quantized[name].dequantize(self.grid) != weight).any())
        if not moved:
            raise NothingDone("rounding changed no weight: the quantized model is the floating-point model")
        return stored(quantized, changed, self.grid), {"linears": len(quantized)}


def round_to_nearest(weight: "Tensor", grid: Grid) -> Quantized:
    """`weight [out, in]` (fp32) on the grid."""
    import torch

    scale, zero = group_params(weight, grid)
    columns = weight.shape[1]
    codes = encode(weight, spread(scale, grid, columns), spread(zero, grid, columns), grid)
    return Quantized(codes.to(torch.uint8), scale, zero)
