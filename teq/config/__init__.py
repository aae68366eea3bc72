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
    option_names,
    output,
    prepare_environment,
    start_of_run,
    values,
)
from teq.config.resolve import Job, Options, job

__all__ = [
    "ROOT",
    "Job",
    "Options",
    "begin_run",
    "experiment",
    "folder",
    "groups",
    "help_sentences",
    "home",
    "job",
    "jobs",
    "option_names",
    "output",
    "prepare_environment",
    "quoted",
    "start_of_run",
    "values",
]
