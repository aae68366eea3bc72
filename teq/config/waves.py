"""Waves of a parallel sweep: a job that needs a stage starts once the job that computes it has ended."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from teq.pipeline.store import Stage


def waves(needs: Mapping[int, Sequence[Stage]]) -> list[dict[int, int | None]]:
    """Split jobs, of which `needs` gives the stages to compute in order, into waves.

    Each wave has the numbers of its jobs, those that others need first, and with each the job that computes
    the stage it would have waited for, None in the first wave. Only a job's first stage counts: one with work
    of its own before a shared stage has little to wait for.
    """
    left, done = dict(needs), set[str]()
    waited: dict[int, int] = {}  # by job: the job that computes what it waits for
    found = []
    while left:
        computing: dict[str, int] = {}
        needed: dict[int, int] = {}
        for number, stages in left.items():
            first = next((stage.key for stage in stages if stage.key not in done), str(number))
            if (job := computing.setdefault(first, number)) != number:
                needed[number] = job
        now = sorted(left.keys() - needed.keys(), key=lambda number: (number not in needed.values(), number))
        found.append({number: waited.get(number) for number in now})
        done |= {stage.key for number in now for stage in left[number]}
        waited |= needed
        left = {number: left[number] for number in needed}
    return found


def said(found: Sequence[Mapping[int, int | None]]) -> list[str]:
    """Return a line for each wave but the first: which jobs wait for which."""
    return [
        f"{_named(now)} start after {_named(before)}: they need stages of {_named(set(now.values()))}"
        for before, now in pairwise(found)
    ]


def _named(numbers: Iterable[int]) -> str:
    """Return jobs by number, neighbours as a range: `jobs 0-3, 7`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    spans = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return f"job{'' if spans[0].isdigit() and len(spans) == 1 else 's'} {', '.join(spans)}"
