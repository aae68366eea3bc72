"""Where memory goes in a training step: counted beforehand on tensors without contents, chosen to fit.

The step itself is run on fake tensors (shapes and lifetimes, no numbers), on two and on three blocks; the
difference is what every further block adds.
"""

import copy
import gc
import logging
import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from teq.device import host_memory
from teq.models.arch import Arch
from teq.spec import STRATEGIES, Runtime, UserError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig

    from teq.models.checkpoint import LM
    from teq.stage import Transform

T = TypeVar("T")
log = logging.getLogger(__name__)
UNITS = {"MB": 10**6, "GB": 10**9}
RESERVE = 0.9  # of the free memory may be planned with: allocators round up and fragment


@runtime_checkable
class Rehearsable(Protocol):
    """A stage that can do a piece of its work (a training step, a window) for what the piece needs alone."""

    def rehearse(self, lm: "LM", strategy: str) -> None: ...


def budget(memory: str, device: str) -> int:
    """Return the bytes that may be used: `auto` is nine tenths of what is free on the device (on a CPU of
    what the host has free and its cgroups leave).

    Raises UserError when `memory` is no amount.
    """
    import torch

    if memory != "auto":
        return _bytes(memory)
    if device.startswith("cuda"):
        # what PyTorch keeps for later and does not use is free as well
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(RESERVE * (torch.cuda.mem_get_info(device)[0] + kept))
    return int(RESERVE * host_memory.available())


def _bytes(memory: str) -> int:
    amount = re.fullmatch(r"(\d+(?:\.\d+)?)(MB|GB)", memory)
    if amount is None:
        raise UserError(
            f"memory={memory} is not allowed: it must be auto, an amount such as 40GB or 800MB, or one of "
            f"{', '.join(STRATEGIES)}"
        )
    return int(float(amount[1]) * UNITS[amount[2]])


def check(memory: str) -> None:
    """Raises UserError where `memory` is neither a strategy, nor auto, nor an amount."""
    if memory not in STRATEGIES and memory != "auto":
        _bytes(memory)


def choose(
    transform: "Transform",
    dimensions: Callable[[], "PretrainedConfig"],
    arch: Arch,
    dtype: str,
    runtime: Runtime,
) -> str:
    """The first strategy whose predicted peak fits into the budget; `runtime.memory` may also name one.

    Raises UserError, naming the least that would do, when none fits.
    """
    if not isinstance(transform, Rehearsable):
        return STRATEGIES[0]
    if runtime.memory in STRATEGIES:
        return runtime.memory
    allowed, needed = budget(runtime.memory, runtime.device), {}
    for strategy in possible(runtime.device):
        needed[strategy] = need(transform, dimensions(), arch, dtype, strategy).bytes
        if needed[strategy] <= allowed:
            return strategy
    name, least = min(needed.items(), key=lambda item: item[1])
    raise UserError(
        f"memory={runtime.memory} ({allowed / 1e9:.3g} GB on {runtime.device}) is too small to train the "
        f"scales: the least that would do is memory={_amount(least)}, with {name}; shorten train.length, "
        "lower train.batch, or choose a larger device"
    )


def _amount(size: int) -> str:
    """So many bytes or a little more, as `memory` takes them."""
    unit = "GB" if size >= UNITS["GB"] else "MB"
    return f"{(size * 100 // UNITS[unit] + 1) / 100}{unit}"


def fits(bytes_more: int, model: "nn.Module", runtime: Runtime) -> bool:
    """Whether so many bytes may be made on the device beside a model that is there already.

    A CPU's own memory cannot be relieved by itself: there they always do.
    """
    if runtime.device == "cpu":
        return True
    if runtime.memory in STRATEGIES:
        return runtime.memory != "offload"
    weights = 0 if runtime.memory == "auto" else sum(p.nbytes for p in model.parameters())
    return weights + bytes_more <= budget(runtime.memory, runtime.device)


def possible(device: str) -> tuple[str, ...]:
    """The strategies that change anything on a device: a CPU's own memory cannot be relieved by itself."""
    return STRATEGIES if device.startswith("cuda") else STRATEGIES[:2]


def attempt(work: Callable[[str], T], strategy: str, device: str) -> T:
    """`work(strategy)`, or once with the next strategy that helps on `device` where memory runs out.

    Raises UserError when that does not do either.
    """
    following = [s for s in possible(device) if STRATEGIES.index(s) > STRATEGIES.index(strategy)]
    try:
        return work(strategy)
    except RuntimeError as error:
        if not exhausted(error):
            raise
        said = " ".join(str(error).split())
    # not inside the handler: the error's traceback holds the very tensors that filled the memory
    if following:
        log.warning(
            "memory ran out with strategy %s (%s): going on with %s", strategy, said[:120], following[0]
        )
        try:
            return work(following[0])
        except RuntimeError as error:
            if not exhausted(error):
                raise
    raise UserError(
        f"memory ran out with strategy {(*following, strategy)[0]} ({said[:120]}): what was trained is kept; "
        "give a smaller memory=<amount>, shorten train.length, or choose a larger device"
    )


@dataclass(frozen=True)
class Need:
    """What some work takes: peak bytes of live tensors on the device, weights included, and operations."""

    bytes: int
    flops: int
    movable: int = 0  # of the bytes: what may wait in the host's memory instead


def need(
    stage: Rehearsable, config: "PretrainedConfig", arch: Arch, dtype: str, strategy: str, device: str = "cpu"
) -> Need:
    """What `stage` needs on a model of all its blocks, from rehearsals on models of two and of three.

    The fake tensors are a CPU's, for which attention is one operator as on a GPU. On the `device` "meta" what
    goes to the host's memory is told apart and not counted.
    """
    blocks = config.num_hidden_layers
    if blocks <= 3:
        return _counted(stage, config, arch, dtype, blocks, strategy, device)
    two, three = (_counted(stage, config, arch, dtype, n, strategy, device) for n in (2, 3))
    more = blocks - 2
    return Need(two.bytes + more * (three.bytes - two.bytes), two.flops + more * (three.flops - two.flops))


def exhausted(error: BaseException) -> bool:
    """Whether this is a device's, or the CPU allocator's, way of saying that memory has run out."""
    import torch

    said = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and any(words in said for words in ("can't allocate memory", "out of memory", "status_alloc_failed"))
    )


def release(device: str) -> None:
    """Free what only reference cycles keep alive, and on CUDA what the allocator holds back for later.

    A model can be in such a cycle: a traceback that transformers' lazy import keeps refers to frames.
    """
    gc.collect()
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()


def _counted(
    stage: Rehearsable,
    config: "PretrainedConfig",
    arch: Arch,
    dtype: str,
    blocks: int,
    strategy: str,
    device: str,
) -> Need:
    """What was there before the rehearsal on a fake model of so many blocks, and what the rehearsal made."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoModelForCausalLM

    from teq.models.arch import blocks as blocks_of
    from teq.models.arch import one_sequence_a_row
    from teq.models.checkpoint import LM

    config = copy.deepcopy(config)
    config.num_hidden_layers = blocks
    with FakeTensorMode(), one_sequence_a_row():
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        model.eval().requires_grad_(False)
        model.tie_weights()
        present = {*model.parameters(), *model.buffers()}
        if strategy == "offload":
            present -= {p for block in blocks_of(model, arch).values() for p in block.parameters()}
        with LiveBytes(None if device == "cpu" else device) as live:
            stage.rehearse(LM(model, None, arch, "outline"), strategy)
    return Need(sum(tensor.nbytes for tensor in present) + live.peak, live.flops)


class LiveBytes:
    """Within: counts the bytes of the tensors that operators make, for as long as they live. `peak` is kept.

    Works on fake tensors and on real ones; what a fused kernel allocates and frees inside itself is not seen.
    `flops` are the operations of the matrix products. Where a `device` is given, tensors elsewhere are not
    counted.
    """

    def __init__(self, device: str | None = None) -> None:
        self.device = device
        self.live = self.peak = self.flops = 0
        self._known: set[int] = set()

    def __enter__(self) -> "LiveBytes":
        from torch.utils._python_dispatch import TorchDispatchMode
        from torch.utils._pytree import tree_leaves
        from torch.utils.flop_counter import flop_registry

        counter = self

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(
                self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
            ) -> Any:
                given = {_storage(leaf)._cdata for leaf in tree_leaves((args, kwargs)) if _is_tensor(leaf)}
                out = func(*args, **(kwargs or {}))
                if (formula := flop_registry.get(_usual(func))) is not None:
                    counter.flops += formula(*args, **(kwargs or {}), out_val=out)
                for leaf in tree_leaves(out):
                    if _is_tensor(leaf) and _storage(leaf)._cdata not in given:
                        counter._add(leaf)
                return out

        self._mode = Mode()
        self._mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._mode.__exit__(*error)

    def _add(self, tensor: "Tensor") -> None:
        if self.device is not None and tensor.device.type != self.device:
            return
        storage = _storage(tensor)
        name, size = storage._cdata, storage.nbytes()
        if name not in self._known:
            self._known.add(name)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._drop, name, size)

    def _drop(self, name: int, size: int) -> None:
        self._known.discard(name)
        self.live -= size


def _usual(func: Any) -> Any:
    """The operator by the name that PyTorch's table of operations has it under: not in place, not a CPU's."""
    import torch

    name = func.overloadpacket.__name__.replace("_for_cpu", "").removesuffix("_")
    return getattr(torch.ops.aten, name, None) if func.namespace == "aten" else func.overloadpacket


def _is_tensor(leaf: Any) -> bool:
    import torch

    return isinstance(leaf, torch.Tensor)


def _storage(tensor: "Tensor") -> Any:
    return tensor.untyped_storage()
