"""Log-likelihood scoring for lm-evaluation-harness that runs what requests share through the model once.

The harness's own `HFLM` runs context + ending for every ending and projects every position to the
vocabulary. Here requests whose tokens begin alike become one row, a tree of tokens: by an attention mask each
token sees its ancestors alone, at the position that it has in its own sequence. So a context is read once for
all its endings, in one pass, and only positions that are scored reach the output projection. The results are
`HFLM`'s up to floating-point rounding.
"""

import contextlib
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from teq.device.memory import exhausted
from teq.evaluate import trees
from teq.evaluate.trees import MIN_LENGTH, Row, attention_mask, batch_sizes, requests_of, rows_of
from teq.files.resume import Journal
from teq.models.blocks import one_sequence_a_row
from teq.models.head import Head

logger = logging.getLogger(__name__)

# Positions projected to the vocabulary at a time: bounds the logits' memory, yet fills the matrix product.
HEAD_CHUNK = 256

Request = tuple[tuple[str, str] | None, list[int], list[int]]
Answer = tuple[float, bool]


class SharedContextLM(HFLM):
    """`HFLM` for a loaded causal model that shares contexts between log-likelihood requests.

    `batch_size` counts sequences of the longest length in a call: shorter ones are packed to as many tokens,
    so the longest batch sets the memory needed. `truncated` counts the requests that lost tokens on the left
    because context and continuation together exceed `max_length`. Finished batches are noted in the folder
    `partial`; those that are there are not computed again. `bos` None leaves the BOS token to the tokenizer;
    `pair` joint tokenizes context and continuation as one text, separate each as a text of its own.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        max_length: int | None = None,
        partial: Path | None = None,
        bos: bool | None = None,
        pair: str = "joint",
    ) -> None:
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=batch_size,
            max_length=max_length,
            add_bos_token=bos,
        )
        self.truncated = 0
        self.partial, self.calls, self.pair = partial, 0, pair

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Answer]:
        """Score `requests` in order; progress bars appear only where standard error is a terminal."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts as `HFLM` does, with the same rule for progress bars."""
        return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate as `HFLM` does, with the same rule for progress bars."""
        return super().generate_until(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the tokens of both; `separate` as lm-eval did before its pull request 531 (June 2023)."""
        if self.pair == "joint":
            return super()._encode_pair(context, continuation)
        return self.tok_encode(context), self.tok_encode(continuation, add_special_tokens=False)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        """Return (log-likelihood, whether greedy decoding gives the continuation) per request, in order.

        `override_bs` belongs to the harness's automatic batch sizes, which are not offered here.
        """
        sequences = self._sequences(requests)
        longest = max((len(sequence.tokens) for sequence in sequences), default=0)
        batches = self._batches(sequences, longest)
        answers: list[Answer | None] = [None] * len(requests)
        bar = tqdm(total=len(requests), disable=disable_tqdm or not sys.stderr.isatty(), desc="Scoring")

        def take(answered: dict[int, Answer]) -> None:
            for request, answer in answered.items():
                answers[request] = answer
                if (text := requests[request][0]) is not None:  # rolling windows are cached by their caller
                    self.cache_hook.add_partial("loglikelihood", text, answer)
            bar.update(len(answered))

        def left() -> list[list[Row]]:
            unanswered = [sequence for sequence in sequences if answers[sequence.uses[0][0]] is None]
            return self._batches(unanswered, longest)

        journal = Journal(self.partial and self.partial / f"answers-{self.calls}.jsonl", "scoring")
        self.calls += 1
        alike = True  # the batches so far are those of the process before
        for entry in journal.entries:
            take({request: (total, hit) for request, total, hit in entry})
            alike = alike and bool(batches) and requests_of(batches[0]) == {request for request, *_ in entry}
            del batches[:1]
        if not alike:  # the batch size was another, or was halved
            batches = left()
        while batches:
            try:
                answered = self._score(batches[0])
            except RuntimeError as error:
                if not exhausted(error) or self.batch_size == 1:
                    raise
                self.batch_size_per_gpu = self.batch_size // 2
                logger.warning("out of memory: batch size halved to %d", self.batch_size)
                batches = left()
                continue
            take(answered)
            journal.append([[request, *answer] for request, answer in answered.items()])
            del batches[0]
        bar.close()
        return answers

    def _sequences(self, requests: Sequence[Request]) -> list[trees.Sequence]:
        """Return distinct model inputs of `requests`, truncated as `HFLM` truncates them."""
        sequences: dict[tuple[int, ...], trees.Sequence] = {}
        truncated = 0
        for index, (_, context, continuation) in enumerate(requests):
            if not context or not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"request {index}: {len(context)} context and {len(continuation)} continuation tokens; "
                    f"needed are 1 or more of each and at most {self.max_length} of the latter"
                )
            truncated += len(context) + len(continuation) > self.max_length + 1
            tokens = tuple((context + continuation)[-(self.max_length + 1) :][:-1])
            sequences.setdefault(tokens, trees.Sequence(tokens)).uses.append((index, continuation))
        if truncated:
            self.truncated += truncated
            logger.warning("%d of %d requests cut to %d tokens", truncated, len(requests), self.max_length)
        return list(sequences.values())

    def _batches(self, sequences: list[trees.Sequence], longest: int) -> list[list[Row]]:
        """Return rows to read in one pass: all trees, or all single sequences, which need no mask.

        Longest first: little padding, and the largest batches fail at once.
        """
        budget = self.batch_size * max(longest, MIN_LENGTH)
        # a mask that is given replaces that of sliding windows, which hides nothing from shorter sequences
        window = getattr(self.model.config, "sliding_window", None) or math.inf
        short = [sequence for sequence in sequences if len(sequence.tokens) <= window]
        rows = rows_of(short, self.model.config.hidden_size, budget)
        for sequence in (sequence for sequence in sequences if len(sequence.tokens) > window):
            rows.append(Row())
            rows[-1].add(sequence, 0)
        rows.sort(key=lambda row: -len(row.tokens))
        batches = []
        for alike in ([r for r in rows if len(r.branches) > 1], [r for r in rows if len(r.branches) == 1]):
            sizes, start = batch_sizes([len(row.tokens) for row in alike], budget), 0
            while start < len(alike):
                batches.append(alike[start : start + sizes[start]])
                start += sizes[start]
        return batches

    @torch.no_grad()
    def _score(self, rows: list[Row]) -> dict[int, Answer]:
        """Answer the requests of `rows`, which one pass reads."""
        ids = self._pad([row.tokens for row in rows], self.tokenizer.pad_token_id)  # [row, token]
        if len(rows[0].branches) == 1:  # a causal model never looks back at padding on the right: no mask
            with one_sequence_a_row():
                hidden = self.model.base_model(input_ids=ids, use_cache=False)[0]
        else:
            positions = self._pad([row.positions for row in rows], 0)
            mask = attention_mask(rows, ids.shape[1], self.model.dtype).to(ids.device)
            with _alibi_at(self.model.base_model, positions, 1 + max(max(row.positions) for row in rows)):
                hidden = self.model.base_model(
                    input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
                )[0]
        answers: dict[int, Answer] = {}
        points = {(i, place): wants for i, row in enumerate(rows) for place, wants in row.points.items()}
        places, head = list(points), Head.of(self.model)
        for at in range(0, len(places), HEAD_CHUNK):
            chunk = places[at : at + HEAD_CHUNK]
            row, place = torch.tensor(chunk, device=hidden.device).T
            logits = head.logits(hidden[row, place]).float()  # [point, vocab]
            wanted = [(i, *want) for i, point in enumerate(chunk) for want in points[point]]
            index, _, targets = torch.tensor(wanted, device=hidden.device).T
            hits = logits.argmax(dim=-1)[index] == targets
            # `logsumexp` is more exact on CPU, but this kernel rounds as `HFLM` does.
            log_probs = logits.log_softmax(dim=-1)[index, targets]
            # together: every read waits for the device
            found = torch.stack([log_probs, hits.to(log_probs.dtype)], 1).tolist()
            for (_, request, _), (log_prob, hit) in zip(wanted, found, strict=True):
                total, greedy = answers.get(request, (0.0, True))
                answers[request] = (total + log_prob, greedy and hit == 1)
        return answers

    def _pad(self, rows: list[list[int]], value: int) -> Tensor:
        """Return numbers of tokens as [row, longest], filled up on the right with `value`."""
        longest = max(map(len, rows))
        return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], device=self.device)


@torch.no_grad()
def dry_run(model: PreTrainedModel, tokens: int, scored: int) -> None:
    """Do the work of one row of `tokens` tokens, of which `scored` are projected, without contents."""
    ids = torch.zeros(1, tokens, dtype=torch.int64, device=model.device)
    mask = torch.zeros(1, 1, tokens, tokens, dtype=model.dtype, device=model.device)
    with _alibi_at(model.base_model, ids, tokens):
        hidden = model.base_model(input_ids=ids, attention_mask=mask, position_ids=ids, use_cache=False)[0]
    head = Head.of(model)
    for at in range(0, scored, HEAD_CHUNK):
        head.logits(hidden[0, at : min(at + HEAD_CHUNK, scored)]).float().log_softmax(dim=-1)


@contextlib.contextmanager
def _alibi_at(base: nn.Module, positions: Tensor, count: int) -> Iterator[None]:
    """Context manager: BLOOM's position biases are those of `positions [row, token]`, all below `count`.

    BLOOM makes them from a mask of padding otherwise.
    """
    original: Callable[..., Tensor] | None = getattr(base, "build_alibi_tensor", None)
    if original is None:
        yield
        return

    def build(_: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
        every = torch.ones(1, count, device=positions.device)
        biases = original(every, heads, dtype)[:, 0, positions]  # [head, row, token]
        return biases.transpose(0, 1).reshape(-1, 1, positions.shape[1])

    base.build_alibi_tensor = build
    try:
        yield
    finally:
        del base.build_alibi_tensor
