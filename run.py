"""Run experiments: `python run.py [-m] key=value ...`. `python run.py --help` lists what there is."""

import logging
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from teq import config
from teq.config import sweeper
from teq.verbs import run


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
    return run.main(argv, launch)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
