"""Run experiments: `python run.py [-m] key=value ...`. `python run.py --help` lists what there is."""

import logging
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from teq.config import command_line as config
from teq.config import sweeper
from teq.spec import UserError
from teq.verbs import run as cli
from teq.verbs import signals


@hydra.main(config_path=str(config.CONF), config_name="config", version_base="1.3")
def launch(cfg: DictConfig) -> None:
    """One job, in whatever process Hydra's launcher put it."""
    config.prepare_environment()
    logging.raiseExceptions = False  # no traceback where a log is on a full disk, wandb's among them
    with sweeper.noted():
        cli.run_job(config.job(cfg, HydraConfig.get().runtime.choices))


def main(argv: list[str]) -> int:
    """Check every job, run them, say what came of each. Returns the exit status."""
    config.begin_run()
    try:
        with signals.terminable(config.output() / cli.WORKING):
            return _main(argv)
    except KeyboardInterrupt:
        print(cli.INTERRUPTED, file=sys.stderr)
        return 130
    except signals.Terminated:
        print(cli.TERMINATED, file=sys.stderr)
        return 143


def _main(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(cli.help_text())
        return 0
    config.prepare_environment()
    try:
        jobs = cli.checked_jobs(argv)
        cli.make_output(len(jobs))
        sys.argv[1:] = config.quoted(argv)
        failed = sweeper.run(launch)
    except UserError as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 2
    return max(failed, cli.summary(jobs))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
