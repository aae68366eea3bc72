"""Perplexity: exp of the mean token loss over windows of a text; there also KL from the float model."""

import functools
import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from teq import data, statistics
from teq.console import track
from teq.device.runtime import Runtime
from teq.device.waiting import places
from teq.files.resume import BlockFiles, Journal
from teq.models.arch import blocks
from teq.models.blocks import bypassed, first_inputs, pass_on
from teq.models.lazy import is_lazy
from teq.spec import UserError, option
from teq.stage import Evaluation, Metric

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from teq.models.checkpoint import LM

PASS = 2 * 10**9  # bytes of hidden states for which a lazy model is read once
CHUNK = 32  # positions whose distributions are compared at once: on a CPU they stay in its cache


@dataclass(frozen=True, kw_only=True)
class Perplexity(Evaluation):
    """At most `limit` (all when null) of the windows of `context` tokens that the protocol `corpus` cuts.

    `windows` even spaces them evenly over the text; first takes those at its beginning, as records before
    this option did. Where both are the same (all windows, or the random draws of c4) the setting is `first`.
    With `kl` each window is also compared with the float model; see `compare_window`.
    """

    group = "ppl"
    corpus: str = option(among=data.PERPLEXITY)
    context: int = option(at_least=2)
    limit: int | None = option(None, at_least=1)
    windows: str = option("first", among=("even", "first"), omitted="first")
    kl: bool = option(False, omitted=False)

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

    @property
    def needs_reference(self) -> bool:
        """Return whether the float model's hidden states are needed."""
        return self.kl

    def reference(self, lm: "LM", runtime: Runtime) -> dict[str, "Tensor"]:
        """Return what the output embeddings of the float model read in each window.

        These are `[1, token, width]`: logits would take vocabulary / width times as much room, and their
        largest alone would give no more than a bound of the divergence.
        """
        import torch

        windows, found = self._checked_windows(lm)[0], {}
        files = BlockFiles(runtime.partial, f"the reference on {self.corpus}")
        while (kept := files.read(len(found))) is not None:
            found |= kept[0]
        with torch.inference_mode():
            for i, window in passes(lm, windows, len(found), f"reference {self.corpus}"):
                made = {f"window-{i:05d}": head_input(lm.model, window).cpu()}
                found |= files.write(i, made, {})
        return found

    def measure(self, lm: "LM", runtime: Runtime, reference: Mapping[str, "Tensor"] | None = None) -> Metric:
        """Return `ppl`, the mean token losses `window_loss` of the windows, and the hash of their tokens.

        `bits_per_byte` is the same loss per byte of text, which compares models of different tokenizers.
        With a `reference` also `kl` and `top1` (a share), the means of `window_kl` and `window_top1`.
        """
        import numpy as np
        import torch

        windows, available = self._checked_windows(lm)
        names = ("window_loss",) if reference is None else ("window_loss", "window_kl", "window_top1")
        journal = Journal(runtime.partial and runtime.partial / "windows.jsonl", f"perplexity {self.corpus}")
        rows = list(journal.entries)
        with torch.inference_mode():
            for i, window in passes(lm, windows, len(rows), f"perplexity {self.corpus}"):
                if reference is None:
                    rows.append(window_loss(lm.model, window).item())
                else:
                    exact = reference[f"window-{i:05d}"].to(lm.device)
                    rows.append(compare_window(lm.model, window, exact).tolist())
                journal.append(rows[-1])
        columns = np.asarray(rows, dtype=np.float64).reshape(len(rows), len(names))
        finite = np.isfinite(columns).all(axis=1)
        if not finite.all():
            raise UserError(f"the loss on {self.corpus} is not finite in window {int(np.argmin(finite))}")
        tokens = hashlib.sha256(windows.to(torch.int64).numpy().tobytes()).hexdigest()
        counts = {"windows": len(windows), "available_windows": available, "context": self.context}
        means = {name.removeprefix("window_"): float(columns[:, i].mean()) for i, name in enumerate(names)}
        del means["loss"]
        nats = columns[:, 0].mean() * (self.context - 1)  # of a window
        per_byte = float(nats / math.log(2) / bytes_of(windows, lm.tokenizer))
        return Metric(
            values={"ppl": statistics.perplexity(columns[:, 0]), "bits_per_byte": per_byte, **means},
            arrays={name: columns[:, i].copy() for i, name in enumerate(names)},
            info={**counts, "tokens_sha256": tokens, **self.provenance()},
        )

    def _checked_windows(self, lm: "LM") -> tuple["Tensor", int]:
        """Return the windows and how many there are in all. Raises UserError for those that are too long."""
        positions = getattr(lm.model.config, "max_position_embeddings", None)
        if positions is not None and self.context > positions:
            raise UserError(f"ppl.context={self.context} is not allowed: the model has {positions} positions")
        return self._windows(lm.tokenizer)

    def check_text(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Raise UserError if the text does not give a single window."""
        self._windows(tokenizer)

    def _windows(self, tokenizer: "PreTrainedTokenizerBase") -> tuple["Tensor", int]:
        return data.windows(self.corpus, tokenizer, self.context, self.limit, even=self.windows == "even")

    def dry_reference(self, lm: "LM", strategy: str) -> None:
        """Run one window of the float model; the hidden states of all windows are mapped from files."""
        import torch

        with torch.no_grad():
            window = torch.zeros(1, self.context, dtype=torch.int64, device=lm.device)
            head_input(lm.model, window)

    def dry_run(self, lm: "LM", strategy: str) -> None:
        """Run one window."""
        import torch

        with torch.no_grad():  # in inference mode a linear is one operator, whose operations nobody counts
            window = torch.zeros(1, self.context, dtype=torch.int64, device=lm.device)
            if self.kl:
                exact = head_input(lm.model, window[:, :1]).expand(-1, self.context, -1)
                compare_window(lm.model, window, exact)
            else:
                window_loss(lm.model, window)


def passes(lm: "LM", windows: "Tensor", first: int, what: str) -> "Iterator[tuple[int, Tensor]]":
    """Yield each index from `first` on and its window `[1, token]`, on the model's device.

    A lazy model is read once for as many windows as `PASS` bytes of hidden states hold, which wait in the
    host's memory or in a file; while a window is with the caller, the blocks put out what they do for it.
    """
    if not is_lazy(lm.model):
        for i in track(range(first, len(windows)), what):
            yield i, windows[i : i + 1].to(lm.device)
        return
    every = list(blocks(lm.model, lm.arch).values())
    size = windows.shape[1] * lm.model.config.hidden_size * lm.model.dtype.itemsize
    count, host = max(1, PASS // size), functools.partial(places, "cpu")
    for start in range(first, len(windows), count):
        hidden, keywords = first_inputs(lm.model, lm.arch, windows[start : start + count], host)
        where = f"{what}, blocks for {len(hidden)} windows from {start} on"
        for block, kwargs in zip(track(every, where), keywords, strict=True):
            in_tuple = pass_on(block, hidden, kwargs, lm.device)
        for i in range(start, start + len(hidden)):
            out = hidden.pop(0).to(lm.device)
            with bypassed(every, given=(out,) if in_tuple else out):
                yield i, windows[i : i + 1].to(lm.device)


def window_loss(model: "nn.Module", window: "Tensor") -> "Tensor":
    """Return the mean next-token cross-entropy of `window [1, token]`, always in fp32."""
    from torch.nn import functional

    from teq.models.blocks import one_sequence_a_row

    with one_sequence_a_row():
        logits = model(window, use_cache=False).logits  # [1, token, vocab]
    return functional.cross_entropy(logits[0, :-1].float(), window[0, 1:])


def bytes_of(windows: "Tensor", tokenizer: "PreTrainedTokenizerBase") -> float:
    """Return the mean UTF-8 bytes of the predicted text of `windows [window, token]`, without special tokens.

    A character that a window's edge cuts counts as the three bytes of a replacement character.
    """
    exact = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return sum(len(tokenizer.decode(w[1:], **exact).encode()) for w in windows) / len(windows)


def head_input(model: "nn.Module", window: "Tensor") -> "Tensor":
    """Return what the output embeddings read, `[1, token, width]`, for `window [1, token]`."""
    from teq.models.blocks import one_sequence_a_row

    caught: list[Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, read: caught.append(read[0]))
    with hook, one_sequence_a_row():
        model(window, use_cache=False)
    return caught[0]


def compare_window(model: "nn.Module", window: "Tensor", exact: "Tensor") -> "Tensor":
    """Return three means over the predicted tokens of `window [1, token]`, in fp32 `[3]`.

    They are the cross-entropy, KL(float || model) in nats, and the share of tokens of which both find the
    same one most probable (ties: the first). `exact [1, token, width]` is the float model's `head_input`: it
    runs through the head along with the model's own, and so through whatever the model does to its logits
    (scaling, capping). No stage changes the head, so that these are the float model's logits.
    """
    import torch

    from teq.models.blocks import one_sequence_a_row

    def append(_: "nn.Module", read: "tuple[Tensor, ...]") -> "tuple[Tensor, ...]":
        return (torch.cat([read[0], exact.to(read[0].dtype)], dim=1),)

    with model.get_output_embeddings().register_forward_pre_hook(append), one_sequence_a_row():
        logits = model(window, use_cache=False).logits[0]  # [2 token, vocab]
    count = window.shape[1] - 1
    ours, theirs = logits[:count], logits[count + 1 : -1]
    total = torch.zeros(3, device=logits.device)
    for q, p, target in zip(ours.split(CHUNK), theirs.split(CHUNK), window[0, 1:].split(CHUNK), strict=True):
        same = (q.argmax(-1) == p.argmax(-1)).sum()
        q, p = q.float().log_softmax(-1), p.float().log_softmax(-1)
        loss = -q.gather(1, target[:, None]).sum()
        weights, gaps = p.exp(), p.sub_(q)
        total += torch.stack([loss, torch.dot(weights.flatten(), gaps.flatten()), same])
    return total / count
