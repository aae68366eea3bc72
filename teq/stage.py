"""Transforms: what is done to a model, without changing its function, before it is quantized.

A transform is frozen settings with `fit(load, runtime, on_step) -> (tensors, info)`: tensors hold a positive
vector per site under the site's name (and, beside it, whatever else is worth keeping under a name with a
prefix and a slash). Beside them `clip/<linear>` may bound the folded weights that are quantized.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from teq.models.arch import CLIP
from teq.spec import Runtime, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from teq.models.checkpoint import LM

Load = Callable[[], "LM"]
OnStep = Callable[[int, float], None]


class NothingDone(UserError):
    """A stage that ran and changed nothing: an error, because its numbers would look like a result."""


class Diverged(UserError):
    """Training met a loss that is not finite. `tensors` holds the scales so far."""

    def __init__(self, message: str, tensors: dict[str, "Tensor"]) -> None:
        super().__init__(message)
        self.tensors = tensors


class Transform(Protocol):
    """What the pipeline asks of a transform."""

    def plain(self) -> dict[str, Any]: ...

    def corpus(self) -> str | None:
        """The name of the calibration text it reads, or None."""

    def fit(
        self, load: Load, runtime: Runtime, on_step: OnStep
    ) -> tuple[Mapping[str, "Tensor"], dict[str, Any]]: ...


def site_scales(tensors: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    """The scale vectors of a fitted transform by site, without what was kept beside them."""
    return {name: tensor for name, tensor in tensors.items() if "/" not in name}


def folded(tensors: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    """What a quantizer takes of a fitted transform: the scale vectors by site, and the bounds of weights."""
    return site_scales(tensors) | {name: t for name, t in tensors.items() if name.startswith(CLIP)}


def on_host(tensors: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    """Copies of fp32 tensors in the host's memory, made in one transfer: each waits for the device."""
    import torch

    if not tensors:
        return {}
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()]).cpu()
    parts = flat.split([tensor.numel() for tensor in tensors.values()])
    return {
        name: part.view(tensor.shape).clone()
        for (name, tensor), part in zip(tensors.items(), parts, strict=True)
    }
