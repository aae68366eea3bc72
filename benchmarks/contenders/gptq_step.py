"""GPTQ over the first blocks of a model, as a contender for `benchmarks.contenders.worker`."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from teq.models.checkpoint import LM
from teq.quantizers.gptq.settings import Gptq

BLOCKS = 2  # the second reads what the first, quantized, puts out, as every later one does


class GptqBlocks:
    """`step` quantizes `BLOCKS` blocks on the tokens given; their weights are put back first."""

    def __init__(self, lm: LM, settings: Gptq) -> None:
        self.lm, self.settings = lm, settings
        self.stack = lm.model.get_submodule(lm.arch.blocks)
        del self.stack[BLOCKS:]
        self.kept = {name: p.detach().clone() for name, p in self.stack.named_parameters()}

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """There is nothing to put in place."""
        yield

    @torch.no_grad()
    def step(self, tokens: Tensor) -> float:
        """Quantize on `tokens [sample, token]`; returns the blocks' error, summed over what has one."""
        for name, parameter in self.stack.named_parameters():
            parameter.copy_(self.kept[name])
        _, info = self.settings.quantize_on(self.lm, {}, tokens)
        return sum(entry.get("error", 0.0) for entry in info["gptq"].values())
