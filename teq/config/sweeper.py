"""Sweeps over several processes: a worker that the kernel kills costs the job that it ran, and no other."""

import contextlib
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import env_override
from hydra.plugins.launcher import Launcher
from hydra.types import RunMode
from omegaconf import DictConfig

from teq.config.options import output
from teq.console import print_errors
from teq.spec import UserError

FULL_ERROR = "HYDRA_FULL_ERROR"


def run(launch: Callable[[], Any]) -> int:
    """Run `launch`, a function under `hydra.main`; an error of the launcher is printed in one line.

    Returns 0, or 1 where jobs may be without their records. HYDRA_FULL_ERROR=1 gives the traceback.
    """
    wanted = os.environ.get(FULL_ERROR) == "1"
    try:
        with env_override({FULL_ERROR: "1"}), _relaunching():  # Hydra would print and exit
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
    number = hydra.job.num if hydra.mode == RunMode.MULTIRUN else 0
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
    """A launcher that launches again what another one left undone when a worker of its pool was killed."""

    def __init__(self, launcher: Launcher, folder: Path) -> None:
        self.launcher = launcher
        self.folder = folder

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[Any]:
        """Return the results of the jobs. Raises UserError at the end if a worker was killed by a lone job.

        First come the jobs that had not begun; then, each alone, those that had: any of them may be the one
        that filled the memory.
        """
        batches, number = deque([list(job_overrides)]), initial_job_idx
        results: list[Any] = []
        lost: list[str] = []
        while batches:
            batch = batches.popleft()
            try:
                results += self.launcher.launch(batch, number)
            except BrokenExecutor:
                jobs = dict(enumerate(batch, number))
                begun = [n for n in jobs if any(self.folder.glob(f"*-{n}"))]
                new = [n for n in jobs if n not in begun and not (self.folder / f"{n}.ended").exists()]
                if not begun:  # the pool itself is at fault
                    raise
                if len(batch) == 1:
                    lost.append(" ".join(batch[0]))
                else:
                    print(
                        f"a worker process was killed: {len(begun) + len(new)} jobs are run again",
                        file=sys.stderr,
                    )
                    batches.extendleft([[jobs[n] for n in new]] if new else [])
                    batches.extend([jobs[n]] for n in begun)
            number += len(batch)
        if lost:
            raise UserError(
                f"{'; '.join(lost)}: the worker process was killed, most likely because the host's memory "
                "ran out; choose fewer jobs at a time (hydra.launcher.n_jobs) or a smaller memory="
            )
        return results


@contextlib.contextmanager
def _relaunching() -> Iterator[None]:
    """Context manager: Hydra wraps every launcher in a `Relauncher`.

    A launcher class of our own would have to be in Hydra's packages.
    """
    plain = Plugins.instantiate_launcher

    def instantiate(self: Plugins, *, config: DictConfig, **given: Any) -> Relauncher:
        return Relauncher(plain(self, config=config, **given), working())

    Plugins.instantiate_launcher = instantiate
    try:
        yield
    finally:
        Plugins.instantiate_launcher = plain
