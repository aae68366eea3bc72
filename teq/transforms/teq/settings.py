"""TEQ: scales trained with the model's own loss through straight-through rounding (the paper, section 3)."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from teq import data
from teq.data import Calibration
from teq.device.runtime import DEFAULT_RUNTIME, STRATEGIES, Runtime
from teq.grid import Grid
from teq.models.arch import Arch, blocks, linears, sites
from teq.models.lazy import present
from teq.spec import UserError, option
from teq.stage import Load, Made, OnStep, Transform
from teq.transforms.awq.settings import Awq
from teq.transforms.smoothquant import SmoothQuant

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from teq.models.checkpoint import LM
    from teq.transforms.teq.train import Trainer

SEARCHES = ("awq", "smoothquant")  # starts that are found on calibration text
OBJECTIVES = ("lm", "kl", "block")
HELD_OUT = 4  # windows that no step trains on, where the best scales are kept


@dataclass(frozen=True, kw_only=True)
class Teq(Transform):
    """How the scales are trained.

    `parameter` clip trains s itself, kept at 1e-5 or more (neural-compressor's bound); log trains log s.
    Profile `paper` decays the learning rate linearly from `lr` in eval mode; `inc` is neural-compressor's: 5
    % warm-up first, and training mode, so that dropout is on.

    Init `awq` and `smoothquant` start from the scales of that transform, whose settings the field of its name
    holds. `keep` best returns the scales of the lowest loss on held-out windows, the start among them: it is
    the default where a search gave the start, which training then never makes worse.

    The `objective` is the model's own loss (`lm`, as in the paper), or the divergence of the next token's
    distribution from the float model's (`kl`), or the squared difference of each block's outputs from the
    float model's, one block after the other (`block`): then every block takes all steps, and keeps its start
    where the end is no better on held-out windows. With a learning rate `bounds_lr` it trains bounds of the
    weights' groups beside the scales.
    """

    group = "train"
    strategies = STRATEGIES
    grid: Grid
    calib: Calibration
    init: str = option(among=("ones", "inv_sqrt", *SEARCHES), key="init")
    awq: Awq | None = option(None, omitted=None)
    smoothquant: SmoothQuant | None = option(None, omitted=None)
    steps: int = option(at_least=0)
    lr: float = option(above=0)
    batch: int = option(at_least=1)
    length: int = option(at_least=2)
    parameter: str = option(among=("clip", "log"))
    profile: str = option(among=("paper", "inc"))
    keep: str | None = option(None, among=("last", "best"), omitted="last")
    objective: str = option("lm", among=OBJECTIVES, omitted="lm")
    bounds_lr: float | None = option(None, above=0, omitted=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "grid", self.grid.unsearched)
        for name in SEARCHES:
            if name != self.init:
                object.__setattr__(self, name, None)  # not read, so not in the key
        searched = self.init in SEARCHES
        if searched and self.search is None:
            raise UserError(
                f"init={self.init} needs the settings of that search and its calibration text: set the "
                f"transform's field {self.init}, or choose init=ones or init=inv_sqrt"
            )
        if self.objective == "block":
            self._check_block()
            searched = False  # its blocks keep the better of start and end whatever the start is
        elif self.bounds_lr is not None:
            raise UserError(
                f"train.bounds_lr={self.bounds_lr} has no effect beside train.objective={self.objective}: "
                "bounds are learned with train.objective=block alone; choose that, or leave it out"
            )
        object.__setattr__(self, "keep", self.keep or ("best" if searched else "last"))

    def _check_block(self) -> None:
        """Raise UserError if training block by block would not read an option."""
        if self.keep == "best":
            raise UserError(
                "train.keep=best is not allowed with train.objective=block, where every block keeps the "
                "better of its start and its end: leave it out"
            )
        if self.profile == "inc":
            raise UserError(
                "train.profile=inc is not allowed with train.objective=block, which trains without dropout: "
                "use train.profile=paper"
            )

    @property
    def search(self) -> Awq | SmoothQuant | None:
        """Return the transform that finds the start, or None."""
        return self.awq or self.smoothquant

    def windows(self, tokenizer: "PreTrainedTokenizerBase") -> "Tensor":
        """Return the windows of all steps `[steps * batch, length]`."""
        return self._windows(tokenizer, 0)

    def held_out(self, tokenizer: "PreTrainedTokenizerBase") -> "Tensor | None":
        """Return the windows `[HELD_OUT, length]` after those of the steps, None where nothing reads them."""
        read = self.keep == "best" or self.objective == "block"
        return self._windows(tokenizer, HELD_OUT)[-HELD_OUT:] if read else None

    @property
    def waiting_tokens(self) -> int:
        """Return how many tokens' hidden states wait for the training.

        The float model's last ones for `kl`; a block's inputs and the float block's outputs for `block`.
        """
        count = max(self.steps, 1) * self.batch
        if self.objective == "block":
            return 2 * (count + HELD_OUT) * self.length
        held = HELD_OUT if self.keep == "best" else 0
        return (count + held) * self.length if self.objective == "kl" else 0

    def _windows(self, tokenizer: "PreTrainedTokenizerBase", more: int) -> "Tensor":
        count = max(self.steps, 1) * self.batch + more
        return data.calibration(self.calib, tokenizer, count, self.length)

    def fit(self, load: Load, runtime: Runtime, on_step: OnStep) -> Made:
        """Train the scales; see `teq.transforms.teq.train.train`."""
        lm, start, found = load(), None, {}
        windows, held_out = self.windows(lm.tokenizer), self.held_out(lm.tokenizer)
        if self.search is not None:
            start, found = self.search.fit(lambda: lm, runtime, on_step)
        scales, info = self.train_on(lm.model, lm.arch, windows, runtime, on_step, start, held_out)
        return scales, info | ({"search": found} if found else {})

    def trainer(
        self,
        model: "nn.Module",
        arch: Arch,
        device: "torch.device | str",
        start: "Mapping[str, Tensor] | None" = None,
        block: int | None = None,
    ) -> "Trainer":
        """Return the scales to train, of all blocks or one, at `start`: that of `init` if none is given."""
        from teq.transforms.teq import train
        from teq.transforms.teq.bounds import BoundsTrainer

        steps = max(self.steps, 1)  # a dry run does some where there are none
        rate = functools.partial(train.learning_rate, steps=steps, lr=self.lr, profile=self.profile)
        found = [site for site in sites(model, arch) if block in (None, site.block)]
        first: dict[str, Tensor] = {}
        for index, module in enumerate(blocks(model, arch).values()):
            if here := [site for site in found if site.block == index]:
                with present(module):
                    for site in here:
                        first[site.name] = start[site.name] if start else train.initial(site, self.init)
        if block is None or self.bounds_lr is None:
            return train.Trainer(first, device, parameter=self.parameter, rate=rate)
        return BoundsTrainer(
            first,
            device,
            parameter=self.parameter,
            rate=rate,
            linears=linears(*list(blocks(model, arch).items())[block]),
            grid=self.grid,
            bounds_rate=functools.partial(rate, lr=self.bounds_lr),
        )

    def train_on(
        self,
        model: "nn.Module",
        arch: Arch,
        windows: "Tensor",
        runtime: Runtime = DEFAULT_RUNTIME,
        on_step: OnStep = lambda *_: None,
        start: "Mapping[str, Tensor] | None" = None,
        held_out: "Tensor | None" = None,
    ) -> Made:
        """Train on `windows [steps * batch, length]`; a search's `start` and `held_out` windows are given."""
        from teq.transforms.teq import block, train

        offloaded = runtime.strategy == "offload"
        device = runtime.device if offloaded else model.get_input_embeddings().weight.device
        common = {"grid": self.grid, "steps": self.steps, "batch": self.batch}
        common |= {"runtime": runtime, "on_step": on_step}
        if self.objective == "block":
            trainer_of = functools.partial(self.trainer, model, arch, device, start)
            return block.train(model, arch, windows, held_out, trainer_of, **common)
        return train.train(
            model,
            arch,
            windows,
            self.trainer(model, arch, device, start),
            held_out=held_out,
            divergence=self.objective == "kl",
            dropout=self.profile == "inc",
            seed=self.calib.seed,
            **common,
        )

    def dry_run(self, lm: "LM", strategy: str) -> None:
        """Do two training steps on fake tensors: Adam has its state from the second on."""
        import torch

        from teq.transforms.activations import outputs
        from teq.transforms.teq import block
        from teq.transforms.teq.linear import fake_quantized

        tokens = torch.zeros(self.batch, self.length, dtype=torch.int64, device=lm.device)
        if self.objective == "block":
            trainer_of = functools.partial(self.trainer, lm.model, lm.arch, lm.device, None)
            block.dry_run(lm.model, lm.arch, tokens, trainer_of, grid=self.grid, strategy=strategy)
            return
        trainer = self.trainer(lm.model, lm.arch, lm.device)
        exact = [
            outputs(lm.model, lm.arch, tokens, self.batch, strategy, lm.device)
            if self.objective == "kl"
            else None
            for _ in range(2)
        ]
        with fake_quantized(lm.model, lm.arch, self.grid, trainer.current.__getitem__, strategy):
            for reference in exact:
                trainer.move(trainer.loss(lm.model, tokens, reference), 0)
