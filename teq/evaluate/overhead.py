"""What a folded transform costs at inference: nothing, shown on the model itself.

The architecture is made afresh from the model's configuration, as anyone would load it who never heard of
TEQ. Taking the folded parameters into it, name by name and shape by shape, proves that nothing was added;
both then run the same tokens in turn.
"""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from teq.device.runtime import Runtime
from teq.files.disk import one_line
from teq.spec import UserError, option
from teq.stage import Evaluation, Metric

if TYPE_CHECKING:
    import torch
    from torch import nn

    from teq.models.checkpoint import LM


@dataclass(frozen=True, kw_only=True)
class Overhead(Evaluation):
    """`repeats` pairs of forward passes of `length` tokens, after one pair that is not counted."""

    group = "overhead"
    name = "overhead"
    length: int = option(128, at_least=1)
    repeats: int = option(30, at_least=2)

    def measure(self, lm: "LM", runtime: Runtime) -> Metric:
        """Compare the folded model with a fresh one.

        Gives modules and parameters of both, `latency` (folded over fresh, the median of the pairs' ratios)
        and each pair's `ratio`. Raises UserError when a parameter does not fit, or layers were replaced.
        """
        import numpy as np
        import torch
        from transformers import AutoModelForCausalLM

        from teq.models.layers import replaced

        if (layer := replaced(lm.model)) is not None:
            raise UserError(
                f"overhead compares with the model as transformers makes it, which does not build {layer} "
                "of nn.Linear: leave it out of evals"
            )
        fresh = AutoModelForCausalLM.from_config(lm.model.config, dtype=lm.model.dtype).to(lm.device).eval()
        try:
            fresh.load_state_dict(lm.model.state_dict())
        except RuntimeError as error:
            raise UserError(
                f"the folded model is not of its original architecture: {one_line(error)}"
            ) from error
        tokens = torch.zeros((1, self.length), dtype=torch.long, device=lm.device)
        ratios = []
        with torch.inference_mode():
            for i in range(self.repeats + 1):
                order = [lm.model, fresh] if i % 2 else [fresh, lm.model]
                seconds = {id(model): _seconds(model, tokens) for model in order}
                ratios.append(seconds[id(lm.model)] / seconds[id(fresh)])
        values = {
            "modules": len(list(lm.model.modules())),
            "original_modules": len(list(fresh.modules())),
            "parameters": sum(p.numel() for p in lm.model.parameters()),
            "original_parameters": sum(p.numel() for p in fresh.parameters()),
            "latency": float(np.median(ratios[1:])),
        }
        return Metric(values, {"ratio": np.asarray(ratios[1:])}, {"length": self.length})


def _seconds(model: "nn.Module", tokens: "torch.Tensor") -> float:
    """Return the seconds of a forward pass of `tokens [1, token]`."""
    import torch

    start = time.perf_counter()
    model(tokens, use_cache=False)
    if tokens.is_cuda:
        torch.cuda.synchronize(tokens.device)
    return time.perf_counter() - start
