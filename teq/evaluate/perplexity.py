"""Perplexity: exp of the mean token loss over non-overlapping windows."""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from teq import corpora
from teq.evaluate import Metric
from teq.progress import track
from teq.spec import Runtime, Settings, UserError, option

if TYPE_CHECKING:
    from torch import Tensor, nn

    from teq.models import LM


@dataclass(frozen=True, kw_only=True)
class Perplexity(Settings):
    """Non-overlapping windows of `context` tokens of a corpus, the first `limit` of them (all when null)."""

    group = "ppl"
    corpus: str
    context: int = option(at_least=2)
    limit: int | None = option(None, at_least=1)

    @property
    def name(self) -> str:
        """What records and tables call it."""
        return self.corpus

    def provenance(self) -> dict[str, Any]:
        """What identifies the text; enters the stage's key."""
        return corpora.provenance(self.corpus)

    def measure(self, lm: "LM", runtime: Runtime) -> Metric:
        """`ppl`, the per-window mean token losses `window_loss`, and the hash of the tokens they were measured on."""
        import numpy as np
        import torch

        stream = corpora.evaluation_stream(self.corpus, lm.tokenizer)
        count = len(stream) // self.context
        if count == 0:
            raise UserError(
                f"{self.corpus} gives {len(stream)} tokens, one window of ppl.context={self.context} needs more: "
                "choose a smaller ppl.context"
            )
        count = min(count, self.limit or count)
        windows = stream[: count * self.context].view(count, self.context)
        with torch.inference_mode():
            losses = [
                window_loss(lm.model, windows[i : i + 1].to(lm.device)).item()
                for i in track(range(count), f"perplexity {self.corpus}")
            ]
        if not np.isfinite(losses).all():
            raise UserError(
                f"the loss on {self.corpus} is not finite in window {int(np.argmin(np.isfinite(losses)))}"
            )
        tokens = hashlib.sha256(windows.to(torch.int64).numpy().tobytes()).hexdigest()
        return Metric(
            values={"ppl": float(np.exp(np.mean(losses)))},
            arrays={"window_loss": np.asarray(losses, dtype=np.float64)},
            info={"windows": count, "context": self.context, "tokens_sha256": tokens, **self.provenance()},
        )


def window_loss(model: "nn.Module", window: "Tensor") -> "Tensor":
    """The mean next-token cross-entropy of `window [1, token]`, in fp32 whatever the model's dtype."""
    from torch.nn import functional

    logits = model(window, use_cache=False).logits  # [1, token, vocab]
    return functional.cross_entropy(logits[0, :-1].float(), window[0, 1:])
