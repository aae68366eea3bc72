"""How much a model has to read for a task, counted once: `python -m teq plan` needs no data set at hand."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from teq.stage import Work

if TYPE_CHECKING:
    from teq.models.checkpoint import LM


@dataclass(frozen=True)
class Workload:
    """How much a whole set has to be read, for one tokenizer.

    `documents` of the set, mean `tokens` read (what requests share once) and positions `scored` of each,
    tokens of the `longest` sequence. Counted with SmolLM2's tokenizer (49 152 entries) on the rows that
    `SharedContextLM` makes in batches of 8; another tokenizer gives other numbers.
    """

    documents: int
    tokens: float
    scored: float
    longest: int


WORKLOADS = {
    "hellaswag": Workload(10042, 156.3, 113.8, 154),
    "lambada_openai": Workload(5153, 79.2, 1.4, 223),
    "lastword-python-docs": Workload(320, 20.5, 1.1, 40),
    "piqa": Workload(1838, 44.8, 36.2, 241),
    "winogrande": Workload(1267, 22.0, 10.3, 38),
}


@dataclass(frozen=True)
class Scoring:
    """Scoring `documents` of a workload in batches of `batch_size` of the longest sequences."""

    strategies = Work.strategies
    estimate = None
    waiting_tokens = 0
    work: Workload
    documents: int
    batch_size: int

    @property
    def batch(self) -> int:
        """Return the tokens of the largest batch."""
        from teq.evaluate.trees import MIN_LENGTH

        return self.batch_size * max(self.work.longest, MIN_LENGTH)

    def dry_run(self, lm: "LM", strategy: str) -> None:
        """Run the largest batch."""
        from teq.evaluate.scoring import dry_run

        dry_run(lm.model, self.batch, round(self.batch * self.work.scored / self.work.tokens))

    def flops(self, batch: int) -> int:
        """Return the operations of all documents, from those of the largest batch."""
        return int(batch * self.documents * self.work.tokens / self.batch)
