"""Log-likelihood scoring for lm-evaluation-harness that runs every shared context through the model once.

The harness's own `HFLM` runs context + ending for every ending and projects every position to the vocabulary.
Here requests whose tokens begin alike form a group: the common prefix runs once, its keys and values serve
all the group's continuations, and only positions that are scored reach the output projection. Sequences with
too little in common run whole, in one pass. Both give `HFLM`'s results up to floating-point rounding.
"""

import logging
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

logger = logging.getLogger(__name__)

# A prefix of less than this part of a sequence does not repay the second pass and its explicit mask.
MIN_SHARED = 0.4
# What a pass costs before it reads its first token, as a part of a full batch: weighed against padding.
PASS_COST = 1 / 32
# Shorter sequences share batches as large as if they had this length: tiny passes leave the machine idle.
MIN_LENGTH = 64
# Positions projected to the vocabulary at a time: bounds the logits' memory, yet fills the matrix product.
HEAD_CHUNK = 256

Request = tuple[tuple[str, str] | None, list[int], list[int]]
Answer = tuple[float, bool]


@dataclass
class _Use:
    """One request's place in a sequence: inputs up to position `end` predict `continuation`."""

    request: int
    continuation: list[int]
    end: int


@dataclass
class _Sequence:
    """Tokens the model must read, and the requests that this one reading answers."""

    tokens: tuple[int, ...]
    uses: list[_Use]


@dataclass
class _Group:
    """Sequences of which the first `prefix` tokens are the same; a sequence on its own is all prefix."""

    prefix: int
    sequences: list[_Sequence]


class _SharedLayer(DynamicLayer):
    """One layer's keys and values of the prefixes, read by many rows and never written.

    Expanded to the rows only while its layer runs, so that one layer's copy is in memory and not all layers'.
    """

    def __init__(self, prefix: DynamicLayer, rows: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = prefix.keys, prefix.values, True
        self.rows = rows  # [row]: the prefix that each row continues

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        keys = torch.cat([self.keys[self.rows], key_states], dim=2)  # [row, head, prefix + token, head width]
        return keys, torch.cat([self.values[self.rows], value_states], dim=2)


class SharedContextLM(HFLM):
    """`HFLM` for a loaded causal model that shares contexts between log-likelihood requests.

    `batch_size` counts sequences of the longest length in a call: shorter ones are packed to as many tokens,
    so the longest batch sets the memory needed. `truncated` counts the requests that lost tokens on the left
    because context and continuation together exceed `max_length`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
    ) -> None:
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=batch_size,
            max_length=max_length,
            add_bos_token=add_bos_token,
        )
        self.truncated = 0
        self._check_projection()

    @torch.no_grad()
    def _check_projection(self) -> None:
        """Refuse models that change the logits after the output projection: scoring would miss that."""
        ids = torch.tensor([[self.prefix_token_id] * 2], device=self.device)
        ours = self.model.get_output_embeddings()(self.model.base_model(input_ids=ids, use_cache=False)[0])
        stock = self.model(input_ids=ids, use_cache=False).logits
        if not torch.allclose(ours.float(), stock.float(), rtol=1e-2, atol=1e-2, equal_nan=True):
            name = type(self.model).__name__
            raise ValueError(f"{name}: its logits are not the output projection of its last hidden state")

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Answer]:
        """Score `requests` in order; progress bars appear only where standard error is a terminal."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        """Return (log-likelihood, whether greedy decoding gives the continuation) per request, in order.

        `override_bs` belongs to the harness's automatic batch sizes, which are not offered here.
        """
        groups = _group(self._sequences(requests))
        longest = max((len(s.tokens) for group in groups for s in group.sequences), default=0)
        answers: list[Answer | None] = [None] * len(requests)
        bar = tqdm(total=len(requests), disable=disable_tqdm or not sys.stderr.isatty(), desc="Scoring")
        # Longest first: little padding, and the largest batches fail at once. Sequences on their own come
        # apart from the others because they need no cache.
        groups.sort(key=lambda group: (len(group.sequences) == 1, -group.prefix))
        shared = sum(len(group.sequences) > 1 for group in groups)
        lengths = [group.prefix for group in groups]
        start, sizes = 0, None
        while start < len(groups):
            budget = self.batch_size * max(longest, MIN_LENGTH)
            sizes = sizes or [*_sizes(lengths[:shared], budget), *_sizes(lengths[shared:], budget)]
            try:
                batch = self._score(groups[start : start + sizes[start]], budget)
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise
                self.batch_size_per_gpu = self.batch_size // 2
                logger.warning("out of memory: batch size halved to %d", self.batch_size)
                sizes = None
                continue
            except RuntimeError as error:
                if "can't allocate memory" not in str(error):
                    raise
                needed = re.search(r"allocate (\d+) bytes", str(error))
                size = f"{int(needed[1]) / 2**30:.2f} GiB" if needed else "an allocation"
                raise MemoryError(
                    f"{size} for a batch of {self.batch_size} x {longest} tokens failed: lower batch_size"
                ) from error
            for request, answer in batch.items():
                answers[request] = answer
                if (text := requests[request][0]) is not None:  # rolling windows are cached by their caller
                    self.cache_hook.add_partial("loglikelihood", text, answer)
            bar.update(len(batch))
            start += sizes[start]
        bar.close()
        return answers

    def _sequences(self, requests: Sequence[Request]) -> list[_Sequence]:
        """Distinct model inputs of `requests`, truncated as `HFLM` truncates them."""
        sequences: dict[tuple[int, ...], _Sequence] = {}
        truncated = 0
        for index, (_, context, continuation) in enumerate(requests):
            if not context or not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"request {index}: {len(context)} context and {len(continuation)} continuation tokens; "
                    f"needed are 1 or more of each and at most {self.max_length} of the latter"
                )
            truncated += len(context) + len(continuation) > self.max_length + 1
            tokens = tuple((context + continuation)[-(self.max_length + 1) :][:-1])
            sequence = sequences.setdefault(tokens, _Sequence(tokens, []))
            sequence.uses.append(_Use(index, continuation, len(tokens)))
        if truncated:
            self.truncated += truncated
            logger.warning("%d of %d requests cut to %d tokens", truncated, len(requests), self.max_length)
        return list(sequences.values())

    @torch.no_grad()
    def _score(self, groups: list[_Group], budget: int) -> dict[int, Answer]:
        """Answer the requests of `groups`: prefixes in one pass, what follows them by `budget` tokens."""
        answers: dict[int, Answer] = {}
        rests = [
            (row, group.prefix, sequence)
            for row, group in enumerate(groups)
            for sequence in group.sequences
            if len(sequence.tokens) > group.prefix
        ]
        cache = DynamicCache() if rests else None
        ids = self._pad([g.sequences[0].tokens[: g.prefix] for g in groups])  # [group, token]
        # Padding is on the right, where a causal model never looks back at it: no mask needed.
        hidden = self.model.base_model(input_ids=ids, past_key_values=cache, use_cache=bool(rests))[0]
        parts = [(s, row, 0, g.prefix) for row, g in enumerate(groups) for s in g.sequences]
        self._add(answers, hidden, parts)

        rests.sort(key=lambda rest: rest[1] - len(rest[2].tokens))
        sizes = _sizes([len(s.tokens) - prefix for _, prefix, s in rests], budget, ids.shape[1])
        start = 0
        while start < len(rests):
            chunk = rests[start : start + sizes[start]]
            hidden = self._continue(cache, chunk)
            parts = [(s, row, prefix, len(s.tokens)) for row, (_, prefix, s) in enumerate(chunk)]
            self._add(answers, hidden, parts)
            start += len(chunk)
        return answers

    def _continue(self, cache: Cache, rests: list[tuple[int, int, _Sequence]]) -> Tensor:
        """Run what follows the prefixes in `cache`; `rests` hold (prefix row, prefix length, sequence).

        Returns hidden states [row, token, width].
        """
        rows = torch.tensor([row for row, _, _ in rests], device=self.device)
        prefixes = torch.tensor([[prefix] for _, prefix, _ in rests], device=self.device)  # [row, 1]
        ids = self._pad([s.tokens[prefix:] for _, prefix, s in rests])  # [row, token]
        width = cache.get_seq_length()
        # A shorter prefix leaves a hole before what follows it: masked, and not counted in the positions.
        seen = torch.arange(width, device=self.device) < prefixes  # [row, prefix]
        mask = torch.cat(
            [seen, torch.ones_like(ids, dtype=torch.bool)], dim=1
        ).long()  # [row, prefix + token]
        # Padding may lie beyond the last position that a model with learned positions has: keep it inside.
        positions = (mask.cumsum(1) - 1)[:, width:].clamp(max=self.max_length - 1)  # [row, token]
        shared = Cache(layers=[_SharedLayer(layer, rows) for layer in cache.layers])
        return self.model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=shared, use_cache=True
        )[0]

    def _add(
        self, answers: dict[int, Answer], hidden: Tensor, parts: list[tuple[_Sequence, int, int, int]]
    ) -> None:
        """Add to `answers` the scored positions of `hidden` [row, token, width].

        `parts` say where it has what: (sequence, row, first and last + 1 position of the sequence there).
        """
        # Requests that share a prefix share its positions: each is projected once for all of them.
        points: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for part in parts:
            for row, position, request, target in _points(*part):
                points.setdefault((row, position), []).append((request, target))
        places = list(points)
        for at in range(0, len(places), HEAD_CHUNK):
            chunk = places[at : at + HEAD_CHUNK]
            rows, positions = torch.tensor(chunk, device=hidden.device).T
            logits = self.model.get_output_embeddings()(hidden[rows, positions]).float()  # [point, vocab]
            wanted = [(i, *want) for i, place in enumerate(chunk) for want in points[place]]
            index, requests, targets = torch.tensor(wanted, device=hidden.device).T
            hits = (logits.argmax(dim=-1)[index] == targets).tolist()
            # `logsumexp` is more exact on CPU, but this kernel rounds as `HFLM` does.
            log_probs = logits.log_softmax(dim=-1)[index, targets].tolist()
            for request, log_prob, hit in zip(requests.tolist(), log_probs, hits, strict=True):
                total, greedy = answers.get(request, (0.0, True))
                answers[request] = (total + log_prob, greedy and hit)

    def _pad(self, rows: list[tuple[int, ...]]) -> Tensor:
        """Token ids [row, longest], padded on the right."""
        longest = max(map(len, rows))
        padded = [[*row, *[self.tokenizer.pad_token_id] * (longest - len(row))] for row in rows]
        return torch.tensor(padded, device=self.device)


def _group(sequences: list[_Sequence]) -> list[_Group]:
    """Put sequences that begin alike together where that saves tokens.

    Sequences with a common prefix are neighbours in lexicographic order, so one sweep finds the groups.
    """
    groups: list[_Group] = []
    for sequence in sorted(sequences, key=lambda s: s.tokens):
        if groups:
            group = groups[-1]
            last = group.sequences[-1]
            pairs = zip(last.tokens, sequence.tokens, strict=False)
            common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            if common == len(last.tokens):  # `last` begins this sequence, which then answers for both
                sequence.uses += last.uses
                group.sequences[-1] = sequence
                if len(group.sequences) == 1:
                    group.prefix = len(sequence.tokens)
                continue
            prefix = min(group.prefix, common)
            lost = (group.prefix - prefix) * (len(group.sequences) - 1)
            if common >= MIN_SHARED * len(sequence.tokens) and prefix > lost:
                group.prefix = prefix
                group.sequences.append(sequence)
                continue
        groups.append(_Group(len(sequence.tokens), [sequence]))
    return groups


def _sizes(lengths: list[int], budget: int, prefix: int = 0) -> list[int]:
    """For each of `lengths` (descending), how many from it on to pad into one batch that it begins.

    The sizes make for the cheapest way through the rest of `lengths`, in padded tokens and in passes. A batch
    has at most `budget` tokens, and at most 4 times that with the `prefix` of each row: one layer's copies of
    the prefixes' keys and values are in memory at a time.
    """
    costs = [0.0] * (len(lengths) + 1)  # [start]: of everything from there on
    sizes = [1] * len(lengths)
    for start, length in reversed(list(enumerate(lengths))):
        most = max(1, min(budget // length, 4 * budget // (prefix + length), len(lengths) - start))
        cost, sizes[start] = min((n * length + costs[start + n], n) for n in range(1, most + 1))
        costs[start] = cost + PASS_COST * budget
    return sizes


def _points(sequence: _Sequence, row: int, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """Scored positions of `sequence` in [start, stop): (row, position - start, request, token to predict)."""
    for use in sequence.uses:
        first = use.end - len(use.continuation)
        for position in range(max(first, start), min(use.end, stop)):
            yield row, position - start, use.request, use.continuation[position - first]
