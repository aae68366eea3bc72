"""Text by name: token windows for perplexity, windows for calibration, documents for tasks.

A public set comes from the mirror in TEQ_DATA, else from the Hugging Face hub or its cache; python-docs is
always here.
"""

import functools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from teq.data import embedded, hub, mirror
from teq.data.embedded import CALIBRATION_END, EVALUATION_START, python_docs
from teq.data.sources import source
from teq.spec import Settings, UserError, option

if TYPE_CHECKING:
    import pyarrow
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

CALIBRATION = (embedded.NAME, "pile-10k")
# what GPTQ's code joins the rows of each protocol with
JOINED = {"wikitext2": "\n\n", "ptb": "\n\n", "ptb-new": " ", "c4-new": " "}
PERPLEXITY = (embedded.NAME, *JOINED, "c4")
C4_WINDOWS = 256  # both C4 protocols stop here


@dataclass(frozen=True, kw_only=True)
class Calibration(Settings):
    """Which text calibrates, and which draw of it.

    python-docs is one stream, whatever `pack` says, and seed 0 starts at its beginning. The documents of
    pile-10k are shuffled with the seed; `pack` joins them into one stream, otherwise those shorter than a
    window are skipped.
    """

    group = "calib"
    corpus: str = option(embedded.NAME, among=CALIBRATION)
    pack: bool = True
    seed: int = option(0, at_least=0, key="seed")


def provenance(name: str) -> dict[str, Any]:
    """Return what identifies a text and how much of it there is; it is in the key of its readers.

    Raises UserError for a set that is unknown, nowhere to be found, damaged, or only there in part where that
    cannot be used.
    """
    if name == embedded.NAME:
        return embedded.provenance()
    return find(name).provenance()


def find(name: str) -> mirror.Mirrored | hub.Hosted:
    """Return where the public set `name` comes from. Raises UserError."""
    wanted = source(name)
    found = mirror.find(name, wanted) or hub.find(name, wanted)
    if found.partial and wanted.whole:
        raise UserError(
            f"{name} needs all {wanted.rows} documents and the mirror holds {found.provenance()['rows']}: "
            f"{wanted.whole}"
        )
    return found


def calibration(
    settings: Calibration, tokenizer: "PreTrainedTokenizerBase", samples: int, length: int
) -> "Tensor":
    """Return token ids `[samples, length]` for calibration. Raises UserError if the corpus gives fewer.

    Embedded text is one stream: seed s takes the s-th run of `samples * length` tokens of it, cycling at its
    end, so that different seeds see different text for as long as there is some.

    Pile documents come in the order `random.Random(seed)` shuffles them into. Packed, they are joined by a
    blank line, as GPTQ's code joins the rows of the corpora it calibrates and evaluates on, with the
    tokenizer's own BOS once at the start of the stream; each document is tokenized by itself, so only as many
    are as are needed. Not packed, each is tokenized with its own BOS, gives its first `length` tokens, or is
    skipped when it has fewer.
    """
    import torch

    if settings.corpus == embedded.NAME:
        stream = tokenize(python_docs(), tokenizer)[:CALIBRATION_END]
        if len(stream) < length:
            raise UserError(
                f"{settings.corpus} gives {len(stream)} tokens, one calibration window needs {length}"
            )
        start = settings.seed * samples * length
        return stream[torch.arange(start, start + samples * length) % len(stream)].view(samples, length)
    texts = find(settings.corpus).table()["text"].to_pylist()
    random.Random(settings.seed).shuffle(texts)
    made = (_packed if settings.pack else _long_enough)(texts, tokenizer, length)
    found = [window for _, window in zip(range(samples), made, strict=False)]
    if len(found) < samples:
        skipped = "" if settings.pack else " (calib.pack=false skips documents shorter than one)"
        raise UserError(
            f"the {len(texts)} documents of {settings.corpus} give {len(found)} calibration windows of "
            f"{length} tokens, {samples} are needed{skipped}: lower their number or length, "
            "or fetch the whole set"
        )
    return torch.stack(found)


def windows(
    name: str,
    tokenizer: "PreTrainedTokenizerBase",
    context: int,
    limit: int | None = None,
    even: bool = False,
) -> tuple["Tensor", int]:
    """Return token ids `[windows, context]` of the perplexity protocol `name`, and its number of windows.

    At most `limit` of them: `even` ones are spaced evenly from the first to the last, others are the first.

    The protocols are those of GPTQ's code. The rows are joined into one text that is tokenized at once, so
    that the tokenizer's BOS, if it has one, stands at the start of the stream alone; windows follow one
    another without overlap and an incomplete last one is dropped. `c4` instead draws each window from a
    random document that is longer than it, so that the first ones are a sample. Both C4 protocols have at
    most 256. Raises UserError when there is not even one.
    """
    import numpy as np

    if name == "c4":
        texts = find(name).table()["text"].to_pylist()
        return _drawn(texts, tokenizer, context, min(C4_WINDOWS, limit or C4_WINDOWS)), C4_WINDOWS
    if name == embedded.NAME:
        stream = tokenize(python_docs(), tokenizer)[EVALUATION_START:]
    else:
        rows = find(name).table()[next(iter(source(name).columns))].to_pylist()
        stream = tokenize(JOINED[name].join(rows), tokenizer)
    count = len(stream) // context
    if count == 0:
        raise UserError(
            f"{name} gives {len(stream)} tokens, one window of ppl.context={context} needs more: "
            "choose a smaller ppl.context"
        )
    count = min(count, C4_WINDOWS) if name == "c4-new" else count
    taken = min(count, limit or count)
    chosen = np.linspace(0, count - 1, taken).round().astype(int) if even else np.arange(taken)
    return stream[: count * context].view(count, context)[chosen], count


def task_rows(name: str) -> "pyarrow.Table":
    """Return the documents of a task's set, in their own order."""
    return find(name).table()


@functools.lru_cache(maxsize=8)  # a run looks whether its texts are long enough before it reads them
def tokenize(text: str, tokenizer: "PreTrainedTokenizerBase") -> "Tensor":
    """Return one stream of token ids `[n]`, with the tokenizer's own BOS in front; do not write into it."""
    return tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]


def _packed(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", length: int) -> Iterator["Tensor"]:
    """Return windows `[length]` of the stream that the documents make; see `calibration`."""
    import torch

    held: list[int] = []
    for i, text in enumerate(texts):
        end = "\n\n" if i + 1 < len(texts) else ""
        held += tokenizer(text + end, add_special_tokens=i == 0, verbose=False).input_ids
        complete = len(held) // length
        yield from torch.tensor(held[: complete * length]).view(complete, length)
        held = held[complete * length :]


def _long_enough(
    texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", length: int
) -> Iterator["Tensor"]:
    """Return the first `length` tokens of each document that has as many."""
    for text in texts:
        tokens = tokenize(text, tokenizer)
        if len(tokens) >= length:
            yield tokens[:length]


def _drawn(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", context: int, count: int) -> "Tensor":
    """Return the first `count` windows that GPTQ's `get_c4` draws: `[count, context]`.

    Draw for draw what that code does after `random.seed(0)`; only on documents of exactly `context` tokens it
    stops with an error.
    """
    import torch

    draw = random.Random(0)
    found: list[Tensor] = []
    misses = 0
    while len(found) < count:
        tokens = tokenize(texts[draw.randint(0, len(texts) - 1)], tokenizer)
        if len(tokens) > context:
            start = draw.randint(0, len(tokens) - context - 1)
            found.append(tokens[start : start + context])
            misses = 0
        elif (misses := misses + 1) > len(texts):
            raise UserError(
                f"{misses} documents of c4 drawn in a row have at most {context} tokens: "
                "choose a smaller ppl.context"
            )
    return torch.stack(found)
