"""The quantizer that keeps floating point: the baseline, or a transform's folded model as it is."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from teq.models.arch import Folding, blocks, linears, sites
from teq.spec import Runtime, Settings
from teq.stage import Load

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Keep(Settings):
    """No grid."""

    grid: None = None

    def corpus(self) -> None:
        """Reads no text."""

    def quantize(
        self, load: Load, scales: Mapping[str, "Tensor"], runtime: Runtime
    ) -> tuple[dict[str, "Tensor"], dict[str, Any]]:
        """Every parameter that folding changes, in floating point; none without scales."""
        if not scales:
            return {}, {}
        lm = load()
        found = sites(lm.model, lm.arch)
        folding, changed = Folding.of(found, scales), {}
        for site in found:
            changed |= folding.divided(site.name, site.source)
        for block_name, block in blocks(lm.model, lm.arch).items():
            for name, linear in linears(block_name, block).items():
                changed[f"{name}.weight"] = folding.weight(name, linear).to(linear.weight.dtype)
        return {f"param/{name}": value for name, value in changed.items()}, {}
