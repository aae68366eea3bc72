"""Run experiments: `python run.py [-m] key=value ...`. `python run.py --help` lists what there is."""

import functools
import logging
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from teq import config
from teq.config import sweeper
from teq.console import print_errors
from teq.spec import UserError
from teq.verbs import run, signals


@hydra.main(config_path=str(config.folder("conf")), config_name="config", version_base="1.3")
def launch(cfg: DictConfig) -> None:
    """Run one job, in whatever process Hydra's launcher put it."""
    config.prepare_environment()
    logging.raiseExceptions = False  # no traceback where a log is on a full disk, wandb's among them
    job = config.job(cfg, HydraConfig.get().runtime.choices)
    with sweeper.noted():
        run.run_job(job)


def main(argv: list[str]) -> int:
    """Check every job, run them, sum up. Returns the exit status."""
    if {"-h", "--help"} & set(argv):
        print(run.help_text())
        return 0
    config.begin_run()
    try:
        with signals.terminable(sweeper.working()):
            jobs = run.checked_jobs(argv)
            run.make_output(len(jobs))
            sys.argv[1:] = config.quoted(argv)
            needs = functools.partial(run.unfinished, jobs)
            return max(sweeper.run(launch, needs), run.summary(jobs))
    except UserError as error:
        print_errors(error)
        return 2
    except KeyboardInterrupt:
        print(run.INTERRUPTED, file=sys.stderr)
        return 130
    except signals.Terminated:
        print(run.TERMINATED, file=sys.stderr)
        return 143


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
