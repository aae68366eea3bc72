"""Memory of a device: what may be used, how much tensors take, and what to do when it runs out."""

import gc
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from teq.device import host_memory
from teq.device.runtime import STRATEGIES, Runtime
from teq.files.disk import one_line
from teq.spec import UserError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
log = logging.getLogger(__name__)
UNITS = {"MB": 10**6, "GB": 10**9}
RESERVE = 0.9  # of the free memory may be planned with: allocators round up and fragment


def budget(memory: str, device: str) -> int:
    """Return the bytes that may be used; `auto` is nine tenths of what is free on the device.

    On a CPU that is what the host has free and its cgroups leave. Raises UserError when `memory` is no
    amount.
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
    """Raise UserError if `memory` is neither a strategy, nor auto, nor an amount."""
    if memory not in STRATEGIES and memory != "auto":
        _bytes(memory)


def fits(bytes_more: int, held: int, runtime: Runtime) -> bool:
    """Return whether so many bytes may be allocated on the device, where a model of `held` bytes is already.

    A CPU's own memory cannot be relieved by itself: there they always do.
    """
    if runtime.device == "cpu":
        return True
    if runtime.memory in STRATEGIES:
        return runtime.memory not in ("offload", "stream")
    return bytes_more + (0 if runtime.memory == "auto" else held) <= budget(runtime.memory, runtime.device)


def possible(strategies: Iterable[str], device: str) -> list[str]:
    """Return those of a stage's strategies that help on a device: to offload from a CPU does not."""
    return [each for each in strategies if each != "offload" or device.startswith("cuda")]


def attempt(work: Callable[[str], T], strategy: str, possible: Sequence[str], advice: str) -> T:
    """Return `work(strategy)`; where memory runs out, retry once with the next of the `possible` strategies.

    Raises UserError, which gives the `advice`, when that does not do either.
    """
    following = [each for each in possible if STRATEGIES.index(each) > STRATEGIES.index(strategy)]
    try:
        return work(strategy)
    except RuntimeError as error:
        if not exhausted(error):
            raise
        said = one_line(error)
    # not inside the handler: the error's traceback holds the very tensors that filled the memory
    if following:
        log.warning("memory ran out with strategy %s (%s): going on with %s", strategy, said, following[0])
        try:
            return work(following[0])
        except RuntimeError as error:
            if not exhausted(error):
                raise
    raise UserError(
        f"memory ran out with strategy {(*following, strategy)[0]} ({said}): what was finished is kept; "
        f"{advice}, or choose a larger device"
    )


@dataclass(frozen=True)
class Estimate:
    """What some work takes: peak bytes of live tensors on the device, weights included, and operations."""

    bytes: int
    flops: int
    movable: int = 0  # of the bytes: what may wait in the host's memory instead


def exhausted(error: BaseException) -> bool:
    """Return whether this is a device's or the CPU allocator's out-of-memory error."""
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


def on_host(tensors: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    """Return copies of fp32 tensors in host memory, made in one transfer: each one waits for the device."""
    import torch

    if not tensors:
        return {}
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()]).cpu()
    parts = flat.split([tensor.numel() for tensor in tensors.values()])
    return {
        name: part.view(tensor.shape).clone()
        for (name, tensor), part in zip(tensors.items(), parts, strict=True)
    }
