"""The transform that does nothing: plain RTN, plain GPTQ, the floating-point baseline."""

from dataclasses import dataclass

from teq.device.runtime import Runtime
from teq.stage import Load, Made, OnStep, Transform


@dataclass(frozen=True, kw_only=True)
class Identity(Transform):
    """No scales."""

    def fit(self, load: Load, runtime: Runtime, on_step: OnStep) -> Made:
        """Return no scales; the model is not loaded for them."""
        return {}, {}
