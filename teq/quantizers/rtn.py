"""Round to nearest: every weight on its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from teq.console import track
from teq.grid import Grid, encode, group_params, spread
from teq.models.arch import Folding, blocks, linears, sites
from teq.quantizers.quantized import Quantized, stored
from teq.spec import Runtime, Settings
from teq.stage import Load, NothingDone

if TYPE_CHECKING:
    from torch import Tensor, nn

    from teq.models.checkpoint import LM


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
        folding, changed, tensors = Folding.of(found, scales), {}, {}
        for site in found:
            changed |= folding.divided(site.name, site.source)
        count, moved = 0, False
        for block_name, block in track(blocks(lm.model, lm.arch).items(), "rounding blocks"):
            inside = linears(block_name, block)
            rounded, differs = self._rounded(folding, inside)
            tensors |= rounded
            count, moved = count + len(inside), moved or bool(differs)
        if not moved:
            raise NothingDone("rounding changed no weight: the quantized model is the floating-point model")
        return stored({}, changed, self.grid) | tensors, {"linears": count}

    def rehearse(self, lm: "LM", strategy: str) -> None:
        """All blocks of an outline of the model."""
        folding, tensors = Folding.of(sites(lm.model, lm.arch), {}), {}
        for block_name, block in blocks(lm.model, lm.arch).items():
            tensors |= self._rounded(folding, linears(block_name, block))[0]

    def _rounded(
        self, folding: Folding, inside: "Mapping[str, nn.Linear]"
    ) -> "tuple[dict[str, Tensor], Tensor]":
        """The stored tensors of some linears, packed and in the host's memory (a model's codes at once would
        be a byte for every weight), and whether a weight was changed.
        """
        import torch

        quantized, differs = {}, []
        for name, linear in inside.items():
            weight = folding.weight(name, linear).float()
            quantized[name] = round_to_nearest(weight, self.grid)
            differs.append((quantized[name].dequantize(self.grid) != weight).any())
        packed = {name: tensor.cpu() for name, tensor in stored(quantized, {}, self.grid).items()}
        return packed, torch.stack(differs).any()


def round_to_nearest(weight: "Tensor", grid: Grid) -> Quantized:
    """`weight [out, in]` (fp32) on the grid."""
    import torch

    scale, zero = group_params(weight, grid)
    columns = weight.shape[1]
    codes = encode(weight, spread(scale, grid, columns), spread(zero, grid, columns), grid)
    return Quantized(codes.to(torch.uint8), scale, zero)
