"""GPTQ: round column by column and let the columns that follow compensate for the error."""

import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from teq.data import Calibration
from teq.device import memory
from teq.device.memory import Estimate
from teq.device.runtime import Runtime
from teq.grid import Grid
from teq.models.lazy import held_bytes
from teq.spec import option
from teq.stage import Load, Made, Quantizer

if TYPE_CHECKING:
    from torch import Tensor

    from teq.models.checkpoint import LM
    from teq.quantizers.gptq.solver import Problem, Solution

log = logging.getLogger(__name__)
ORDERS = {  # of columns, as records name them: by the official code's flags
    "natural": {"act_order": False, "static_groups": False},
    "act": {"act_order": True, "static_groups": False},
    "static": {"act_order": True, "static_groups": True},
    "group": {"act_order": False, "static_groups": False, "group_aware": True},
}
SMALL = 128  # columns of the matrix that a solution's memory is counted on


@dataclass(frozen=True, kw_only=True)
class Gptq(Quantizer):
    """GPTQ as its official code runs it; the defaults of the options are that code's.

    `order` is that of the columns; see `teq.quantizers.gptq.solver.Options`. `input_correction` is the share
    of GPTAQ's correction for what the quantized blocks before did to a layer's inputs: 1 in its paper, 0.25
    in its code.
    """

    version = 2
    group = "gptq"
    grid: Grid
    calib: Calibration
    samples: int = option(at_least=1)
    length: int = option(at_least=2)
    damping: float = option(0.01, above=0)
    block_size: int = option(128, at_least=1)
    order: str = option("natural", among=tuple(ORDERS), recorded=ORDERS)
    true_sequential: bool = False
    input_correction: float = option(0.0, among=(0.0, 0.25, 0.5, 1.0), omitted=0.0)

    def quantize(self, load: Load, scales: "Mapping[str, Tensor]", runtime: Runtime) -> Made:
        """Quantize on calibration windows; hidden states wait in host memory if the device lacks room."""
        from teq.quantizers.gptq.blocks import waiting_bytes

        lm = load()
        work = functools.partial(
            self.quantize_on, scales=scales, windows=self.windows(lm.tokenizer), partial=runtime.partial
        )
        held, _ = held_bytes(lm.model, lm.arch)
        if memory.fits(self.estimate(lm).bytes - held, held, runtime):
            try:
                return work(lm)
            except RuntimeError as error:
                if runtime.device == "cpu" or not memory.exhausted(error):
                    raise
            # not inside the handler: the error's traceback holds the very tensors that filled the memory
            log.warning("memory ran out in GPTQ: its hidden states go to the host")
            del lm
            memory.release(runtime.device)
            lm = load()
        size = waiting_bytes(lm, self.samples * self.length, self.input_correction > 0)
        log.info("%.3g GB of hidden states wait in the host's memory", size / 1e9)
        return work(lm, waiting="cpu")

    def quantize_on(
        self,
        lm: "LM",
        scales: "Mapping[str, Tensor]",
        windows: "Tensor",
        waiting: str | None = None,
        partial: Path | None = None,
    ) -> Made:
        """Quantize on `windows [sample, token]`; see `teq.quantizers.gptq.blocks.quantize_blocks`."""
        from teq.quantizers.gptq.blocks import quantize_blocks

        tensors, info = quantize_blocks(
            lm.model,
            lm.arch,
            scales,
            windows,
            self.grid,
            self.solve,
            true_sequential=self.true_sequential,
            input_correction=self.input_correction,
            waiting=waiting,
            partial=partial,
        )
        report = info["gptq"].values()
        if raised := sum(entry["damping"] > self.damping for entry in report):
            log.warning("the damping had to be raised for %d of %d linears", raised, len(report))
        return tensors, info

    def solve(self, problems: "Sequence[Problem]") -> "list[Solution]":
        """Quantize each weight under its Hessian; see `teq.quantizers.gptq.solver.solve`."""
        from teq.quantizers.gptq import solver

        options = solver.Options(self.block_size, self.order)
        return solver.solve(problems, self.grid, self.damping, options)

    def estimate(self, lm: "LM") -> Estimate:
        """Predict memory and operations; see `teq.quantizers.gptq.blocks.estimate`."""
        from teq.quantizers.gptq.blocks import estimate

        return estimate(
            lm, self.samples, self.length, self._solution_bytes, input_correction=self.input_correction > 0
        )

    def _solution_bytes(self, rows: int, columns: int) -> int:
        """Return the peak bytes of one solution, counted on a small matrix of the same proportions.

        They grow with the square of the width when the proportions stay; scales and zeros with the weights
        of a group. The Hessian is counted with those of the block.
        """
        import torch

        from teq.device.live_bytes import LiveBytes

        small, size = min(columns, SMALL), self.grid.group_size
        few = dataclasses.replace(
            self,
            grid=dataclasses.replace(self.grid, group_size=min(size, small)),
            block_size=max(1, self.block_size * small // columns),
        )
        weight = torch.ones(max(1, rows * small // columns), small).cumsum(0)
        sums = [torch.eye(small), *([torch.zeros(small, small)] if self.input_correction else [])]
        with LiveBytes() as live, torch.no_grad():
            few.solve([(torch.cat([weight]), *sums)])  # the copy is a block's tall matrix
        return int(live.peak * (columns / small) ** 2)
