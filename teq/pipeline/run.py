"""The whole chain: configuration -> scales -> quantized weights (-> tuned) -> metrics -> record."""

import datetime
from pathlib import Path
from typing import Any, Protocol

from teq import record
from teq.device.runtime import Runtime
from teq.pipeline import cost
from teq.pipeline.loaded import LoadedModel
from teq.pipeline.settings import Run
from teq.pipeline.stages import Chain, text
from teq.pipeline.store import Artefact, Stage, Store
from teq.record import Record
from teq.transforms.identity import Identity


class Logger(Protocol):
    """Where the progress of a run is reported."""

    def step(self, step: int, loss: float) -> None: ...

    def finish(self, finished: Record) -> None: ...


def run(spec: Run, store: Store, home: Path, runtime: Runtime, logger: Logger | None) -> Record:
    """Run what is not in the store yet and write the record under `home`/records.

    A stage whose result is not read by another is not made for it: a run whose metrics and record are there
    needs neither scales nor weights.
    """
    model = LoadedModel(spec.model, spec.dtype, runtime.device)
    failed = home / "failed" / f"{spec.key()}.safetensors"
    on_step = logger.step if logger is not None else lambda *_: None
    stages = Chain(spec, model, runtime, on_step, failed).stages()

    def everything() -> dict[str, Artefact]:
        return {name: store.get(stage, runtime.device) for name, stage in stages.items()}

    metrics = {each.name: store.get(stages[each.name], runtime.device) for each in spec.evals}
    made = {name: store.peek(stage) for name, stage in stages.items() if name not in metrics}
    made |= {name: artefact.digest for name, artefact in metrics.items()}
    keys = {name: stage.key for name, stage in stages.items()}
    finished = record.find(home / "records", spec.key(), keys, made)
    if finished is None:
        found = everything()
        if not all(artefact.cached for artefact in found.values()):
            found = everything()  # what was made anew may not be what those found before it were made from
        finished = record.write(_describe(spec, model.identity, found, runtime), home / "records")
    if logger is not None:
        logger.finish(finished)
    return finished


def unfinished(spec: Run, store: Store, runtime: Runtime) -> list[Stage]:
    """Return the stages that a run has to compute, in order, without those that take no time."""
    model = LoadedModel(spec.model, spec.dtype, runtime.device)
    stages = Chain(spec, model, runtime, lambda *_: None, Path()).stages()
    if all(store.holds(stages[each.name]) for each in spec.evals):
        return []
    if isinstance(spec.transform, Identity):
        del stages["scales"]
    return [stage for stage in stages.values() if not store.holds(stage)]


def _describe(spec: Run, identity: str, found: dict[str, Artefact], runtime: Runtime) -> dict[str, Any]:
    """Return the content of a record; `finetune` is in it where there is that stage."""
    tuned = {} if spec.finetune is None else {"finetune": found["tuned"].info}
    readers = {"transform": spec.transform, "quantizer": spec.quantizer}
    readers |= {} if spec.finetune is None else {"finetune": spec.finetune}
    return {
        "id": spec.key(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "run": spec.plain() | {"method": spec.method},
        "identity": identity,
        "metrics": {each.name: found[each.name].info for each in spec.evals},
        "training": {"loss": [], "scales": {}} | found["scales"].info,
        "quantization": found["weights"].info,
        **tuned,
        "text": {name: text(reader) for name, reader in readers.items()},
        "stages": {
            name: {"key": one.key, "digest": one.digest, "cost": one.cost, "cached": one.cached}
            for name, one in found.items()
        },
        "code": cost.code(),
        "machine": cost.machine(runtime.device),
    }
