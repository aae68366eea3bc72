"""What a record keeps of trained scales: their histograms and how far they moved."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from teq.models.fold import site_scales

if TYPE_CHECKING:
    from torch import Tensor

BINS = 64
NEAR = (0.75, 1.25)  # the range around the start in which the paper finds most scales


def summaries(tensors: Mapping[str, "Tensor"]) -> dict[str, Any]:
    """Return by site histograms of s and of s / s0, and the share of s / s0 within `NEAR`.

    A histogram has lowest, highest and counts.
    """
    found = {}
    for name, s in site_scales(tensors).items():
        moved = s / tensors.get(f"start/{name}", 1.0)
        near = ((moved >= NEAR[0]) & (moved <= NEAR[1])).float().mean()
        found[name] = {
            "s": _histogram(s),
            "moved": _histogram(moved),
            "near": float(near),
            "channels": s.numel(),
        }
    return found


def _histogram(values: "Tensor") -> dict[str, Any]:
    counts, edges = values.detach().cpu().double().histogram(BINS)
    return {"lowest": float(edges[0]), "highest": float(edges[-1]), "counts": counts.int().tolist()}
