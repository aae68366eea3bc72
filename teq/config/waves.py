"""Waves of a parallel sweep: a job that needs a stage starts once the job that computes it has ended."""

from collections.abc import Mapping, Sequence

from teq.pipeline.store import Stage


def waves(needs: Mapping[int, Sequence[Stage]]) -> list[list[int]]:
    """Split jobs, of which `needs` gives the stages to compute in order, into waves of their numbers.

    In a wave those come first that others need. Only a job's first stage counts: one with work of its own
    before a shared stage has little to wait for.
    """
    left, done, found = dict(needs), set[str](), []
    while left:
        computing: dict[str, int] = {}
        waiting: dict[int, int] = {}  # by job: the one that computes its stage
        for number, stages in left.items():
            first = next((stage.key for stage in stages if stage.key not in done), str(number))
            if (job := computing.setdefault(first, number)) != number:
                waiting[number] = job
        now = sorted(
            left.keys() - waiting.keys(), key=lambda number: (number not in waiting.values(), number)
        )
        found.append(now)
        done |= {stage.key for number in now for stage in left[number]}
        left = {number: left[number] for number in waiting}
    return found
