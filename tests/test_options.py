"""Options of conf/ and the output folder of a start."""

import os

from teq import config


def test_the_output_of_a_start_is_one_folder_for_all_its_processes(own_home, monkeypatch):
    config.begin_run()
    config.prepare_environment()
    assert os.environ["TEQ_OUTPUT"] == str(config.output()) == f"{own_home}/hydra/{os.environ['TEQ_START']}"
    first = config.output()
    config.begin_run()
    config.prepare_environment()
    assert os.environ["TEQ_OUTPUT"] == str(config.output()) != str(first)


def test_every_group_option_composes():
    for group, names in config.groups().items():
        for name in names if group not in ("experiments", "evals", "hydra/launcher") else []:
            if (group, name) == ("model", "auto"):
                continue  # which names no checkpoint
            base = [] if group == "model" else ["model=tiny-llama"]
            (job,) = config.jobs([*base, f"{group}={name}"])
            assert job.run.key()
