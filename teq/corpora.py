"""Text by name: the embedded corpus, token streams for evaluation, windows for calibration."""

import functools
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from teq.spec import Settings, UserError, option

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

CALIBRATION_END = 55_000  # of python-docs: tokens before it calibrate,
EVALUATION_START = 60_000  # tokens from here on evaluate; the gap keeps the two apart


@dataclass(frozen=True, kw_only=True)
class Calibration(Settings):
    """Which text calibrates, and which draw of it: seed 0 starts at the beginning."""

    group = "calib"
    corpus: str = "python-docs"
    pack: bool = True
    seed: int = option(0, at_least=0, key="seed")


@functools.cache
def python_docs() -> str:
    """The topics of the standard library's `pydoc_data.topics`, by key. Differs between Python versions."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[key] for key in sorted(topics))


def provenance(name: str) -> dict[str, Any]:
    """What identifies a corpus: its digest and where it came from. Cheap; raises UserError for an unknown name."""
    if name != "python-docs":
        raise UserError(f"corpus {name!r} is unknown: choose one of python-docs")
    return {"name": name, "sha256": hashlib.sha256(python_docs().encode()).hexdigest()}


def calibration(
    settings: Calibration, tokenizer: "PreTrainedTokenizerBase", samples: int, length: int
) -> "Tensor":
    """Token ids `[samples, length]` for calibration.

    Embedded text is one stream: seed s takes the s-th run of `samples * length` tokens of it, cycling at its end, so
    that different seeds see different text for as long as there is some.
    """
    import torch

    stream = tokenize(python_docs(), tokenizer)[:CALIBRATION_END]
    if len(stream) < length:
        raise UserError(
            f"{settings.corpus} gives {len(stream)} tokens, one calibration window needs {length}"
        )
    start = settings.seed * samples * length
    return stream[torch.arange(start, start + samples * length) % len(stream)].view(samples, length)


def evaluation_stream(name: str, tokenizer: "PreTrainedTokenizerBase") -> "Tensor":
    """The token ids `[n]` on which perplexity is measured."""
    provenance(name)
    return tokenize(python_docs(), tokenizer)[EVALUATION_START:]


def tokenize(text: str, tokenizer: "PreTrainedTokenizerBase") -> "Tensor":
    """One stream of token ids `[n]`, with the BOS that the tokenizer itself puts in front, if any."""
    return tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
