"""The last stage: group scales, and norms, trained end to end while codes and zeros stay.

EfficientQAT's second phase (arXiv 2407.11062, section 3.3), with norm tweaking's parameters (arXiv
2309.02784) and a divergence to the floating-point model as the loss.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from teq import data
from teq.data import Calibration
from teq.data.embedded import CALIBRATION_END, NAME
from teq.device.runtime import STRATEGIES, Runtime
from teq.grid import Grid
from teq.spec import option
from teq.stage import Load, Made, Tuner

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from teq.models.checkpoint import LM

ANOTHER_DRAW = 1_000_003  # added to the seed of the calibration text
PARTS = ("scales", "scales+norms")


@dataclass(frozen=True, kw_only=True)
class Finetune(Tuner):
    """How a quantized model is tuned.

    Each group's scale is its start times a number that is trained by Adam, from 1 on; the rate decays
    linearly from `lr`. The loss `kl` is the divergence to the floating-point model, `lm` the model's own.
    """

    group = "tune"
    strategies = STRATEGIES
    parts: str = option(among=PARTS, key="finetune")
    grid: Grid
    calib: Calibration
    steps: int = option(at_least=0)
    lr: float = option(above=0)
    batch: int = option(at_least=1)
    length: int = option(at_least=2)
    loss: str = option(among=("kl", "lm"))

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "grid", self.grid.unsearched)

    def windows(self, tokenizer: "PreTrainedTokenizerBase") -> "Tensor":
        """Return the windows of all steps and a tenth more, which is held out, `[windows, length]`.

        They are a draw of their own, in random order: what the quantizer was fitted on would be told nothing
        new by it, and be no text to judge by. The embedded text is taken once at most and then read again: no
        step may see what is held out.
        """
        import torch

        count = self._count()
        calib = dataclasses.replace(self.calib, seed=self.calib.seed + ANOTHER_DRAW)
        windows = data.calibration(calib, tokenizer, count, self.length)
        return windows[torch.randperm(count, generator=torch.Generator().manual_seed(self.calib.seed))]

    def _count(self) -> int:
        count = self.steps * self.batch
        count += max(3, -(-count // 10))
        return min(count, max(3, CALIBRATION_END // self.length)) if self.calib.corpus == NAME else count

    @property
    def waiting_tokens(self) -> int:
        """Return how many tokens' last hidden states of the float model wait for the training."""
        return self._count() * self.length if self.loss == "kl" else 0

    def tune(self, load: Load, weights: "Mapping[str, Tensor]", runtime: Runtime) -> Made:
        """Return the tuned tensors; see `teq.finetune.train.finetune`."""
        lm = load()
        from teq.finetune import train

        return train.finetune(
            lm.model,
            lm.arch,
            weights,
            self.windows(lm.tokenizer),
            grid=self.grid,
            norms=self.parts == "scales+norms",
            steps=self.steps,
            lr=self.lr,
            batch=self.batch,
            divergence=self.loss == "kl",
            runtime=runtime,
        )

    def dry_run(self, lm: "LM", strategy: str) -> None:
        """Do two steps on fake tensors: Adam has its state from the second on."""
        import torch

        from teq.finetune import train

        tokens = torch.zeros(self.batch, self.length, dtype=torch.int64, device=lm.device)
        norms, divergence = self.parts == "scales+norms", self.loss == "kl"
        train.dry_run(
            lm.model, lm.arch, tokens, grid=self.grid, norms=norms, divergence=divergence, strategy=strategy
        )
