"""What an export writes: known from settings and shapes before a weight is read, then part by part."""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from teq.grid import Grid
from teq.models.arch import blocks, linears
from teq.models.checkpoint import Checkpoint
from teq.models.synthetic import skeleton
from teq.quantizers.quantized import Quantized, linear_from

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Part:
    """A decoder block, or everything outside the blocks: quantized linears and other tensors by full name."""

    linears: dict[str, Quantized]
    others: "dict[str, Tensor]"


@dataclass(frozen=True)
class Plan:
    """A quantized model to be exported; `reordered` says that its columns have an order of their own."""

    checkpoint: Checkpoint
    dtype: str
    grid: Grid
    reordered: bool

    @functools.cached_property
    def outline(self) -> "PreTrainedModel":
        """Return the model without weights."""
        return skeleton(self.checkpoint.source.dimensions())

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Return the shape [out, in] of each quantized linear."""
        inside = (linears(*block) for block in blocks(self.outline, self.checkpoint.arch).items())
        return {name: tuple(linear.weight.shape) for found in inside for name, linear in found.items()}

    @property
    def kept(self) -> list[str]:
        """Return the names of the linears that are not quantized."""
        every = (name.removeprefix(".") for name in linears("", self.outline))
        return [name for name in every if name not in self.shapes]

    @functools.cached_property
    def names(self) -> list[list[str]]:
        """Return the names of all tensors, tied ones once: those outside the blocks, then each block's."""
        first: dict[int, str] = {}
        for name, tensor in self.outline.state_dict(keep_vars=True).items():
            first.setdefault(id(tensor), name)
        inside = [f"{block}." for block in blocks(self.outline, self.checkpoint.arch)]
        rest = [name for name in first.values() if not name.startswith(tuple(inside))]
        return [rest, *([n for n in first.values() if n.startswith(block)] for block in inside)]

    def parts(self, weights: Path) -> Iterator[Part]:
        """Yield the part outside the blocks, then block after block; `weights` is the artefact's file."""
        from safetensors import safe_open

        source = self.checkpoint.source.tensors(self.dtype)
        with safe_open(weights, "pt") as file:
            stored = set(file.keys())

            def read(name: str) -> "Tensor":
                changed = f"param/{name}"
                return file.get_tensor(changed) if changed in stored else source[name]

            for names in self.names:
                inside = {name.removesuffix(".weight") for name in names} & self.shapes.keys()
                yield Part(
                    {name: self._linear(file, name, stored) for name in self.shapes if name in inside},
                    {name: read(name) for name in names if name.removesuffix(".weight") not in inside},
                )

    def _linear(self, file: "Mapping[str, Tensor]", name: str, stored: set[str]) -> Quantized:
        """Return a linear of the artefact, without an order of columns that is the natural one."""
        import torch

        keys = [f"{name}/{part}" for part in ("codes", "scale", "zero", "g_idx")]
        tensors = {key: file.get_tensor(key) for key in keys if key in stored}
        linear = linear_from(tensors, name, self.grid, self.shapes[name])
        if linear.g_idx is None:
            return linear
        columns = len(linear.g_idx)
        natural = torch.arange(columns) // self.grid.width(columns)
        if torch.equal(linear.g_idx.long(), natural):
            return Quantized(linear.codes, linear.scale, linear.zero)
        assert self.reordered, name
        return linear
