"""The stages of a run: what identifies each in the cache, and how it is made."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teq import data, record
from teq.device import memory
from teq.device.runtime import Runtime
from teq.files import disk
from teq.models.fold import folded_tensors
from teq.pipeline import estimate
from teq.pipeline.cost import uncounted
from teq.pipeline.loaded import LoadedModel
from teq.pipeline.settings import Run, check_unquantized
from teq.pipeline.store import Artefact, Stage
from teq.stage import Diverged, Evaluation, Made, OnStep, Quantizer, Transform


@dataclass(frozen=True)
class Stages:
    """The stages of one run; their keys come from settings and the weights' identity alone."""

    scales: Stage
    weights: Stage
    metrics: dict[str, Stage]

    def all(self) -> dict[str, Stage]:
        """Return every stage by name, in the order in which they run."""
        return {"scales": self.scales, "weights": self.weights, **self.metrics}


def stages_of(spec: Run, model: LoadedModel, runtime: Runtime, on_step: OnStep, failed: Path) -> Stages:
    """Return the stages of a run. The scales of a training that diverges are saved to the file `failed`."""
    check_texts = functools.cache(functools.partial(_check_texts, spec))
    common = {"model": model.identity, "dtype": spec.dtype, "arch": spec.model.arch.plain()}
    scales = Stage(
        "scales",
        {**common, "transform": spec.transform.plain(), "text": text(spec.transform)},
        functools.partial(_fit, spec, model, runtime, on_step, failed, check_texts),
    )
    quantizer = {"quantizer": spec.quantizer.plain(), "text": text(spec.quantizer)}
    weights = Stage(
        "weights",
        {**common, "scales": scales.key, **quantizer},
        functools.partial(_quantize, spec, model, runtime, check_texts),
        {"scales": scales},
    )
    metrics = {
        each.name: Stage(
            "metrics",
            {"weights": weights.key, "evaluation": each.plain(), "text": each.provenance()},
            functools.partial(_measure, spec, model, runtime, each),
            {"weights": weights},
        )
        for each in spec.evals
    }
    return Stages(scales, weights, metrics)


def _fit(
    spec: Run,
    model: LoadedModel,
    runtime: Runtime,
    on_step: OnStep,
    failed: Path,
    check_texts: Callable[[], None],
    partial: Path,
) -> Made:
    from teq.transforms.summary import summaries

    def fit(strategy: str) -> Made:
        load = functools.partial(model.pristine, "cpu" if strategy == "offload" else None)
        how = dataclasses.replace(runtime, strategy=strategy, partial=partial)
        return spec.transform.fit(load, how, on_step)

    with uncounted():
        check_texts()
        chosen = estimate.choose(
            spec.transform, spec.model.source.dimensions, spec.model.arch, spec.dtype, runtime
        )
    try:
        if spec.transform.dry_run is not None:
            tensors, info = memory.attempt(fit, chosen, runtime.device)
        else:  # it works in one way only
            with memory.explained("the scales are searched", runtime.device):
                tensors, info = fit(chosen)
    except Diverged as error:
        raise _kept(error, failed) from error
    # where the strategy that was used is not the planned one, memory ran out
    return tensors, {**info, "planned_strategy": chosen, "scales": summaries(tensors)}


def _quantize(
    spec: Run,
    model: LoadedModel,
    runtime: Runtime,
    check_texts: Callable[[], None],
    partial: Path,
    scales: Artefact,
) -> Made:
    with uncounted():
        check_texts()
    with memory.explained("the weights are quantized", runtime.device):
        moved = {name: s.to(runtime.device) for name, s in folded_tensors(scales.tensors()).items()}
        how = dataclasses.replace(runtime, partial=partial)
        return spec.quantizer.quantize(model.to_use_up, moved, how)


def _measure(
    spec: Run,
    model: LoadedModel,
    runtime: Runtime,
    evaluation: Evaluation,
    partial: Path,
    weights: Artefact,
) -> Made:
    how = dataclasses.replace(runtime, partial=partial)
    with memory.explained(f"{evaluation.name} is measured", runtime.device):
        metric = evaluation.measure(model.holding(weights, spec.quantizer.grid), how)
    arrays = {name: record.pack(array) for name, array in metric.arrays.items()}
    info = metric.info | {"attention": model.attention()}
    return {}, {"values": metric.values, "arrays": arrays, "info": info}


def _check_texts(spec: Run) -> None:
    """Raise UserError before the first long stage if a later one's text is too short for the model.

    So it does where the model is quantized already.
    """
    check_unquantized(spec)
    if (tokenizer := spec.model.tokenizer()) is not None:
        for reader in (spec.quantizer, *spec.evals):
            reader.check_text(tokenizer)


def text(reader: Transform | Quantizer) -> dict[str, Any] | None:
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
