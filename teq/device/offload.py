"""Memory of a training step: checkpointed blocks, and their CPU offload with prefetch of the next one."""

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

ALIGNMENT = 512  # bytes at which a parameter begins, as the allocator's own do


@contextlib.contextmanager
def saving(blocks: Iterable[nn.Module], strategy: str, device: torch.device) -> Iterator[None]:
    """Context manager: what the backward pass of a block needs takes less memory under the `strategy`.

    It is kept (`keep`) or computed again from the block's input (`checkpoint`); with `offload` the block's
    parameters are copied to the device for that as well.
    """
    parts = [] if strategy == "keep" else list(blocks)
    stream = Stream(parts, device) if strategy == "offload" else None
    own = [vars(block).get("forward") for block in parts]
    try:
        for index, block in enumerate(parts):
            inner = block.forward if stream is None else functools.partial(stream.run, index)
            block.forward = functools.partial(checkpoint, inner, use_reentrant=False)
        yield
    finally:
        for block, forward in zip(parts, own, strict=True):
            vars(block).pop("forward", None)
            if forward is not None:
                block.forward = forward


def place_around_blocks(model: nn.Module, blocks: Iterable[nn.Module], device: str) -> None:
    """Move everything but the `blocks` (embeddings, last norm, head) to `device`."""
    inside = {id(t) for block in blocks for t in (*block.parameters(), *block.buffers())}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in inside:
            tensor.data = tensor.data.to(device)


class Stream:
    """Runs blocks whose parameters stay where they are (pinned, for a GPU) on copies made on `device`.

    While a block runs, the next one is copied: forward first to last, then, as every block is run again for
    its backward pass, last to first. A copy lives as long as something refers to it, so at most the present
    block, the next one and the one whose gradient is being computed are on the device.
    """

    def __init__(self, parts: list[nn.Module], device: torch.device) -> None:
        self.device = device
        self.shells = [_Shell(block) for block in parts]
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        for block in parts:
            for buffer in block.buffers():
                buffer.data = buffer.data.to(device)
            if self.side is not None:
                pin(block)
        self.order = [*range(len(parts)), *reversed(range(len(parts)))]
        self.position = 0
        self.ahead: dict[int, dict[str, Tensor]] = {}

    def run(self, index: int, *args: Any, **kwargs: Any) -> Any:
        """Return the output of block `index`."""
        return functional_call(self.shells[index], self._fetched(index), args, kwargs)

    def _fetched(self, index: int) -> dict[str, Tensor]:
        if self.order[self.position] != index:  # a forward pass that had no backward pass came before
            self.position = index
        present = self.ahead.pop(index, None) or self._copied(index)
        self.ahead.clear()
        if self.side is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.side)
        self.position = (self.position + 1) % len(self.order)
        follower = self.order[self.position]
        self.ahead[follower] = present if follower == index else self._copied(follower)
        return present

    def _copied(self, index: int) -> dict[str, Tensor]:
        """Return the block's parameters on the device; the copy overlaps with the computation."""
        overlapping = contextlib.nullcontext()
        if self.side is not None:
            # the copy may reuse a finished block's memory, so it first waits for the kernels that read it;
            # this also keeps the host from running ahead of the device
            self.side.wait_stream(torch.cuda.current_stream(self.device))
            overlapping = torch.cuda.stream(self.side)
        with overlapping, torch.no_grad():
            return {
                name: parameter.to(self.device, non_blocking=True, copy=True)
                for name, parameter in self.shells[index].named_parameters()
            }


def pin(block: nn.Module) -> None:
    """Move the parameters of a block to pinned host memory, in one allocation, unless they are there."""
    parameters = list(block.parameters())
    if all(parameter.is_pinned() for parameter in parameters):
        return
    offsets = [0]
    for parameter in parameters:
        offsets.append(offsets[-1] + -(-parameter.nbytes // ALIGNMENT) * ALIGNMENT)
    flat = torch.empty(offsets[-1], dtype=torch.uint8, pin_memory=True)
    for parameter, start in zip(parameters, offsets, strict=False):
        place = flat[start : start + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
        parameter.data = place.copy_(parameter.data)


class _Shell(nn.Module):
    """A block under its class's own forward, which `functional_call` can be given other parameters for."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.block).forward(self.block, *args, **kwargs)
