"""`python run.py`: check every job of a command line, run them, sum up."""

import contextlib
import errno
import json
import logging
import os
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teq import config, record
from teq.config import Job
from teq.device import locks, memory
from teq.device.runtime import resolve
from teq.files import disk
from teq.pipeline import forecast, settings
from teq.pipeline import run as pipeline
from teq.pipeline.store import Stage, Store
from teq.report import table
from teq.report.match import RecordIndex
from teq.spec import UserError
from teq.verbs import signals

if TYPE_CHECKING:
    from teq.report.read import Shown

log = logging.getLogger(__name__)
LOST = "it left no record: its process ended without a word, as one that was killed does"
KEPT = "what was finished is kept, the same command goes on from there"
INTERRUPTED, TERMINATED = f"interrupted: {KEPT}", f"terminated by SIGTERM: {KEPT}"
FULL = (errno.ENOSPC, errno.EDQUOT)
SPACE = 2**16  # bytes that a start of run.py writes at least: Hydra's copy of the configuration, logs
EXAMPLES = """\
  python run.py                                         the defaults: TEQ at 3 bits on SmolLM2-135M, minutes
  python run.py method=gptq bits=4 group_size=-1        another method and grid
  python run.py -m model=opt-6.7b,bloom-3b method=teq,teq+gptq   a sweep, one record per run
  python run.py experiments=quickstart                  an experiment file
  python run.py model=opt-6.7b model.path=/models/opt   weights from a local folder
  python run.py -m method=rtn,teq hydra/launcher=joblib any Hydra launcher"""


def help_text() -> str:
    """Return groups with their options, values with their defaults, and examples."""
    sentences, options = config.help_sentences(), config.groups()
    options["group_size"].append("any other number above 0")
    groups = [f"  {name:<14} {', '.join(names)}\n{'':17}{sentences[name]}" for name, names in options.items()]
    values = [
        f"  {f'{key}={json.dumps(value)}'.replace(chr(34), ''):<29} {sentences[key]}"
        for key, value in config.values().items()
        if key not in options
    ]
    return (
        "Train equivalent transformations, quantize, evaluate; one record per run.\n\n"
        "usage: python run.py [-m] [group=option ...] [key=value ...]\n\ngroups\n"
        + "\n".join([*groups, "\nvalues (null: the recipe decides)", *values])
        + f"\n\nexamples\n{EXAMPLES}\n\n"
        f"Records and cache lie in {config.home()} (TEQ_HOME). Tables: python -m teq report <experiment>."
    )


def checked_jobs(argv: list[str]) -> list[Job]:
    """Return the jobs of a command line after every check that needs no heavy work.

    Raises UserError, a line for each problem.
    """
    found = config.jobs(argv)
    Store(config.home() / "store").check()
    for options, launcher in dict.fromkeys((job.options, job.launcher) for job in found):
        # a CUDA device that a launcher finds elsewhere is checked where the job runs
        if launcher == "basic" or not locks.CUDA.fullmatch(options.device):
            resolve(options.device)
        memory.check(options.memory)
    for stage in zip(*(settings.checks(job.run) for job in found), strict=True):
        problems, passed = [], set()
        for job, checks in zip(found, stage, strict=True):
            for name, check in checks.items():
                if name not in passed:
                    passed.add(name)
                    try:
                        check()
                    except UserError as error:
                        problems.append(f"model={job.run.model.name}: {error}")
        if problems:
            raise UserError("\n".join(problems))
    if too_long := [problem for job in found for problem in _too_long(job)]:
        raise UserError("\n".join(dict.fromkeys(too_long)))
    return found


def make_output(jobs: int) -> None:
    """Make the folders that Hydra writes to: it would end a sweep where it cannot make one later.

    Raises UserError when the disk is full already.
    """
    folder = config.output()
    try:
        for name in [".", *(str(job) for job in range(jobs) if jobs > 1)]:
            (folder / name).mkdir(parents=True, exist_ok=True)
        try:
            (folder / "space").write_bytes(os.urandom(SPACE))
        finally:
            (folder / "space").unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}): free space there or set TEQ_HOME"
        ) from error


def unfinished(jobs: Sequence[Job], number: int) -> list[Stage]:
    """Return the stages that a job of a sweep has to compute, in order."""
    job = jobs[number]
    auto = job.options.device == "auto"  # a device that is named may be on another host
    runtime = replace(job.options, device=resolve("auto")) if auto else job.options
    return pipeline.unfinished(job.run, Store(config.home() / "store"), runtime)


def _too_long(job: Job) -> Iterator[str]:
    """Yield a line for each window of the run that is longer than its model's positions reach."""
    if job.dimensions is None and not job.run.model.source.at_hand:
        return  # its configuration would have to be fetched
    positions = getattr(forecast.dimensions(job.run.model, job.dimensions), "max_position_embeddings", None)
    for stage in (*job.run.calibrated, *job.run.evals):
        for name in ("length", "context"):
            length = getattr(stage, name, None) or 0
            if positions is not None and length > positions:
                model = job.run.model.name
                yield f"{stage.group}.{name}={length} is not allowed: model={model} has {positions} positions"


def run_job(job: Job) -> None:
    """Run one job; a failure is one line here, its traceback in the job's log. Leaves a note to `summary`."""
    home = config.home()
    log.info("— %s (%s)", job.run.title(), job.run.key())
    log.debug("settings: %s", json.dumps(job.run.plain()))
    try:
        settings = job.run.plain() | {"method": job.run.method}
        with (
            signals.terminable(),
            locks.taken(job.options.device) as device,
            _started(job, settings) as logger,
        ):
            runtime = replace(job.options, device=resolve(device))
            finished = pipeline.run(job.run, Store(home / "store"), home, runtime, logger)
        _note(job, {"record": str(finished.file)})
    except Exception as error:  # the other jobs run all the same
        line = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, OSError) and error.errno in FULL:
            line = f"{error.strerror} ({error.filename}): free space there; {KEPT}"
        elif not isinstance(error, UserError):
            line = f"{type(error).__name__}: {line}"
        log.error("failed: %s", line)
        logging.getLogger("teq.traceback").debug("%s", traceback.format_exc())
        _note(job, {"failed": line})


def _started(job: Job, settings: dict[str, Any]) -> contextlib.AbstractContextManager[Any]:
    """Return the job's logger, started; a context of None where nothing is logged."""
    if job.logger is None:
        return contextlib.nullcontext()
    return job.logger.start(job.run.title(), settings, str(config.home()), job.experiment)


def summary(jobs: list[Job]) -> int:
    """Print the table of the experiment or of the jobs, and what failed. Returns the exit status."""
    outcomes = {job.run.key(): _outcome(job) for job in jobs}
    written = [Path(outcome["record"]) for outcome in outcomes.values() if "record" in outcome]
    found = [one for one in map(record.read, written) if one is not None]
    shown = _shown(jobs)
    if found:
        names = {job.run.key(): job.run.method for job in jobs}
        print(shown.markdown() if shown else table.plain(found, names))
        print(f"{len(found)} records in {config.home() / 'records'}")
    if shown and (logger := jobs[0].logger) is not None:
        settings = f"{shown.name}: table", {"experiment": shown.name}, str(config.home()), shown.name
        with logger.start(*settings) as started:
            if started is not None:
                started.table(shown.sheet.data, shown.drawings.get("png"))
    failed = {job.run.key(): job for job in jobs if job.run.key() not in {one.id for one in found}}
    for key, job in failed.items():
        print(f"failed: {job.run.title()}: {outcomes[key].get('failed', LOST)}")
    return 1 if failed else 0


def _shown(jobs: list[Job]) -> "Shown | None":
    """Return the experiment that just ran as the report shows it; errors are logged, not raised."""
    if (name := jobs[0].experiment) is None:
        return None
    from teq.report import read as report

    try:
        records = config.folder("results") / "records", config.home() / "records"
        return report.of(name, jobs, RecordIndex(*records))
    except UserError as error:
        log.warning("%s: its table is not shown: %s", name, error)
        return None


def _note(job: Job, outcome: dict[str, str]) -> None:
    """Leave the outcome of a job to `summary`, which may run in another process."""
    _outcomes[config.output(), job.run.key()] = outcome
    with contextlib.suppress(OSError):  # a full disk: in this process it is known all the same
        disk.write_text(config.output() / "outcomes" / f"{job.run.key()}.json", json.dumps(outcome))


def _outcome(job: Job) -> dict[str, str]:
    """Return the outcome of a job in this start of run.py; empty where there is none."""
    try:
        return json.loads((config.output() / "outcomes" / f"{job.run.key()}.json").read_text())
    except (OSError, ValueError):
        return _outcomes.get((config.output(), job.run.key()), {})


_outcomes: dict[tuple[Path, str], dict[str, str]] = {}  # by output folder and job
