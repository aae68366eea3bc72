"""The stages of a run: what identifies each in the cache, and how it is made."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from teq import data, record
from teq.device import memory
from teq.device.runtime import STRATEGIES, Runtime
from teq.files import disk
from teq.models.fold import folded_tensors
from teq.pipeline import estimate
from teq.pipeline.cost import uncounted
from teq.pipeline.loaded import LoadedModel
from teq.pipeline.settings import Run, check_quantizable
from teq.pipeline.store import Artefact, Stage
from teq.quantizers.quantized import shapes
from teq.stage import Diverged, Evaluation, Made, Metric, OnStep, Quantizer, Transform, Tuner, Work

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


class Chain:
    """The stages of one run: what identifies each in the cache, and how it is made.

    Their keys come from settings and the weights' identity alone. The scales of a training that diverges are
    saved to the file `failed`.
    """

    def __init__(
        self, spec: Run, model: LoadedModel, runtime: Runtime, on_step: OnStep, failed: Path
    ) -> None:
        self.spec, self.model, self.runtime, self.on_step, self.failed = spec, model, runtime, on_step, failed
        self.texts_checked = False

    def stages(self) -> dict[str, Stage]:
        """Return every stage by name, in the order in which they run.

        They are scales, weights, tuned where the run has `finetune`, and the evaluations, each after its
        `reference/<evaluation>` if it compares with the float model.
        """
        spec = self.spec
        common = {"model": self.model.identity, "dtype": spec.dtype, "arch": spec.model.arch.plain()}
        transform = {"transform": spec.transform.plain(), "text": text(spec.transform)}
        scales = Stage("scales", common | transform, self._fit)
        quantizer = {"quantizer": spec.quantizer.plain(), "text": text(spec.quantizer)}
        settings = {**common, "scales": scales.key, **quantizer}
        weights = Stage("weights", settings, self._quantize, {"scales": scales})
        made: dict[str, Stage] = {"scales": scales, "weights": weights}
        if spec.finetune is not None:
            tuner = {"finetune": spec.finetune.plain(), "text": text(spec.finetune)}
            settings = {**common, "weights": weights.key, **tuner}
            made["tuned"] = Stage("tuned", settings, self._tune, {"weights": weights})
        final = made[final_weights(made)]
        eval_dtype = {} if spec.eval_dtype is None else {"dtype": spec.eval_dtype}
        for each in spec.evals:
            reads, what = {"weights": final}, {"evaluation": each.plain(), "text": each.provenance()}
            if each.needs_reference:
                refer = functools.partial(self._refer, each)
                reads["reference"] = Stage("reference", common | what | eval_dtype, refer)
                made[f"reference/{each.name}"] = reads["reference"]
            settings = {"weights": final.key, **what, **eval_dtype}
            made[each.name] = Stage("metrics", settings, functools.partial(self._measure, each), reads)
        return made

    def _fit(self, partial: Path) -> Made:
        from teq.transforms.summary import summaries

        spec = self.spec

        def fit(how: Runtime) -> Made:
            load = functools.partial(self.model.pristine, how.strategy)
            return spec.transform.fit(load, how, self.on_step)

        tensors, info = self._trained(spec.transform, fit, partial)
        return tensors, {**info, "scales": summaries(tensors)}

    def _trained(self, stage: Transform | Tuner, work: Callable[[Runtime], Made], partial: Path) -> Made:
        try:
            (tensors, info), planned = self._fitting(stage, work, partial)
        except Diverged as error:
            raise _kept(error, self.failed) from error
        # where the strategy that was used is not the planned one, memory ran out; only trainings say theirs
        return tensors, {**info, "planned_strategy": planned if "strategy" in info else STRATEGIES[0]}

    def _fitting(self, stage: Work, work: Callable[[Runtime], T], partial: Path) -> tuple[T, str]:
        """Return what `work` makes with the stage's strategy that fits into memory, and which was planned."""
        spec, runtime = self.spec, self.runtime
        with uncounted():
            if not isinstance(stage, Evaluation):
                self._check_texts()
            dtype = (spec.eval_dtype if isinstance(stage, Evaluation) else None) or spec.dtype
            planned = estimate.choose(stage, spec.model.source.dimensions, spec.model.arch, dtype, runtime)

        def attempt(strategy: str) -> T:
            return work(dataclasses.replace(runtime, strategy=strategy, partial=partial))

        possible = memory.possible(stage.strategies, runtime.device)
        return memory.attempt(attempt, planned, possible, estimate.advice(stage)), planned

    def _quantize(self, partial: Path, scales: Artefact) -> Made:
        quantizer, found = self.spec.quantizer, folded_tensors(scales.tensors())

        def quantize(how: Runtime) -> Made:
            moved = {name: tensor.to(how.device) for name, tensor in found.items()}
            return quantizer.quantize(functools.partial(self.model.to_use_up, how.strategy), moved, how)

        (tensors, info), _ = self._fitting(quantizer, quantize, partial)
        if (grid := quantizer.grid) is None:
            return tensors, info
        return tensors, {**info, "bits_per_weight": grid.bits_per_weight(shapes(tensors, grid).values())}

    def _tune(self, partial: Path, weights: Artefact) -> Made:
        tuner = self.spec.finetune
        assert tuner is not None

        def tune(how: Runtime) -> Made:
            return tuner.tune(functools.partial(self.model.to_use_up, how.strategy), weights.tensors(), how)

        return self._trained(tuner, tune, partial)

    def _refer(self, evaluation: Evaluation, partial: Path) -> Made:
        def refer(how: Runtime) -> Mapping[str, "Tensor"]:
            return evaluation.reference(self.model.pristine(how.strategy, self.spec.eval_dtype), how)

        return self._fitting(evaluation, refer, partial)[0], {}

    def _measure(
        self, evaluation: Evaluation, partial: Path, weights: Artefact, reference: Artefact | None = None
    ) -> Made:
        spec, given = self.spec, {} if reference is None else {"reference": reference.tensors()}

        def measure(how: Runtime) -> Metric:
            lm = self.model.holding(weights, spec.quantizer.grid, how.strategy, spec.eval_dtype)
            return evaluation.measure(lm, how, **given)

        metric, _ = self._fitting(evaluation, measure, partial)
        arrays = {name: record.pack(array) for name, array in metric.arrays.items()}
        info = metric.info | {"attention": self.model.attention()}
        return {}, {"values": metric.values, "arrays": arrays, "info": info}

    def _check_texts(self) -> None:
        """Raise UserError before the first long stage if a later one's text is too short for the model.

        Also raise it if the model cannot be quantized.
        """
        check_quantizable(self.spec)
        tokenizer = None if self.texts_checked else self.spec.model.tokenizer()
        if tokenizer is not None:
            for reader in (*self.spec.calibrated[1:], *self.spec.evals):
                reader.check_text(tokenizer)
        self.texts_checked = True


def final_weights(stages: Mapping[str, Any]) -> str:
    """Return the name of the one of a run's `stages` whose weights are evaluated and exported."""
    return "tuned" if "tuned" in stages else "weights"


def text(reader: Transform | Quantizer | Tuner) -> dict[str, Any] | None:
    """Return what identifies the calibration text of a stage, or None."""
    name = reader.corpus()
    return None if name is None else data.provenance(name)


def _kept(error: Diverged, file: Path) -> Diverged:
    """Return the error, after the scales so far were saved to `file`, saying so."""
    try:
        disk.write_tensors(file, error.tensors)
    except OSError as full:
        return Diverged(f"{error}; the scales so far could not be saved ({full})", error.tensors)
    return Diverged(f"{error}; the scales so far are in {file}", error.tensors)
