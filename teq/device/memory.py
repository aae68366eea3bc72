"""Memory of a device: what may be used, how much tensors take, and what to do when it runs out."""

import contextlib
import gc
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from teq.device import host_memory
from teq.device.runtime import STRATEGIES, Runtime
from teq.files.disk import one_line
from teq.spec import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn


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


def fits(bytes_more: int, model: "nn.Module", runtime: Runtime) -> bool:
    """Return whether so many bytes may be allocated on the device, where a model is already.

    A CPU's own memory cannot be relieved by itself: there they always do.
    """
    if runtime.device == "cpu":
        return True
    if runtime.memory in STRATEGIES:
        return runtime.memory != "offload"
    weights = 0 if runtime.memory == "auto" else sum(p.nbytes for p in model.parameters())
    return weights + bytes_more <= budget(runtime.memory, runtime.device)


def possible(device: str) -> tuple[str, ...]:
    """Return the strategies that help on a device: a CPU's own memory cannot be relieved by itself."""
    return STRATEGIES if device.startswith("cuda") else STRATEGIES[:2]


@contextlib.contextmanager
def explained(doing: str, device: str) -> Iterator[None]:
    """Context manager: turn a GPU's out-of-memory error in a whole-model stage into a UserError."""
    try:
        yield
    except RuntimeError as error:
        if device == "cpu" or not exhausted(error):
            raise
        raise UserError(
            f"the memory of {device} ran out while {doing}, which holds the whole model there: "
            "what was finished is kept, the same command with device=cpu goes on from it"
        ) from None


def attempt(work: Callable[[str], T], strategy: str, device: str, group: str = "train") -> T:
    """Return `work(strategy)`; where memory runs out, retry once with the next strategy that helps.

    Raises UserError, which names an option of the work's `group`, when that does not do either.
    """
    following = [s for s in possible(device) if STRATEGIES.index(s) > STRATEGIES.index(strategy)]
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
        f"memory ran out with strategy {(*following, strategy)[0]} ({said}): what was trained is kept; "
        f"give a smaller memory=<amount>, shorten {group}.length, or choose a larger device"
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
