"""TEQ: scales trained with the model's own loss through straight-through rounding (the paper, section 3)."""

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from teq import data
from teq.data import Calibration
from teq.device.runtime import DEFAULT_RUNTIME, Runtime
from teq.grid import Grid
from teq.models.arch import Arch, sites
from teq.spec import option
from teq.stage import Load, Made, OnStep, Transform

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from teq.models.checkpoint import LM
    from teq.transforms.teq.train import Trainer


@dataclass(frozen=True, kw_only=True)
class Teq(Transform):
    """How the scales are trained.

    `parameter` clip trains s itself, kept at 1e-5 or more (neural-compressor's bound); log trains log s.
    Profile `paper` decays the learning rate linearly from `lr` in eval mode; `inc` is neural-compressor's: 5
    % warm-up first, and training mode, so that dropout is on.
    """

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

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "grid", self.grid.unsearched)

    def windows(self, tokenizer: "PreTrainedTokenizerBase") -> "Tensor":
        """Return the windows of all steps `[steps * batch, length]`."""
        return data.calibration(self.calib, tokenizer, max(self.steps, 1) * self.batch, self.length)

    def fit(self, load: Load, runtime: Runtime, on_step: OnStep) -> Made:
        """Return train; see `teq.transforms.teq.train.train`."""
        lm = load()
        return self.train_on(lm.model, lm.arch, self.windows(lm.tokenizer), runtime, on_step)

    def trainer(self, model: "nn.Module", arch: Arch, device: "torch.device | str") -> "Trainer":
        """Return the scales to train, at their start."""
        from teq.transforms.teq import train

        rate = functools.partial(train.learning_rate, steps=self.steps, lr=self.lr, profile=self.profile)
        return train.Trainer(sites(model, arch), device, init=self.init, parameter=self.parameter, rate=rate)

    def train_on(
        self,
        model: "nn.Module",
        arch: Arch,
        windows: "Tensor",
        runtime: Runtime = DEFAULT_RUNTIME,
        on_step: OnStep = lambda *_: None,
    ) -> Made:
        """Train on `windows [steps * batch, length]`."""
        from teq.transforms.teq import train

        offloaded = runtime.strategy == "offload"
        device = runtime.device if offloaded else model.get_input_embeddings().weight.device
        return train.train(
            model,
            arch,
            windows,
            self.trainer(model, arch, device),
            grid=self.grid,
            steps=self.steps,
            batch=self.batch,
            dropout=self.profile == "inc",
            seed=self.calib.seed,
            runtime=runtime,
            on_step=on_step,
        )

    def dry_run(self, lm: "LM", strategy: str) -> None:
        """Do two training steps on fake tensors: Adam has its state from the second on."""
        import torch

        from teq.transforms.teq.linear import fake_quantized

        trainer = self.trainer(lm.model, lm.arch, lm.device)
        tokens = torch.zeros(self.batch, self.length, dtype=torch.int64, device=lm.device)
        with fake_quantized(lm.model, lm.arch, self.grid, trainer.current.__getitem__, strategy):
            for step in (0, 0):
                trainer.move(trainer.loss(lm.model, tokens), step)
