"""The contract of a method: what the pipeline asks of a transform, a quantizer, a tuner and an evaluation.

A method is a frozen `Settings` class with the fields that its stage reads; the defaults below do the rest.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from teq import data
from teq.device.memory import Estimate
from teq.device.runtime import Runtime
from teq.spec import Settings, UserError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from teq.models.checkpoint import LM

Load = Callable[[], "LM"]
OnStep = Callable[[int, float], None]
Made = tuple[Mapping[str, "Tensor"], dict[str, Any]]  # tensors by name, and what the record says of them


class NothingDone(UserError):
    """A stage that ran and changed nothing: an error, because its numbers would look like a result."""


class Diverged(UserError):
    """Training met a loss that is not finite. `tensors` holds the scales so far."""

    def __init__(self, message: str, tensors: dict[str, "Tensor"]) -> None:
        super().__init__(message)
        self.tensors = tensors


@dataclass(frozen=True)
class Metric:
    """The outcome of one evaluation: numbers, the arrays their uncertainty is computed from, its inputs."""

    values: dict[str, float]
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Work(Settings):
    """What all of them have in common.

    A stage that can tells what it will need: `dry_run(lm, strategy)` does a unit of its work (a training
    step, a window) on a model whose tensors have no contents, `estimate(lm)` computes it from the shapes.
    Its work is the same under each of its `strategies`, which say where memory goes. `waiting_tokens` are
    those whose hidden states wait in host memory or in a file while it works.
    """

    strategies: ClassVar[Sequence[str]] = ("keep", "stream")
    dry_run: ClassVar[Callable[..., None] | None] = None
    estimate: ClassVar[Callable[..., Estimate] | None] = None
    waiting_tokens: ClassVar[Any] = 0

    def check_text(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Raise UserError if the text that is read is too short."""


@dataclass(frozen=True, kw_only=True)
class _Calibrated(Work):
    """A stage that may read calibration text: then it has the fields `calib`, `samples` and `length`."""

    def corpus(self) -> str | None:
        """Return the name of the calibration text, or None."""
        calib = getattr(self, "calib", None)
        return None if calib is None else calib.corpus

    def windows(self, tokenizer: "PreTrainedTokenizerBase") -> "Tensor":
        """Return the calibration windows `[samples, length]`. Raises UserError if the text is too short."""
        return data.calibration(self.calib, tokenizer, self.samples, self.length)

    def check_text(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Raise UserError if the calibration text gives too few windows."""
        if self.corpus() is not None:
            self.windows(tokenizer)


class Transform(_Calibrated):
    """What is done to a model, without changing its function, before it is quantized."""

    def fit(self, load: Load, runtime: Runtime, on_step: OnStep) -> Made:
        """Return a positive vector per site under the site's name, and what the record says of them.

        `clip/<linear>` bounds a folded weight that is to be rounded (see `Folding.weight`), `start/<site>` is
        where s started (ones if it is missing); other names with a slash are kept. The model of `load()`
        stays as it is.
        """
        raise NotImplementedError


class Quantizer(_Calibrated):
    """From a model and scales to integer codes on the field `grid`, which is None in floating point."""

    def quantize(self, load: Load, scales: Mapping[str, "Tensor"], runtime: Runtime) -> Made:
        """Return the tensors of `teq.quantizers.quantized.stored`; the model of `load()` may be used up."""
        raise NotImplementedError

    def dry_runs(self, blocks: int) -> int | None:
        """Return how often the work of `dry_run` is done on a model of so many blocks; None is not known."""


class Tuner(_Calibrated):
    """Training of what a quantized model has in floating point; `parts` says of what, as users name it."""

    parts: str

    def tune(self, load: Load, weights: Mapping[str, "Tensor"], runtime: Runtime) -> Made:
        """Return a quantizer's tensors `weights`, some of them trained, codes and zeros as they were.

        The floating-point model of `load()` may be used up.
        """
        raise NotImplementedError


class Evaluation(Work):
    """A measurement of a quantized model; `name` is what records and tables call it.

    `dry_reference(lm, strategy)` does a unit of the work of `reference`, as `dry_run` does of `measure`.
    """

    name: ClassVar[Any]
    dry_reference: ClassVar[Callable[..., None] | None] = None

    def provenance(self) -> dict[str, Any] | None:
        """Return what identifies the text, which enters the stage's key; None if it reads none."""
        return None

    @property
    def needs_reference(self) -> bool:
        """Return whether `measure` compares with the float model: then it takes a `reference` too."""
        return False

    def reference(self, lm: "LM", runtime: Runtime) -> Mapping[str, "Tensor"]:
        """Return what is compared with, of the float model; it is made once for all methods."""
        raise NotImplementedError

    def measure(self, lm: "LM", runtime: Runtime) -> Metric:
        """Measure the model, which stays as it is."""
        raise NotImplementedError
