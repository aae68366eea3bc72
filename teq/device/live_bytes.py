"""Bytes of live tensors and operations of matrix products, counted while work runs."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class LiveBytes(TorchDispatchMode):
    """Context manager: counts the bytes of the tensors that operators make, while they live, and their peak.

    Works on fake tensors and on real ones; what a fused kernel allocates and frees inside itself is not seen.
    `flops` are the operations of the matrix products. Where a `device` is given, tensors elsewhere are not
    counted.
    """

    def __init__(self, device: str | None = None) -> None:
        super().__init__()
        self.device = device
        self.live = self.peak = self.flops = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operator and count what it makes."""
        leaves = tree_leaves((args, kwargs))
        given = {leaf.untyped_storage()._cdata for leaf in leaves if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(_registered(func))) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given:
                self._add(leaf)
        return out

    def count(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that are there already, as long as they live."""
        for tensor in tensors:
            self._add(tensor)

    def _add(self, tensor: Tensor) -> None:
        if self.device is not None and tensor.device.type != self.device:
            return
        storage = tensor.untyped_storage()
        name, size = storage._cdata, storage.nbytes()
        if name not in self._known:
            self._known.add(name)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._drop, name, size)

    def _drop(self, name: int, size: int) -> None:
        self._known.discard(name)
        self.live -= size


def _registered(func: Any) -> Any:
    """Map in-place and CPU-specific operators to the one registered with PyTorch's FLOP counter."""
    name = func.overloadpacket.__name__.replace("_for_cpu", "").removesuffix("_")
    return getattr(torch.ops.aten, name, None) if func.namespace == "aten" else func.overloadpacket
