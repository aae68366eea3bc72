"""Sweeps over several processes: waves of jobs, and a killed worker that costs the job that it ran alone."""

import contextlib
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import env_override
from hydra.plugins.launcher import Launcher
from hydra.types import RunMode
from omegaconf import DictConfig

from teq.config.options import output
from teq.config.waves import waves
from teq.console import print_errors
from teq.pipeline.store import Stage
from teq.spec import UserError

FULL_ERROR = "HYDRA_FULL_ERROR"
Needs = Callable[[int], Sequence[Stage]]  # the stages that a job of the sweep will compute, in order


def run(launch: Callable[[], Any], needs: Needs) -> int:
    """Run `launch`, a function under `hydra.main`; an error of the launcher is printed in one line.

    Jobs that run in parallel start in waves, split by what `needs` gives for their numbers. Returns 0, or 1
    where jobs may be without their records. HYDRA_FULL_ERROR=1 gives the traceback.
    """
    wanted = os.environ.get(FULL_ERROR) == "1"
    try:
        with env_override({FULL_ERROR: "1"}), _relaunching(needs):  # Hydra would print and exit
            launch()
    except Exception as error:
        if wanted:
            raise
        said = " ".join(str(error).split())
        known = isinstance(error, UserError)
        print_errors(said if known else f"the launcher failed: {type(error).__name__}: {said}")
        return 1
    return 0


def working() -> Path:
    """Return the folder of notes on the jobs of this start of run.py."""
    return output() / "working"


@contextlib.contextmanager
def noted() -> Iterator[None]:
    """Context manager: the file <process id>-<number> says that a job runs, <number>.ended that it has ended.

    A job that an exception stops leaves neither.
    """
    hydra = HydraConfig.get()
    number = hydra.sweep.subdir if hydra.mode == RunMode.MULTIRUN else 0
    begun = working() / f"{os.getpid()}-{number}"
    with contextlib.suppress(OSError):  # a full disk is the job's to report
        begun.parent.mkdir(parents=True, exist_ok=True)
        begun.touch()
    try:
        yield
        with contextlib.suppress(OSError):
            begun.rename(begun.with_name(f"{number}.ended"))
    finally:
        begun.unlink(missing_ok=True)


class Relauncher:
    """A launcher that launches jobs in waves by another one, and again what a killed worker left undone.

    Notes and folders of jobs have their numbers in the sweep: a launcher numbers what it is given one by one.
    """

    def __init__(self, launcher: Launcher, folder: Path, needs: Needs) -> None:
        self.launcher = launcher
        self.folder = folder
        self.needs = needs

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[Any]:
        """Return the results of the jobs. Raises the first wave's error when all waves were launched.

        A UserError is of jobs that were alone when their worker was killed.
        """
        jobs = dict(enumerate(job_overrides, initial_job_idx))
        parallel = len(jobs) > 1 and not isinstance(self.launcher, BasicLauncher)
        found = waves({number: self.needs(number) for number in jobs}) if parallel else [list(jobs)]
        if len(found) > 1:
            sizes = ", then ".join(str(len(wave)) for wave in found)
            print(f"jobs start in waves ({sizes}): later ones need stages of earlier ones", file=sys.stderr)
        results: list[Any] = []
        errors = []
        for wave in found:
            try:
                results += self._completed({number: jobs[number] for number in wave})
            except Exception as error:  # what a later wave misses it computes itself
                errors.append(error)
        if errors:
            raise errors[0]
        return results

    def _completed(self, jobs: Mapping[int, Sequence[str]]) -> list[Any]:
        """Return the results of jobs that start together. Raises UserError if a lone job's worker was killed.

        First come the jobs that had not begun; then, each alone, those that had: any of them may be the one
        that filled the memory.
        """
        batches = deque([list(jobs)])
        results: list[Any] = []
        lost: list[str] = []
        while batches:
            batch = batches.popleft()
            numbered = [[*jobs[number], f"hydra.sweep.subdir={number}"] for number in batch]
            try:
                results += self.launcher.launch(numbered, batch[0])
            except BrokenExecutor:
                begun = [number for number in batch if self._forget(number)]
                new = [n for n in batch if n not in begun and not (self.folder / f"{n}.ended").exists()]
                if not begun:  # the pool itself is at fault
                    raise
                if len(batch) == 1:
                    lost.append(" ".join(jobs[batch[0]]))
                else:
                    print(
                        f"a worker process was killed: {len(begun) + len(new)} jobs are run again",
                        file=sys.stderr,
                    )
                    batches.extendleft([new] if new else [])
                    batches.extend([number] for number in begun)
        if lost:
            raise UserError(
                f"{'; '.join(lost)}: the worker process was killed, most likely because the host's memory "
                "ran out; choose fewer jobs at a time (hydra.launcher.n_jobs) or a smaller memory="
            )
        return results

    def _forget(self, number: int) -> bool:
        """Return whether a job had begun and not ended; its notes are deleted, for it may begin again."""
        notes = list(self.folder.glob(f"*-{number}"))
        for note in notes:
            note.unlink(missing_ok=True)
        return bool(notes)


@contextlib.contextmanager
def _relaunching(needs: Needs) -> Iterator[None]:
    """Context manager: Hydra wraps every launcher in a `Relauncher`.

    A launcher class of our own would have to be in Hydra's packages.
    """
    plain = Plugins.instantiate_launcher

    def instantiate(self: Plugins, *, config: DictConfig, **given: Any) -> Relauncher:
        return Relauncher(plain(self, config=config, **given), working(), needs)

    Plugins.instantiate_launcher = instantiate
    try:
        yield
    finally:
        Plugins.instantiate_launcher = plain
