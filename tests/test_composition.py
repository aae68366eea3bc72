"""Configurations merged from files without Hydra are Hydra's."""

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from teq import config
from teq.config import command_line
from teq.config.composition import NeedsHydra, merged

SAMPLES = [
    ["experiments=table1", "model=opt-13b", "method=teq", "grid=w4", "recipe=paper"],
    ["experiments=table9", "model=bloom-3b"],
    ["experiments=smollm2", "method=teq+gptq", "grid=w3_g128", "tasks.limit=7"],
    ["model=tiny-llama", "method=gptq-ao", "bits='4'", "group_size='-1'", "init=inv_sqrt", "logger=wandb"],
    ["recipe=quick", "model=llama-7b", "evals=[ptb,c4-new]", "train.lr=1e-4", "seed=3"],
]


@pytest.fixture
def hydra():
    """Hydra, ready to compose."""
    config.prepare_environment()
    with initialize_config_dir(str(config.folder("conf")), version_base="1.3"):
        yield


def composed(overrides):
    """A configuration without Hydra's node and the layout, and the choices, as Hydra composes them."""
    composed = compose("config", overrides, return_hydra_config=True)
    plain = OmegaConf.to_container(composed)
    choices = dict(composed.hydra.runtime.choices)
    return {key: value for key, value in plain.items() if key not in ("hydra", "layout")}, choices


@pytest.mark.parametrize("overrides", SAMPLES, ids=lambda overrides: overrides[0])
def test_merged_configurations_are_hydras(hydra, overrides):
    ours, choices = merged(overrides)
    expected, options = composed(overrides)
    assert ours == expected and choices.items() <= options.items()


@pytest.mark.parametrize("name", config.groups()["experiments"])
def test_the_jobs_of_an_experiment_are_hydras(name):
    jobs = config.jobs([f"experiments={name}"])
    with initialize_config_dir(str(config.folder("conf")), version_base="1.3"):
        for one in jobs[:: -(-len(jobs) // 4)]:
            expected, options = composed(one.overrides)
            assert merged(one.overrides)[0] == expected
            assert config.job(expected, options).run == one.run


@pytest.mark.parametrize(
    "overrides",
    [["model/arch=opt", "model=tiny-opt"], ["+train.extra=1"], ["bits=4"], ["train.stepz=1"], ["~seed"]],
    ids=lambda overrides: overrides[0],
)
def test_what_is_not_that_simple_is_left_to_hydra(overrides):
    with pytest.raises(NeedsHydra):
        merged(overrides)


def test_neither_a_single_job_nor_a_sweep_waits_for_hydra(monkeypatch):
    monkeypatch.setattr(command_line, "compose", lambda *_, **__: pytest.fail("Hydra composed it"))
    argv = ["model=tiny-llama", "bits=4", "recipe=quick", "train.lr=1e-4"]
    (one,) = config.jobs([*argv, "method=teq"])
    assert one.run in [job.run for job in config.jobs(["-m", *argv, "method=rtn,teq"])]
