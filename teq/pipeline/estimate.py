"""Memory and operations of a stage before it runs: dry runs on tensors without contents.

A unit of the stage's work (a training step, a window) is run on fake tensors (shapes and lifetimes, no
numbers), on two and on three blocks; the difference is what every further block adds.
"""

import copy
import functools
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from teq.device.memory import UNITS, Estimate, budget, possible
from teq.device.runtime import STRATEGIES, Runtime
from teq.models.arch import Arch
from teq.models.blocks import one_sequence_a_row
from teq.models.checkpoint import LM
from teq.models.lazy import defer
from teq.models.synthetic import architecture, skeleton
from teq.spec import UserError
from teq.stage import Work

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

_KNOWN: dict[tuple[Any, ...], Estimate] = {}  # a sweep's jobs ask for the same again and again
MANY = 2  # where so many times a model's weights fit, so does what works on them without training


def choose(
    stage: Work, dimensions: Callable[[], "PretrainedConfig"], arch: Arch, dtype: str, runtime: Runtime
) -> str:
    """Return the first of a stage's strategies whose predicted peak fits the budget; memory may name one.

    One that the stage does not have becomes the next lesser one. A stage that is no training streams where
    nothing fits; where nothing of a training does, raises UserError, naming the least that would do.
    """
    those, trains = possible(stage.strategies, runtime.device), "checkpoint" in stage.strategies
    if runtime.memory in STRATEGIES:
        return named(stage, runtime.memory, runtime.device)
    allowed, config = budget(runtime.memory, runtime.device), dimensions()
    weights, needed = weight_bytes(config.to_json_string(), dtype), {}
    if MANY * weights <= allowed and not trains:
        return those[0]  # not worth the second that a dry run takes
    for strategy in those:
        if strategy == "offload" and weights > budget("auto", "cpu"):
            continue  # blocks wait in the host's memory
        one = required(stage, config, arch, dtype, strategy)
        needed[strategy] = weights if one is None else least_bytes(one, runtime.device)
        if needed[strategy] <= allowed:
            return strategy
    if not trains:
        return those[-1]
    name, least = min(needed.items(), key=lambda item: item[1])
    raise UserError(
        f"memory={runtime.memory} ({allowed / 1e9:.3g} GB on {runtime.device}) is too small to train the "
        f"scales: the least that would do is memory={_amount(least)}, with {name}; shorten "
        f"{stage.group}.length, lower {stage.group}.batch, or choose a larger device"
    )


def named(stage: Work, strategy: str, device: str) -> str:
    """Return the strategy that a user names, or the next lesser one where the stage does not have it."""
    if strategy in stage.strategies:
        return strategy
    lesser = STRATEGIES[: STRATEGIES.index(strategy)]
    return [each for each in possible(stage.strategies, device) if each in lesser][-1]


def least_bytes(one: Estimate, device: str) -> int:
    """Return what must be on the device: on a GPU not what may wait in the host's memory."""
    return one.bytes - (one.movable if device.startswith("cuda") else 0)


def required(
    stage: Work, config: "PretrainedConfig", arch: Arch, dtype: str, strategy: str, device: str = "cpu"
) -> Estimate | None:
    """Return what a stage needs with a strategy, None where it does not tell; see `estimate`."""
    if stage.dry_run is not None:
        return estimate(stage, config, arch, dtype, strategy, device)
    if stage.estimate is not None:
        return stage.estimate(outline(config, dtype, arch, lazy=strategy == "stream"))
    return None


def outline(config: "PretrainedConfig", dtype: str, arch: Arch, lazy: bool = False) -> LM:
    """Return the whole model on the meta device: names and shapes."""
    import torch

    with torch.device("meta"):
        model = architecture(config, dtype)
    if lazy:
        defer(model, arch, dict, "meta")
    return LM(model, None, arch, "outline")


@functools.cache
def weight_bytes(config: str, dtype: str) -> int:
    """Return the bytes of the parameters of a model in a dtype, from its configuration as JSON."""
    import torch
    from transformers import AutoConfig

    values = json.loads(config)
    model = skeleton(AutoConfig.for_model(values.pop("model_type"), **values))
    return sum(p.numel() for p in model.parameters()) * getattr(torch, dtype).itemsize


def advice(stage: Work) -> str:
    """Return what a user may change where memory runs out in a stage."""
    for option in ("length", "context"):
        if getattr(stage, option, None) is not None:
            return f"shorten {stage.group}.{option}"
    return "lower tasks.batch_size" if stage.group == "tasks" else "free some of it"


def _amount(size: int) -> str:
    """Return a byte count in the syntax of `memory=`, rounded up."""
    unit = "GB" if size >= UNITS["GB"] else "MB"
    return f"{(size * 100 // UNITS[unit] + 1) / 100}{unit}"


def estimate(
    stage: Work, config: "PretrainedConfig", arch: Arch, dtype: str, strategy: str, device: str = "cpu"
) -> Estimate:
    """Return what `stage` needs on a model of all its blocks, from dry runs on models of two and of three.

    The fake tensors are a CPU's, for which attention is one operator as on a GPU. On the `device` "meta" what
    goes to the host's memory is told apart and not counted.
    """
    key = (repr(stage), config.to_json_string(), repr(arch), dtype, strategy, device)
    if key not in _KNOWN:
        _KNOWN[key] = _extrapolated(stage, config, arch, dtype, strategy, device)
    return _KNOWN[key]


def _extrapolated(
    stage: Work, config: "PretrainedConfig", arch: Arch, dtype: str, strategy: str, device: str
) -> Estimate:
    blocks = config.num_hidden_layers
    if blocks <= 3:
        return _counted(stage, config, arch, dtype, blocks, strategy, device)
    two, three = (_counted(stage, config, arch, dtype, n, strategy, device) for n in (2, 3))
    more = blocks - 2
    return Estimate(
        two.bytes + more * (three.bytes - two.bytes), two.flops + more * (three.flops - two.flops)
    )


def _counted(
    stage: Work, config: "PretrainedConfig", arch: Arch, dtype: str, blocks: int, strategy: str, device: str
) -> Estimate:
    """Return what a fake model of so many blocks takes, and what a dry run on it makes."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from teq.device.live_bytes import LiveBytes

    config = copy.deepcopy(config)
    config.num_hidden_layers = blocks
    with FakeTensorMode(), one_sequence_a_row():
        with torch.device(device):
            model = architecture(config, dtype)
        model.eval().requires_grad_(False)
        model.tie_weights()
        present = {*model.parameters(), *model.buffers()}
        if strategy in ("offload", "stream"):
            prefix = f"{arch.blocks}."
            empty = _Empty((name, p) for name, p in model.named_parameters() if name.startswith(prefix))
            present -= set(empty.values())
            if strategy == "stream":
                defer(model, arch, lambda: empty, device)
        live = LiveBytes(None if device == "cpu" else device)
        live.count(present)
        del present
        with live:
            stage.dry_run(LM(model, None, arch, "outline"), strategy)
    return Estimate(live.peak, live.flops)


class _Empty(dict[str, "Tensor"]):
    """Tensors like those it holds, made when they are read."""

    def __getitem__(self, name: str) -> "Tensor":
        import torch

        return torch.empty_like(super().__getitem__(name))
