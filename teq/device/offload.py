"""Frozen blocks that live in the host's memory and visit the device, one ahead of use."""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from teq.models.arch import Arch, blocks


def place_around_blocks(model: nn.Module, arch: Arch, device: str) -> None:
    """Move everything but the blocks (embeddings, last norm, head) to `device`."""
    inside = {
        id(t) for block in blocks(model, arch).values() for t in (*block.parameters(), *block.buffers())
    }
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
                for parameter in block.parameters():
                    parameter.data = parameter.data.cpu().pin_memory()
        self.order = [*range(len(parts)), *reversed(range(len(parts)))]
        self.position = 0
        self.ahead: dict[int, dict[str, Tensor]] = {}

    def run(self, index: int, *args: Any, **kwargs: Any) -> Any:
        """The output of block `index`."""
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
        """The block's parameters on the device; the copy runs beside the computation."""
        beside = contextlib.nullcontext()
        if self.side is not None:
            # the copy may take the memory of a block that is done with: whatever was to be computed with that
            # one was asked for before, and is waited for here. So no copy needs memory of its own while the
            # host runs ahead of the device
            self.side.wait_stream(torch.cuda.current_stream(self.device))
            beside = torch.cuda.stream(self.side)
        with beside, torch.no_grad():
            return {
                name: parameter.to(self.device, non_blocking=True, copy=True)
                for name, parameter in self.shells[index].named_parameters()
            }


class _Shell(nn.Module):
    """A block under its class's own forward, which `functional_call` can be given other parameters for."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.block).forward(self.block, *args, **kwargs)
