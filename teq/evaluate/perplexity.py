"""Perplexity: exp of the mean token loss over windows of a text."""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from teq import data, statistics
from teq.console import track
from teq.device.runtime import Runtime
from teq.files.resume import Journal
from teq.spec import UserError, option
from teq.stage import Evaluation, Metric

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from teq.models.checkpoint import LM


@dataclass(frozen=True, kw_only=True)
class Perplexity(Evaluation):
    """At most `limit` (all when null) of the windows of `context` tokens that the protocol `corpus` cuts.

    `windows` even spaces them evenly over the text; first takes those at its beginning, as records before
    this option did. Where both are the same (all windows, or the random draws of c4) the setting is `first`.
    """

    group = "ppl"
    corpus: str = option(among=data.PERPLEXITY)
    context: int = option(at_least=2)
    limit: int | None = option(None, at_least=1)
    windows: str = option("even", among=("even", "first"), omitted="first")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.limit is None or self.corpus == "c4":
            object.__setattr__(self, "windows", "first")

    @property
    def name(self) -> str:
        """Return what records and tables call it."""
        return self.corpus

    def provenance(self) -> dict[str, Any]:
        """Return what identifies the text; enters the stage's key."""
        return data.provenance(self.corpus)

    def measure(self, lm: "LM", runtime: Runtime) -> Metric:
        """Return `ppl`, the mean token losses `window_loss` of the windows, and the hash of their tokens."""
        import numpy as np
        import torch

        positions = getattr(lm.model.config, "max_position_embeddings", None)
        if positions is not None and self.context > positions:
            raise UserError(f"ppl.context={self.context} is not allowed: the model has {positions} positions")
        windows, available = self._windows(lm.tokenizer)
        journal = Journal(runtime.partial and runtime.partial / "windows.jsonl", f"perplexity {self.corpus}")
        losses = list(journal.entries)
        with torch.inference_mode():
            for i in track(range(len(losses), len(windows)), f"perplexity {self.corpus}"):
                losses.append(window_loss(lm.model, windows[i : i + 1].to(lm.device)).item())
                journal.append(losses[-1])
        if not np.isfinite(losses).all():
            raise UserError(
                f"the loss on {self.corpus} is not finite in window {int(np.argmin(np.isfinite(losses)))}"
            )
        tokens = hashlib.sha256(windows.to(torch.int64).numpy().tobytes()).hexdigest()
        counts = {"windows": len(windows), "available_windows": available, "context": self.context}
        return Metric(
            values={"ppl": statistics.perplexity(losses)},
            arrays={"window_loss": np.asarray(losses, dtype=np.float64)},
            info={**counts, "tokens_sha256": tokens, **self.provenance()},
        )

    def check_text(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Raise UserError if the text does not give a single window."""
        self._windows(tokenizer)

    def _windows(self, tokenizer: "PreTrainedTokenizerBase") -> tuple["Tensor", int]:
        return data.windows(self.corpus, tokenizer, self.context, self.limit, even=self.windows == "even")

    def dry_run(self, lm: "LM", strategy: str) -> None:
        """Run one window."""
        import torch

        with torch.no_grad():  # in inference mode a linear is one operator, whose operations nobody counts
            window_loss(lm.model, torch.zeros(1, self.context, dtype=torch.int64, device=lm.device))


def window_loss(model: "nn.Module", window: "Tensor") -> "Tensor":
    """Return the mean next-token cross-entropy of `window [1, token]`, always in fp32."""
    from torch.nn import functional

    from teq.models.blocks import one_sequence_a_row

    with one_sequence_a_row():
        logits = model(window, use_cache=False).logits  # [1, token, vocab]
    return functional.cross_entropy(logits[0, :-1].float(), window[0, 1:])
