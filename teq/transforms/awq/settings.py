"""AWQ (arXiv 2306.00978): scales from activation magnitudes, searched for the smallest output error."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from teq.data.texts import Calibration
from teq.grid import Grid
from teq.spec import Runtime, Settings, option
from teq.stage import Load, OnStep

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Awq(Settings):
    """AWQ as its official code (mit-han-lab/llm-awq) runs it, on our sites and our grid.

    `ratios` is how many exponents k / ratios are tried; `clip` also searches bounds for the folded weights.
    """

    group = "awq"
    grid: Grid
    calib: Calibration
    samples: int = option(at_least=1)
    length: int = option(at_least=2)
    ratios: int = option(20, at_least=1)
    clip: bool = True

    def corpus(self) -> str:
        """The calibration text."""
        return self.calib.corpus

    def fit(
        self, load: Load, runtime: Runtime, on_step: OnStep
    ) -> tuple[dict[str, "Tensor"], dict[str, Any]]:
        """Search; see `teq.transforms.awq.search.search`."""
        from teq import data as corpora
        from teq.transforms.awq.search import search

        lm = load()
        windows = corpora.calibration(self.calib, lm.tokenizer, self.samples, self.length)
        return search(self, lm, windows)
