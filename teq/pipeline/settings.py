"""A run as settings, and what can be checked before it starts."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from teq import data
from teq.models.arch import sites
from teq.models.checkpoint import Checkpoint
from teq.models.synthetic import skeleton
from teq.spec import Settings, UserError, digest, option
from teq.stage import Evaluation, Quantizer, Transform, Tuner
from teq.transforms.identity import Identity

DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True, kw_only=True)
class Run(Settings):
    """One run, fully resolved. Its key is the id of its record.

    The evaluations compute in `eval_dtype`, everything before them in `dtype`; null is the same for both.
    """

    model: Checkpoint
    dtype: str = option(among=DTYPES)
    eval_dtype: str | None = option(None, among=DTYPES, omitted=None)
    method: str = option(hashed=False)  # a display name: two names of one pair are one run
    transform: Transform
    quantizer: Quantizer
    finetune: Tuner | None = option(None, omitted=None)
    evals: tuple[Evaluation, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_dtype == self.dtype:
            object.__setattr__(self, "eval_dtype", None)
        if self.finetune is not None and self.quantizer.grid is None:
            raise UserError(
                f"finetune={self.finetune.parts} has no effect on method={self.method}, which quantizes "
                "nothing: choose finetune=none, or a method that quantizes, such as rtn"
            )
        if self.model.arch.kept and (share := getattr(self.quantizer, "input_correction", 0)):
            raise UserError(
                f"gptq.input_correction={share} is not allowed for a model with experts: the float model "
                "routes other tokens to them than the quantized one does; leave it out"
            )

    @property
    def calibrated(self) -> tuple[Transform | Quantizer | Tuner, ...]:
        """Return the stages that may read calibration text, in the order in which they run."""
        return self.transform, self.quantizer, *([] if self.finetune is None else [self.finetune])

    def key(self) -> str:
        """Return the content hash, which the order of the evaluations does not change."""
        plain = self.plain()
        return digest(plain | {"evals": sorted(plain["evals"], key=digest)})

    def title(self) -> str:
        """Return the run in a few words, for messages."""
        grid = self.quantizer.grid
        cut = "" if grid is None else f" bits={grid.bits} group_size={grid.group_size}"
        tuned = "" if self.finetune is None else f" finetune={self.finetune.parts}"
        return f"model={self.model.name} method={self.method}{cut}{tuned}"


def checks(spec: Run) -> list[dict[str, Callable[[], Any]]]:
    """Return named calls that raise UserError for what is wrong before any heavy work, in two groups.

    Models are checked before texts, so that without hub access there is one error per model. Checks are
    deduplicated by name across a sweep.
    """
    names = filter(None, (stage.corpus() for stage in spec.calibrated))
    texts = {f"text {name}": functools.partial(data.provenance, name) for name in names}
    known = {}
    if spec.model.source.at_hand:
        known[f"{spec.model.source!r} {spec.model.arch!r} {spec.method}"] = functools.partial(
            check_quantizable, spec
        )
    return [
        {repr(spec.model.source): spec.model.source.fingerprint},
        known | texts | {evaluation.key(): evaluation.provenance for evaluation in spec.evals},
    ]


def check_quantizable(spec: Run) -> None:
    """Raise UserError where a method cannot change the model, which method=fp can still evaluate.

    The model is quantized already, or is not what its architecture's file describes.
    """
    if isinstance(spec.transform, Identity) and spec.quantizer.grid is None:
        return
    dimensions = spec.model.source.dimensions()
    if getattr(dimensions, "quantization_config", None) is not None:
        raise UserError(
            f"model={spec.model.name} is quantized already and method={spec.method} would do it again: "
            "evaluate it with method=fp, or give the model it was made from"
        )
    sites(skeleton(dimensions), spec.model.arch)
