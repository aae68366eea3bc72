"""Round to nearest: every weight on its own."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from teq.console import track
from teq.data import Calibration
from teq.device.runtime import Runtime
from teq.files.resume import BlockFiles
from teq.grid import Grid
from teq.models.fold import FoldedBlock, FoldedModel
from teq.quantizers import errors
from teq.quantizers.quantized import Quantized, round_to_nearest, stored
from teq.record import OUTPUT_ERROR, WEIGHT_ERROR
from teq.spec import option
from teq.stage import Load, Made, NothingDone, Quantizer

if TYPE_CHECKING:
    from torch import Tensor

    from teq.models.checkpoint import LM
    from teq.quantizers.blockwise import Calibrated, Report


@dataclass(frozen=True, kw_only=True)
class Rtn(Quantizer):
    """Round to nearest on `grid`; only where the grid is searched are there calibration windows."""

    group = "gptq"
    grid: Grid
    calib: Calibration | None = option(None, omitted=None)
    samples: int | None = option(None, at_least=1, omitted=None)
    length: int | None = option(None, at_least=2, omitted=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grid.search == "none":
            for unread in ("calib", "samples", "length"):
                object.__setattr__(self, unread, None)

    def quantize(self, load: Load, scales: "Mapping[str, Tensor]", runtime: Runtime) -> Made:
        """Return codes of the folded weights `W diag(s)`, formed in fp32.

        Raises NothingDone when no weight changes.
        """
        if self.calib is not None:
            return self._quantize_searched(load(), scales, runtime)
        lm, tensors, shares = load(), {}, {}
        # where the model is too large for the memory, so may its codes be
        files = BlockFiles(runtime.partial if runtime.strategy == "stream" else None, "rounding")
        for index, block in enumerate(track(FoldedModel(lm.model, lm.arch, scales), "rounding blocks")):
            rounded, lost = self._rounded(block)
            tensors |= files.write(index, stored({}, block.changed, self.grid) | rounded, {})
            shares |= lost
        found = errors.defined(errors.read_back(shares))
        if not any(found.values()):
            raise NothingDone("rounding changed no weight: the quantized model is the floating-point model")
        return tensors, {"linears": len(shares), WEIGHT_ERROR: found}

    def _quantize_searched(self, lm: "LM", scales: "Mapping[str, Tensor]", runtime: Runtime) -> Made:
        """Return codes on grids that are searched for on what the quantized blocks before put out."""
        from teq.quantizers.blockwise import quantize_blocks

        tensors, report, info = quantize_blocks(
            lm.model,
            lm.arch,
            scales,
            self.windows(lm.tokenizer),
            self.grid,
            functools.partial(round_block, self.grid),
            "rounding",
            partial=runtime.partial,
        )
        return tensors, info | {OUTPUT_ERROR: errors.collected(report)}

    def dry_run(self, lm: "LM", strategy: str) -> None:
        """Round all blocks."""
        packed = [self._rounded(block)[0] for block in FoldedModel(lm.model, lm.arch, {})]
        del packed

    def _rounded(self, block: FoldedBlock) -> "tuple[dict[str, Tensor], dict[str, Tensor]]":
        """Return a block's stored tensors in host memory, packed, and the errors of its weights.

        A model's codes at once would be a byte for every weight.
        """
        quantized, shares = {}, {}
        for name in block.linears:
            weight = block.weight(name)
            quantized[name] = round_to_nearest(weight, self.grid)
            shares[name] = errors.weight_error(quantized[name].dequantize(self.grid).sub_(weight), weight)
        packed = {name: tensor.cpu() for name, tensor in stored(quantized, {}, self.grid).items()}
        return packed, shares


def round_block(grid: Grid, block: "Calibrated") -> "tuple[dict[str, Quantized], Report]":
    """Return a block's linears rounded on grids that are searched, and a report of the block's errors."""
    from teq.quantizers.gptq.solver import Hessian
    from teq.quantizers.search import search_block

    params, hessians = search_block(block, grid, Hessian)
    quantized = {name: round_to_nearest(block.exact[name], grid, found) for name, found in params.items()}
    means = {names: hessian.mean() for names, hessian in hessians.items()}
    lost = errors.read_back(errors.output_errors(block.exact, quantized, means, grid))
    return quantized, {block.folded.name: {OUTPUT_ERROR: lost}}
