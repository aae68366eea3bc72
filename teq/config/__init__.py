"""Command lines to checked runs: the only room that imports Hydra."""

from teq.config.command_line import jobs, quoted
from teq.config.options import (
    ROOT,
    begin_run,
    experiment,
    folder,
    groups,
    help_sentences,
    home,
    output,
    prepare_environment,
    values,
)
from teq.config.resolve import Job, job

__all__ = [
    "ROOT",
    "Job",
    "begin_run",
    "experiment",
    "folder",
    "groups",
    "help_sentences",
    "home",
    "job",
    "jobs",
    "output",
    "prepare_environment",
    "quoted",
    "values",
]
