"""Memory and operations of a stage before it runs: dry runs on tensors without contents.

A unit of the stage's work (a training step, a window) is run on fake tensors (shapes and lifetimes, no
numbers), on two and on three blocks; the difference is what every further block adds.
"""

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from teq.device.memory import UNITS, Estimate, budget, possible
from teq.device.runtime import STRATEGIES, Runtime
from teq.models.arch import Arch
from teq.models.arch import blocks as blocks_of
from teq.models.blocks import one_sequence_a_row
from teq.models.checkpoint import LM
from teq.models.synthetic import architecture
from teq.spec import UserError
from teq.stage import Transform, Tuner

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def choose(
    stage: Transform | Tuner,
    dimensions: Callable[[], "PretrainedConfig"],
    arch: Arch,
    dtype: str,
    runtime: Runtime,
) -> str:
    """Return the first strategy whose predicted peak fits the budget; `runtime.memory` may name one.

    Raises UserError, naming the least that would do, when none fits.
    """
    if stage.dry_run is None:
        return STRATEGIES[0]
    if runtime.memory in STRATEGIES:
        return runtime.memory
    allowed, needed = budget(runtime.memory, runtime.device), {}
    for strategy in possible(runtime.device):
        needed[strategy] = estimate(stage, dimensions(), arch, dtype, strategy).bytes
        if needed[strategy] <= allowed:
            return strategy
    name, least = min(needed.items(), key=lambda item: item[1])
    raise UserError(
        f"memory={runtime.memory} ({allowed / 1e9:.3g} GB on {runtime.device}) is too small to train the "
        f"scales: the least that would do is memory={_amount(least)}, with {name}; shorten "
        f"{stage.group}.length, lower {stage.group}.batch, or choose a larger device"
    )


def _amount(size: int) -> str:
    """Return a byte count in the syntax of `memory=`, rounded up."""
    unit = "GB" if size >= UNITS["GB"] else "MB"
    return f"{(size * 100 // UNITS[unit] + 1) / 100}{unit}"


def estimate(
    stage: Any, config: "PretrainedConfig", arch: Arch, dtype: str, strategy: str, device: str = "cpu"
) -> Estimate:
    """Return what `stage` needs on a model of all its blocks, from dry runs on models of two and of three.

    The fake tensors are a CPU's, for which attention is one operator as on a GPU. On the `device` "meta" what
    goes to the host's memory is told apart and not counted.
    """
    blocks = config.num_hidden_layers
    if blocks <= 3:
        return _counted(stage, config, arch, dtype, blocks, strategy, device)
    two, three = (_counted(stage, config, arch, dtype, n, strategy, device) for n in (2, 3))
    more = blocks - 2
    return Estimate(
        two.bytes + more * (three.bytes - two.bytes), two.flops + more * (three.flops - two.flops)
    )


def _counted(
    stage: Any, config: "PretrainedConfig", arch: Arch, dtype: str, blocks: int, strategy: str, device: str
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
        if strategy == "offload":
            present -= {p for block in blocks_of(model, arch).values() for p in block.parameters()}
        live = LiveBytes(None if device == "cpu" else device)
        live.count(present)
        del present
        with live:
            stage.dry_run(LM(model, None, arch, "outline"), strategy)
    return Estimate(live.peak, live.flops)
