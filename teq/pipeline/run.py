"""The whole chain: configuration -> scales -> quantized weights -> metrics -> record."""

import dataclasses
import datetime
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar, runtime_checkable

from teq import data as corpora
from teq import record
from teq.device import memory
from teq.files import disk
from teq.models.checkpoint import Checkpoint
from teq.pipeline import cost
from teq.pipeline.store import Artefact, Made, Stage, Store
from teq.record import Record
from teq.spec import Runtime, Settings, UserError, digest, option
from teq.stage import Diverged, folded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from teq.models.checkpoint import LM

log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")


class Logger(Protocol):
    """Where a run reports while it goes on."""

    def step(self, step: int, loss: float) -> None: ...

    def finish(self, finished: Record) -> None: ...


@runtime_checkable
class Reads(Protocol):
    """A stage that needs some number of tokens of a text."""

    def check_text(self, tokenizer: "PreTrainedTokenizerBase") -> None: ...


@dataclass(frozen=True, kw_only=True)
class Run(Settings):
    """One run, fully resolved. Its key is the id of its record."""

    model: Checkpoint
    dtype: str = option(among=("float32", "bfloat16", "float16", "float64"))
    method: str = option(hashed=False)  # a display name: two names of one pair are one run
    transform: Settings
    quantizer: Settings
    evals: tuple[Settings, ...]

    def key(self) -> str:
        """The content hash, which the order of the evaluations does not change."""
        plain = self.plain()
        return digest(plain | {"evals": sorted(plain["evals"], key=digest)})

    def title(self) -> str:
        """The run in a few words, for messages."""
        grid = self.quantizer.grid
        cut = "" if grid is None else f" bits={grid.bits} group_size={grid.group_size}"
        return f"model={self.model.name} method={self.method}{cut}"


def checks(spec: Run) -> list[dict[str, Callable[[], Any]]]:
    """What can be known to be wrong before any heavy work: named calls that raise UserError.

    First the model, then the texts: whoever cannot reach the hub hears of the models, not of every data set
    too. Equal names are equal checks, so that a sweep asks for each once.
    """
    texts = {f"text {r.corpus()}": functools.partial(_text, r) for r in (spec.transform, spec.quantizer)}
    return [
        {repr(spec.model.source): spec.model.source.identity},
        texts | {evaluation.key(): evaluation.provenance for evaluation in spec.evals},
    ]


def resolve_device(wanted: str) -> str:
    """`auto` as the device there is; any other name checked. Raises UserError."""
    import torch

    if wanted == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise UserError(f"device={wanted} is not allowed: it must be auto, cpu or cuda:<n>") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device={wanted} does not exist: there are {torch.cuda.device_count()} CUDA devices here"
        )
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device={wanted} is not allowed: it must be auto, cpu or cuda:<n>")
    return f"cuda:{device.index or 0}" if device.type == "cuda" else "cpu"


def run(spec: Run, store: Store, home: Path, runtime: Runtime, logger: Logger) -> Record:
    """Run what is not in the store yet and write the record under `home`/records.

    A stage's key holds its settings, the weights' identity, and the digest of the text it reads, so that
    equal work is done once, whoever asks for it. A stage whose result is not read by another is not made for
    it: a run whose metrics and record are there needs neither scales nor weights.
    """
    identity = spec.model.identity(runtime.device)
    of_model = {"model": identity, "dtype": spec.dtype, "arch": spec.model.arch.plain()}
    bench = Bench(spec.model, spec.dtype, runtime.device, identity)
    check_texts = functools.cache(functools.partial(_check_texts, spec))

    def fit(partial: Path) -> Made:
        from teq.transforms.summary import summaries

        def with_strategy(strategy: str) -> Made:
            load = functools.partial(bench.pristine, "cpu") if strategy == "offload" else bench.pristine
            how = dataclasses.replace(runtime, strategy=strategy, partial=partial)
            return spec.transform.fit(load, how, logger.step)

        try:
            with cost.uncounted():
                check_texts()
                chosen = memory.choose(
                    spec.transform, spec.model.config, spec.model.arch, spec.dtype, runtime
                )
            if isinstance(spec.transform, memory.Rehearsable):
                tensors, info = memory.attempt(with_strategy, chosen, runtime.device)
            else:  # it works in one way only
                guarded = _with_a_way_out("the scales are searched", runtime.device)(with_strategy)
                tensors, info = guarded(chosen)
        except Diverged as error:
            raise _kept(error, home / "failed" / f"{spec.key()}.safetensors") from error
        # where the strategy that was used is not the planned one, memory ran out
        return tensors, {**info, "planned_strategy": chosen, "scales": summaries(tensors)}

    @_with_a_way_out("the weights are quantized", runtime.device)
    def quantize(partial: Path, scales: Artefact) -> Made:
        with cost.uncounted():
            check_texts()
        moved = {name: s.to(runtime.device) for name, s in folded(scales.tensors()).items()}
        how = dataclasses.replace(runtime, partial=partial)
        return spec.quantizer.quantize(bench.to_use_up, moved, how)

    def evaluate(evaluation: Any, partial: Path, weights: Artefact) -> Made:
        how = dataclasses.replace(runtime, partial=partial)
        guard = _with_a_way_out(f"{evaluation.name} is measured", runtime.device)
        metric = guard(lambda: evaluation.measure(bench.holding(weights, spec.quantizer.grid), how))()
        arrays = {name: record.pack(array) for name, array in metric.arrays.items()}
        info = metric.info | {"attention": bench.attention()}
        return {}, {"values": metric.values, "arrays": arrays, "info": info}

    scales = Stage(
        "scales", {**of_model, "transform": spec.transform.plain(), "text": _text(spec.transform)}, fit
    )
    quantizer = {"quantizer": spec.quantizer.plain(), "text": _text(spec.quantizer)}
    weights = Stage("weights", {**of_model, "scales": scales.key, **quantizer}, quantize, {"scales": scales})
    evaluations = {}
    for each in spec.evals:
        settings = {"weights": weights.key, "evaluation": each.plain(), "text": each.provenance()}
        evaluations[each.name] = Stage(
            "metrics", settings, functools.partial(evaluate, each), {"weights": weights}
        )
    chain = {"scales": scales, "weights": weights, **evaluations}

    def everything() -> dict[str, Artefact]:
        return {name: store.get(stage, runtime.device) for name, stage in chain.items()}

    metrics = {name: store.get(stage, runtime.device) for name, stage in evaluations.items()}
    made = {"scales": store.peek(scales), "weights": store.peek(weights)}
    made |= {name: artefact.digest for name, artefact in metrics.items()}
    keys = {name: stage.key for name, stage in chain.items()}
    finished = record.find(home / "records", spec.key(), keys, made)
    if finished is None:
        stages = everything()
        if not all(artefact.cached for artefact in stages.values()):
            stages = everything()  # what was made anew may not be what those found before it were made from
        trained, quantized = stages["scales"], stages["weights"]
        finished = record.write(
            {
                "id": spec.key(),
                "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "run": spec.plain() | {"method": spec.method},
                "identity": identity,
                "metrics": {name: stages[name].info for name in evaluations},
                "training": {"loss": [], "scales": {}} | trained.info,
                "quantization": quantized.info,
                "text": {"transform": _text(spec.transform), "quantizer": _text(spec.quantizer)},
                "stages": {name: _stage(artefact) for name, artefact in stages.items()},
                "code": cost.code(),
                "machine": cost.machine(runtime.device),
            },
            home / "records",
        )
    logger.finish(finished)
    return finished


class Bench:
    """The one model in memory, and what has been done to it. Nothing is loaded before it is asked for."""

    def __init__(self, checkpoint: Checkpoint, dtype: str, device: str, identity: str) -> None:
        self.checkpoint, self.dtype, self.device, self.identity = checkpoint, dtype, device, identity
        self._lm: LM | None = None
        self._state: str | None = "pristine"

    def pristine(self, device: str | None = None) -> "LM":
        """The model as it was loaded, on `device` (its own); the caller leaves it so.

        Raises UserError where the weights are not those any more that the run's keys were made of.
        """
        if self._lm is None or self._state != "pristine":
            self._lm = None
            memory.release(self.device)  # the old model, before another one needs its room
            log.info("loading model=%s", self.checkpoint.name)
            with cost.uncounted():
                self._lm = self.checkpoint.load(self.dtype, device or self.device, self.device)
                if (now := self.checkpoint.identity(self.device)) != self.identity:
                    raise UserError(
                        f"the weights of model={self.checkpoint.name} changed while the run was under way "
                        f"({self.identity} is {now} now): start it again, what was finished is kept"
                    )
            self._state = "pristine"
        elif self._lm.device.type != "meta":  # an outline stays one
            self._lm.model.to(device or self.device)
        return self._lm

    def to_use_up(self) -> "LM":
        """The model as it was loaded; the caller may change it."""
        lm, self._state = self.pristine(), "used up"
        return lm

    def holding(self, weights: Artefact, grid: Any) -> "LM":
        """The model with the stored weights in it: nothing but the file decides what is evaluated."""
        if self._state != weights.key:
            from teq.quantizers.quantized import restore

            lm = self.to_use_up()
            restore(lm.model, weights.tensors(self.device), grid)
            self._state = weights.key
        assert self._lm is not None
        return self._lm

    def attention(self) -> str | None:
        """The kernel that the model in memory computes attention with, as transformers names it."""
        return None if self._lm is None else getattr(self._lm.model.config, "_attn_implementation", None)


def _with_a_way_out(doing: str, device: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Memory of a device that runs out in a stage that holds the whole model there is a UserError."""

    def guarded(work: Callable[P, T]) -> Callable[P, T]:
        def guard(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                return work(*args, **kwargs)
            except RuntimeError as error:
                if device == "cpu" or not memory.exhausted(error):
                    raise
                raise UserError(
                    f"the memory of {device} ran out while {doing}, which holds the whole model there: "
                    "what was finished is kept, the same command with device=cpu goes on from it"
                ) from None

        return guard

    return guarded


def _check_texts(spec: Run) -> None:
    """Before the first long stage: whether every text is long enough for the stages behind it, as this
    model's tokenizer counts. Raises UserError.
    """
    readers = [stage for stage in (spec.quantizer, *spec.evals) if isinstance(stage, Reads)]
    if readers and (tokenizer := spec.model.tokenizer()) is not None:
        for reader in readers:
            reader.check_text(tokenizer)


def _text(reader: Any) -> dict[str, Any] | None:
    name = reader.corpus()
    return None if name is None else corpora.provenance(name)


def _stage(artefact: Artefact) -> dict[str, Any]:
    return {
        "key": artefact.key,
        "digest": artefact.digest,
        "cost": artefact.cost,
        "cached": artefact.cached,
    }


def _kept(error: Diverged, file: Path) -> Diverged:
    """The error, after the scales so far were saved to `file`, saying so."""
    try:
        disk.write_tensors(file, error.tensors)
    except OSError as full:
        return Diverged(f"{error}; the scales so far could not be saved ({full})", error.tensors)
    return Diverged(f"{error}; the scales so far are in {file}", error.tensors)
