"""SignRound: rounding learned block by block (arXiv 2309.05516) on weights that a transform folded."""

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from teq.data import Calibration
from teq.device.runtime import Runtime
from teq.grid import Grid
from teq.models.fold import FoldedModel
from teq.quantizers import errors
from teq.record import OUTPUT_ERROR
from teq.spec import UserError, option
from teq.stage import Load, Made, NothingDone, Quantizer

if TYPE_CHECKING:
    from torch import Tensor

    from teq.models.checkpoint import LM

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SignRound(Quantizer):
    """Learned rounding as auto-round 0.16.1 trains it, from extremes or from the grid's search.

    A step reads `batch` of the `samples` windows of `length` tokens; `lr` is 1 / iterations where it is null.
    """

    group = "signround"
    grid: Grid
    calib: Calibration
    samples: int = option(at_least=1)
    length: int = option(at_least=2)
    iterations: int = option(at_least=1)
    batch: int = option(at_least=1)
    lr: float | None = option(None, above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grid.bits == 1:
            raise UserError(
                "bits=1 is not allowed with signround, whose range would train to nothing: use 2 or more"
            )
        if self.batch > self.samples:
            raise UserError(
                f"signround.batch={self.batch} is not allowed: it must be at most "
                f"signround.samples={self.samples}"
            )
        if self.lr is None:
            object.__setattr__(self, "lr", 1 / self.iterations)

    def quantize(self, load: Load, scales: "Mapping[str, Tensor]", runtime: Runtime) -> Made:
        """Train every block's rounding on the outputs of the float model's block.

        Raises NothingDone when every block is better off as it was.
        """
        from teq.quantizers.blockwise import quantize_blocks
        from teq.quantizers.signround.train import quantize_block

        lm = load()
        train = functools.partial(
            quantize_block,
            grid=self.grid,
            iterations=self.iterations,
            batch=self.batch,
            lr=self.lr,
            seed=self.calib.seed,
        )
        tensors, report, info = quantize_blocks(
            lm.model,
            lm.arch,
            scales,
            self.windows(lm.tokenizer),
            self.grid,
            train,
            "SignRound",
            targets=True,
            waiting="cpu",  # a step reads few of them and computes long
            partial=runtime.partial,
        )
        if as_it_was := [name for name, entry in report.items() if entry["kept"] == "start"]:
            log.warning("%d of %d blocks keep the rounding they began with", len(as_it_was), len(report))
        if len(as_it_was) == len(report):
            raise NothingDone(
                "learned rounding made no block better: the result would be plain rounding under another "
                "name; raise signround.iterations or signround.samples"
            )
        return tensors, info | {OUTPUT_ERROR: errors.collected(report), "signround": report}

    def dry_run(self, lm: "LM", strategy: str) -> None:
        """Do a training step of the first block while the hidden states of all samples wait."""
        import torch

        from teq.models.blocks import block_inputs
        from teq.quantizers.blockwise import Calibrated
        from teq.quantizers.signround.train import BlockTrainer

        tokens = torch.zeros(self.batch, self.length, dtype=torch.int64, device=lm.device)
        hidden, keywords = block_inputs(lm.model, lm.arch, tokens, count=1)
        host = torch.empty_like(hidden[:1], device="cpu")
        waiting = [[torch.zeros_like(host) for _ in range(self.samples)] for _ in range(2)]
        folded = next(iter(FoldedModel(lm.model, lm.arch, {})))
        exact = {name: folded.weight(name) for name in folded.linears}
        block = Calibrated(folded, 0, exact, *waiting, keywords[0], lambda _: keywords)
        with BlockTrainer(block, self.grid.unsearched) as trainer:
            best = trainer.snapshot()
            trainer.move(trainer.loss(range(self.batch)), 0.0)
            del best

    def dry_runs(self, blocks: int) -> int:
        """Return how many such steps the stage takes on a model of so many blocks."""
        return self.iterations * blocks
