"""Training that was interrupted goes on from the state saved last."""

import logging
import time
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from teq import ranks

log = logging.getLogger(__name__)
PARTS = ("free", "mean", "square", "best")  # of a site: parameter, Adam's moments, best scales
SECONDS = 60.0  # between two saves: the most that a killed run loses


class Partial:
    """The state of a training loop in one file: parameters, Adam's moments, losses, best scales, random
    state.

    The random state is the CPU's: with dropout (profile `inc`) on another device the resumed run is another
    draw.
    """

    def __init__(self, file: Path | None, free: dict[str, nn.Parameter], optimizer: torch.optim.Adam) -> None:
        self.file, self.free, self.optimizer = file, free, optimizer
        self.saved = time.monotonic()

    def restore(self) -> tuple[list[float], dict[str, Tensor]] | None:
        """Put back what was saved; returns the losses so far and the best scales, or None without a usable
        file.
        """
        state = ranks.from_first(self._read())
        if state is None:
            return None
        losses = state["losses"].tolist()
        kept = {
            name: [state[f"{part}/{name}"].to(parameter.device) for part in PARTS]
            for name, parameter in self.free.items()
        }
        torch.set_rng_state(state["random"])
        for name, (value, mean, square, _) in kept.items():
            parameter, done = self.free[name], torch.tensor(float(len(losses)))
            parameter.data.copy_(value)
            self.optimizer.state[parameter] = {"step": done, "exp_avg": mean, "exp_avg_sq": square}
        log.info("training goes on from step %d", len(losses))
        return losses, {name: best for name, (*_, best) in kept.items()}

    def _read(self) -> dict[str, Tensor] | None:
        """What was saved, when all of it is there."""
        if self.file is None or not self.file.is_file():
            return None
        try:
            state = load_file(self.file)
            names = ["losses", "random", *(f"{part}/{name}" for part in PARTS for name in self.free)]
            return {name: state[name] for name in names}
        except (OSError, SafetensorError, KeyError) as error:
            log.warning("%s is damaged (%s): training starts anew", self.file, error)
            return None

    def save(self, losses: list[float], best: dict[str, Tensor], now: bool = False) -> None:
        """Write the state aside and rename it into place, `now` or when the last time was `SECONDS` ago."""
        if self.file is None or not (now or time.monotonic() - self.saved >= SECONDS):
            return
        state = {"losses": torch.tensor(losses, dtype=torch.float64), "random": torch.get_rng_state()}
        for name, parameter in self.free.items():
            moments = self.optimizer.state[parameter]
            state |= {f"free/{name}": parameter.detach(), f"best/{name}": best[name]}
            state |= {f"mean/{name}": moments["exp_avg"], f"square/{name}": moments["exp_avg_sq"]}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        aside = self.file.with_suffix(".part")
        save_file({name: tensor.cpu().contiguous() for name, tensor in state.items()}, aside)
        aside.replace(self.file)
        self.saved = time.monotonic()
