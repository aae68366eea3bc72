"""The transform that does nothing: plain RTN, plain GPTQ, the floating-point baseline."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from teq.spec import Runtime, Settings
from teq.stage import Load, OnStep

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Identity(Settings):
    """No scales."""

    def corpus(self) -> None:
        """Reads no text."""

    def fit(
        self, load: Load, runtime: Runtime, on_step: OnStep
    ) -> tuple[dict[str, "Tensor"], dict[str, Any]]:
        """No scales, and no need to load the model for them."""
        return {}, {}
