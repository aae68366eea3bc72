"""Tasks in plans."""

import pytest

from teq import config
from teq.device.live_bytes import LiveBytes
from teq.device.runtime import Runtime
from teq.evaluate import lastword, scoring
from teq.evaluate.workload import Scoring, Workload
from teq.pipeline import estimate


def test_a_tasks_memory_and_operations_are_foreseen(family, monkeypatch):
    """From the counts of this tokenizer, which reads bytes; the largest batch is an upper bound."""
    documents = 40
    few = lastword.items()[:documents]
    monkeypatch.setattr(lastword, "items", lambda: few)
    wide = ["model.config.hidden_size=256"]  # attention within a row is no large part of the work
    wide += [f"model.config.{'ffn_dim' if family == 'opt' else 'intermediate_size'}=1024"]
    wide = wide[:1] if family == "bloom" else wide
    (job,) = config.jobs([f"model=tiny-{family}", "method=fp", "evals=[lastword-python-docs]", *wide])
    lm, (evaluation,) = job.run.model.load("float32", "cpu"), job.run.evals
    seen, plain = [], scoring.SharedContextLM._batches

    def batches(self, sequences, longest):
        found = plain(self, sequences, longest)
        every = [row for batch in found for row in batch]
        seen.append((sum(len(r.tokens) for r in every), sum(len(r.points) for r in every), longest))
        return found

    monkeypatch.setattr(scoring.SharedContextLM, "_batches", batches)
    with LiveBytes() as live:
        evaluation.measure(lm, Runtime(batch_size=2))
    ((tokens, scored, longest),) = seen
    work = Scoring(Workload(documents, tokens / documents, scored / documents, longest), documents, 2)
    batch = estimate.estimate(work, job.run.model.source.dimensions(), job.run.model.arch, "float32", "keep")
    weights = sum(p.nbytes for p in lm.model.parameters())
    assert 0.9 * live.peak <= batch.bytes - weights <= 2 * live.peak
    assert work.flops(batch.flops) == pytest.approx(live.flops, rel=0.3)
