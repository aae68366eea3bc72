"""The head of a model: from its last hidden states to its logits."""

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from teq.models.arch import Arch, blocks
from teq.models.blocks import bypassed, one_sequence_a_row
from teq.spec import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHAPING = ("logits_scaling", "final_logit_softcapping")  # of a configuration


@dataclass(frozen=True)
class Head:
    """Output embeddings `weight [vocab, width]` and `bias`, and what is done to the logits afterwards.

    They are divided by `divisor` (Granite's logits_scaling), then z becomes `cap * tanh(z / cap)` (Gemma's
    final_logit_softcapping).
    """

    weight: Tensor
    bias: Tensor | None = None
    divisor: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, model: "PreTrainedModel") -> "Head":
        """Return a model's head, as its configuration describes it."""
        embeddings = model.get_output_embeddings()
        divisor, cap = (getattr(model.config, key, None) for key in SHAPING)
        return cls(embeddings.weight, embeddings.bias, divisor or 1.0, cap)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits `[..., vocab]` of hidden states `[..., width]`, in the model's dtype."""
        logits = functional.linear(hidden, self.weight, self.bias)
        if self.divisor != 1:
            logits = logits / self.divisor
        return logits if self.cap is None else (logits / self.cap).tanh_().mul_(self.cap)

    def log_probabilities(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the logarithms of the next token's distribution `[..., vocab]` in fp32.

        Also return the cap's derivative at each logit, `1 - (logit / cap)^2`; None without a cap.
        """
        logits = self.logits(hidden).float()
        logs = logits.log_softmax(-1)
        return logs, None if self.cap is None else logits.div_(self.cap).square_().neg_().add_(1)

    def back(self, gradient: Tensor, slope: Tensor | None) -> Tensor:
        """Return the gradient to the hidden states from that to the logits `[..., vocab]`, which is used up.

        `slope` is the cap's derivative, as `log_probabilities` gives it.
        """
        if slope is not None:
            gradient.mul_(slope)
        if self.divisor != 1:
            gradient.div_(self.divisor)
        return gradient.to(self.weight.dtype) @ self.weight


def check_head(model: "nn.Module", arch: Arch | None) -> None:
    """Raise UserError if the model's logits are not the `Head`'s of its last hidden states.

    Where the family is known, only the first block computes.
    """
    tokens = torch.arange(8, device=model.get_input_embeddings().weight.device)[None]
    short = contextlib.nullcontext() if arch is None else bypassed(blocks(model, arch).values())
    with one_sequence_a_row(), torch.no_grad(), short:
        expected = model(tokens, use_cache=False).logits
        made = Head.of(model).logits(model.base_model(tokens, use_cache=False)[0])
    tolerance = 1e-3 * float(expected.abs().max())
    if not torch.allclose(made, expected, rtol=1e-3, atol=tolerance, equal_nan=True):
        raise UserError(
            f"{type(model).__name__} does more to its logits than its output embeddings and "
            f"{', '.join(SHAPING)} do: neither the training loss nor tasks can be computed from its hidden "
            "states; choose method=rtn, gptq, awq or smoothquant, finetune=none, and evals of perplexity"
        )
