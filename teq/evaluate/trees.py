"""Token sequences that begin alike as trees: what to read in one pass, and what each token may see."""

from dataclasses import dataclass, field
from itertools import takewhile

import torch
from torch import Tensor

# What a pass costs before it reads its first token, as a part of a full batch: weighed against padding.
PASS_COST = 1 / 32
# Shorter sequences share batches as large as if they had this length: tiny passes leave the machine idle.
MIN_LENGTH = 64


@dataclass
class Sequence:
    """Tokens the model must read, and the requests that this reading answers: (request, continuation)."""

    tokens: tuple[int, ...]
    uses: list[tuple[int, list[int]]] = field(default_factory=list)


@dataclass
class Row:
    """Sequences that begin alike, as one tree of tokens."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)  # of each token in its own sequence
    branches: list[list[int]] = field(default_factory=list)  # places from the first to each last token
    points: dict[int, list[tuple[int, int]]] = field(default_factory=dict)  # place -> (request, next token)

    def add(self, sequence: Sequence, common: int) -> None:
        """Put in a sequence whose first `common` tokens are those of the last one."""
        start, rest = len(self.tokens), sequence.tokens[common:]
        path = [*(self.branches[-1][:common] if common else []), *range(start, start + len(rest))]
        self.tokens += rest
        self.positions += range(common, len(path))
        if common and common == len(self.branches[-1]):  # the last one continues: still one branch
            self.branches.pop()
        self.branches.append(path)
        for request, continuation in sequence.uses:
            for place, token in zip(path[-len(continuation) :], continuation, strict=True):
                self.points.setdefault(place, []).append((request, token))


def requests_of(rows: list[Row]) -> set[int]:
    """Return the requests that a batch answers."""
    return {request for row in rows for wants in row.points.values() for request, _ in wants}


def rows_of(sequences: list[Sequence], width: int, most: int) -> list[Row]:
    """Put sequences that begin alike into one row, of at most `most` tokens, where that pays.

    Sequences with a common beginning are neighbours in lexicographic order, so one sweep finds the rows. When
    a row of T tokens takes n more, `common` fewer are read and 2 T n more pairs of tokens, masked ones, are
    attended over; in a block of `width` w a token takes some 24 w^2 operations and a pair 4 w.
    """
    rows: list[Row] = []
    last: tuple[int, ...] = ()
    for sequence in sorted(sequences, key=lambda s: s.tokens):
        pairs = zip(last, sequence.tokens, strict=False)
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        have, more = len(rows[-1].tokens) if rows else 0, len(sequence.tokens) - common
        if common * 3 * width <= have * more or have + more > most:
            rows.append(Row())
            common = 0
        rows[-1].add(sequence, common)
        last = sequence.tokens
    return rows


def batch_sizes(lengths: list[int], budget: int) -> list[int]:
    """Return for each of `lengths` (descending) how many from it on to pad into one batch.

    The sizes make for the cheapest way through the rest of `lengths`, in padded tokens and in passes, with at
    most `budget` tokens a batch.
    """
    costs = [0.0] * (len(lengths) + 1)  # [start]: of everything from there on
    sizes = [1] * len(lengths)
    for start, length in reversed(list(enumerate(lengths))):
        most = max(1, min(budget // length, len(lengths) - start))
        cost, sizes[start] = min((n * length + costs[start + n], n) for n in range(1, most + 1))
        costs[start] = cost + PASS_COST * budget
    return sizes


def attention_mask(rows: list[Row], longest: int, dtype: torch.dtype) -> Tensor:
    """Return what each token may not see, to be added to attention scores: [row, 1, token, token seen]."""
    seen = torch.eye(longest, dtype=torch.bool).repeat(len(rows), 1, 1)  # padding sees itself, not nothing
    for row, allowed in zip(rows, seen, strict=True):
        start = 0
        for path in row.branches:
            own = slice(start, start := path[-1] + 1)
            allowed[own, [place for place in path if place < own.start]] = True
            allowed[own, own] = torch.ones_like(allowed[own, own]).tril()
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
