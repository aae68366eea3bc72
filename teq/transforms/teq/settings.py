"""TEQ: the scales are trained with the model's own loss through straight-through rounding (the paper's
section 3).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from teq.data.texts import Calibration
from teq.grid import Grid
from teq.spec import Runtime, Settings, option
from teq.stage import Load, OnStep

if TYPE_CHECKING:
    from torch import Tensor

    from teq.models.checkpoint import LM


@dataclass(frozen=True, kw_only=True)
class Teq(Settings):
    """How the scales are trained.

    `parameter` clip trains s itself, kept at 1e-5 or more (neural-compressor's bound); log trains log s.
    Profile `paper` decays the learning rate linearly from `lr` in eval mode; `inc` is neural-compressor's: 5
    % warm-up first, and training mode, so that dropout is on.
    """

    version = 1
    group = "train"
    grid: Grid
    calib: Calibration
    init: str = option(among=("ones", "inv_sqrt"), key="init")
    steps: int = option(at_least=0)
    lr: float = option(above=0)
    batch: int = option(at_least=1)
    length: int = option(at_least=2)
    parameter: str = option(among=("clip", "log"))
    profile: str = option(among=("paper", "inc"))

    def corpus(self) -> str:
        """The calibration text."""
        return self.calib.corpus

    def fit(
        self, load: Load, runtime: Runtime, on_step: OnStep
    ) -> tuple[dict[str, "Tensor"], dict[str, Any]]:
        """Train; see `teq.transforms.teq.train.train`."""
        from teq import data as corpora
        from teq.transforms.teq.train import train

        lm = load()
        windows = corpora.calibration(self.calib, lm.tokenizer, max(self.steps, 1) * self.batch, self.length)
        return train(self, lm.model, lm.arch, windows, on_step, runtime)

    def rehearse(self, lm: "LM", strategy: str) -> None:
        """Two training steps on an outline of the model: Adam has its state from the second on."""
        import torch

        from teq.models.arch import sites
        from teq.transforms.teq.train import Trainer, through

        found = sites(lm.model, lm.arch)
        trainer = Trainer(self, found, lm.device)
        tokens = torch.zeros(self.batch, self.length, dtype=torch.int64, device=lm.device)
        with through(lm.model, lm.arch, found, self.grid, trainer.current.__getitem__, strategy):
            for step in (0, 0):
                trainer.move(trainer.loss(lm.model, tokens), step)
