"""AWQ (arXiv 2306.00978): scales from activation magnitudes, searched for the smallest output error."""

from dataclasses import dataclass

from teq.data.texts import Calibration
from teq.device.runtime import Runtime
from teq.grid import Grid
from teq.spec import option
from teq.stage import Load, Made, OnStep, Transform


@dataclass(frozen=True, kw_only=True)
class Awq(Transform):
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

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "grid", self.grid.unsearched)

    def fit(self, load: Load, runtime: Runtime, on_step: OnStep) -> Made:
        """Return search; see `teq.transforms.awq.search.search`."""
        from teq.transforms.awq.search import search

        lm = load()
        windows = self.windows(lm.tokenizer)
        return search(lm.model, lm.arch, windows, grid=self.grid, ratios=self.ratios, clip=self.clip)
