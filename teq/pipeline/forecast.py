"""What each stage of a run would need: peak bytes, strategy and seconds; no weight is loaded.

Memory is that of live tensors on the device (see `teq.device.memory`). Seconds are the operations of matrix
products over the rate at which `calibrate` did those of a small model's training on a device; the rates are
kept next to the records, one for each device and dtype.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teq.device import memory, waiting
from teq.device.locks import CUDA
from teq.device.runtime import STRATEGIES, resolve
from teq.evaluate.perplexity import PASS, Perplexity
from teq.evaluate.workload import WORKLOADS, Scoring
from teq.files import disk
from teq.models.arch import Arch, blocks, linears
from teq.models.checkpoint import LM, Checkpoint
from teq.models.lazy import held_bytes
from teq.models.synthetic import Outline, Synthetic
from teq.pipeline import cost, estimate
from teq.pipeline.settings import Run
from teq.spec import UserError
from teq.stage import Evaluation, Work

if TYPE_CHECKING:
    from transformers import PretrainedConfig

REPEATS = 3
RATES = "rates.json"
CALIBRATION = {  # a model whose matrix products dominate its step, as they do in the ones that take long
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
}
# on a GPU the small model would be launch-bound
WIDER = {"hidden_size": 4096, "intermediate_size": 16384, "num_attention_heads": 32}


@dataclass(frozen=True)
class Target:
    """The device that a forecast is for."""

    kind: str  # "cuda" or "cpu"
    name: str  # in the output
    budget: int  # bytes
    here: str | None  # the device of this machine whose rate holds for it


@dataclass(frozen=True)
class Stage:
    """What one stage needs, with one strategy where it has several; None is not known."""

    name: str
    bytes: int | None
    flops: int | None = None
    strategy: str = ""
    host: int = 0  # bytes that wait in the host's memory while a GPU computes
    disk: int = 0  # bytes in the cache's folder: stored, where more than vectors, or waiting in a file
    about: bool = False  # from the lengths that documents have for SmolLM2's tokenizer


@dataclass(frozen=True, kw_only=True)
class Reference(Work):
    """The float model's pass over an evaluation's text, which a divergence is taken from."""

    evaluation: Evaluation

    def dry_run(self, lm: LM, strategy: str) -> None:
        """Run a unit of the pass."""
        self.evaluation.dry_reference(lm, strategy)


def target(device: str, allowed: str) -> Target:
    """Return the device here; or a GPU of the size `allowed`, unless the device is the CPU by name.

    Raises UserError where there is no such device, and none is named by its size.
    """
    memory.check(allowed)
    if allowed in STRATEGIES or allowed == "auto" or device == "cpu":
        here = resolve(device)
        budget = memory.budget("auto" if allowed in STRATEGIES else allowed, here)
        return Target(here.partition(":")[0], here, budget, here)
    if device != "auto" and not CUDA.fullmatch(device):
        resolve(device)  # raises an error that says what is wrong with it
    here, budget = resolve("auto"), memory.budget(allowed, "cuda")
    return Target("cuda", f"a GPU of {allowed}", budget, here if here.startswith("cuda") else None)


def stages(
    run: Run, sizes: "PretrainedConfig", target: Target, allowed: str, batch_size: int
) -> Iterator[Stage]:
    """Yield what each stage of a run needs with each of its strategies, the picked one marked."""
    import torch

    on = "meta" if target.kind == "cuda" else "cpu"  # a GPU's codes and hidden states go to the host's memory
    given = (allowed,) if allowed in STRATEGIES else ()

    def rows(
        name: str,
        stage: Work,
        dtype: str = "",
        flops: Callable[[int], int | None] = lambda one: one,
        at: str = "cpu",
        stored: int = 0,
        about: bool = False,
    ) -> Iterator[Stage]:
        found = {}
        for strategy in dict.fromkeys([*memory.possible(stage.strategies, target.kind), *given]):
            if strategy in stage.strategies:
                one = estimate.required(stage, sizes, run.model.arch, dtype or run.dtype, strategy, at)
                found[strategy] = one
        if None in found.values():
            yield Stage(name, None)
            return
        fitting = (s for s, one in found.items() if estimate.least_bytes(one, target.kind) <= target.budget)
        picked = estimate.named(stage, allowed, target.kind) if given else next(fitting, None)
        for strategy, one in found.items():
            on_gpu = target.kind == "cuda"
            moved = one.movable if not on_gpu or strategy == "stream" or one.bytes > target.budget else 0
            states, size = moved + waiting_bytes(stage, strategy), one.bytes - moved
            # of the host of a device that is not here nothing is known
            in_file = states if target.here is not None and not waiting.fits(states) else 0
            host = states - in_file + (blocks_bytes() if strategy == "offload" else 0)
            size, host = (size, host) if on_gpu else (size + host, 0)
            mark = " (picked)" if strategy == picked else ""
            yield Stage(name, size, flops(one.flops), strategy + mark, host, stored + in_file, about)

    def blocks_bytes() -> int:
        whole = estimate.outline(sizes, run.dtype, run.model.arch, lazy=True)
        return sum(p.nbytes for p in whole.model.parameters()) - held_bytes(whole.model, whole.arch)[0]

    def waiting_bytes(stage: Work, strategy: str) -> int:
        """Return the bytes of hidden states that wait in the host's memory beside those of the estimate."""
        if strategy == "stream" and isinstance(stage, Perplexity):
            return min(PASS, hidden_bytes(stage) or PASS)
        return stage.waiting_tokens * sizes.hidden_size * getattr(torch, run.dtype).itemsize

    def hidden_bytes(evaluation: Any) -> int:
        """Return the bytes of the hidden states of all windows, 0 where their number is not known."""
        dtype = getattr(torch, run.eval_dtype or run.dtype)
        return (evaluation.limit or 0) * evaluation.context * sizes.hidden_size * dtype.itemsize

    def trained(name: str, stage: Any) -> Iterator[Stage]:
        return rows(name, stage, flops=lambda one: one // 2 * stage.steps)  # a dry run is two steps

    def reference(evaluation: Evaluation) -> Iterator[Stage]:
        count = getattr(evaluation, "limit", None) or 0
        dtype = run.eval_dtype or run.dtype
        kept = hidden_bytes(evaluation)
        return rows(
            f"reference/{evaluation.name}",
            Reference(evaluation=evaluation),
            dtype,
            lambda one: one * count or None,
            at=on,
            stored=kept,
        )

    if run.transform.dry_run is not None:
        yield from trained("scales", run.transform)
    times = run.quantizer.dry_runs(sizes.num_hidden_layers) if run.quantizer.dry_run is not None else 1
    # RTN's time is no matrix products'
    codes = stored_bytes(run, sizes)
    yield from rows("weights", run.quantizer, at=on, flops=lambda one: times and times * one, stored=codes)
    if run.finetune is not None:
        yield from trained("tuned", run.finetune)
    for evaluation in run.evals:
        dtype = run.eval_dtype or run.dtype
        if evaluation.needs_reference:
            yield from reference(evaluation)
        if (work := WORKLOADS.get(evaluation.name)) is not None:
            documents = min(getattr(evaluation, "limit", None) or work.documents, work.documents)
            scoring = Scoring(work, documents, batch_size)
            yield from rows(evaluation.name, scoring, dtype, scoring.flops, about=True)
        else:
            count = getattr(evaluation, "limit", None) or 0
            yield from rows(evaluation.name, evaluation, dtype, lambda one, count=count: one * count or None)


def stored_bytes(run: Run, sizes: "PretrainedConfig") -> int:
    """Return the bytes of the codes, scales and zeros of all linears of the blocks; 0 without a grid."""
    if run.quantizer.grid is None:
        return 0
    lm = estimate.outline(sizes, run.dtype, run.model.arch)
    inside = [one for block in blocks(lm.model, lm.arch).items() for one in linears(*block).values()]
    bits = run.quantizer.grid.bits_per_weight([tuple(one.weight.shape) for one in inside])
    return int(bits / 8 * sum(one.weight.numel() for one in inside))


def calibrate(home: Path, transform: Any, arch: Arch, device: str, dtype: str) -> None:
    """Measure the rate of a transform's training steps in operations per second on a small model; keep it."""
    import torch

    source = Synthetic(config=CALIBRATION | (WIDER if device.startswith("cuda") else {}))
    checkpoint = Checkpoint(name="calibration", source=source, arch=arch)
    # counted on fake tensors: a compiler declines for good what it first sees under a counter
    operations = estimate.estimate(transform, checkpoint.source.dimensions(), arch, dtype, "keep").flops
    lm = checkpoint.load(dtype, device)
    spent = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        transform.dry_run(lm, "keep")
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        spent.append(time.perf_counter() - start)
    measured = operations / min(spent[1:])  # the first warms up
    disk.write_text(home / RATES, json.dumps(rates(home) | {rate_name(device, dtype): measured}, indent=1))


def rates(home: Path) -> dict[str, float]:
    """Return the measured operations per second, by `rate_name`. Raises UserError."""
    try:
        return json.loads((home / RATES).read_text())
    except FileNotFoundError:
        return {}
    except ValueError:
        raise UserError(f"{home / RATES} is damaged: delete it and calibrate again") from None


def rate_name(device: str, dtype: str) -> str:
    """Return the name of a device with its thread count, and of a dtype."""
    import torch  # noqa: F401  (the machine's thread count is torch's)

    found = cost.machine(device)
    return f"{found['name']}, {found['threads']} threads, {dtype}"


def dimensions(model: Checkpoint, given: Mapping[str, Any] | None) -> "PretrainedConfig":
    """Return the architecture's dimensions: of a local folder, else the `given` ones of conf/model."""
    source = Outline(config=dict(given)) if given and not model.source.at_hand else model.source
    return source.dimensions()
