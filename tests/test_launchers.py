"""Presets of launchers: what they compose to, and what is said where their plugin is not installed."""

import importlib.util
import tomllib

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore

import run as entry
from teq import config

TINY = ["model=tiny-llama", "method=rtn,fp", "evals=[python-docs]"]
PRESETS = {"gpus": ("joblib", "joblib"), "slurm": ("submitit_slurm", "submitit"), "cluster": ("ray", "ray")}
EXTRAS = {"gpus": "joblib", "slurm": "slurm", "cluster": "ray"}


def composed(preset, *overrides, key="launcher"):
    """Hydra's node `key` of a command line that names `preset`."""
    _, plugin = PRESETS[preset]
    name = f"hydra_plugins.hydra_{plugin}_launcher"
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"hydra-{plugin}-launcher is not installed")
    config.prepare_environment()
    with initialize_config_dir(str(config.folder("conf")), version_base="1.3"):
        cfg = compose("config", [f"hydra/launcher={preset}", *overrides], return_hydra_config=True)
        return cfg.hydra[key]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_its_plugins_launcher_for_every_job_of_a_sweep(preset):
    assert composed(preset)._target_.startswith(f"hydra_plugins.hydra_{PRESETS[preset][1]}_launcher.")
    assert [job.launcher for job in config.jobs(["-m", *TINY, f"hydra/launcher={preset}"])] == [preset] * 2


def test_there_is_a_worker_for_each_gpu(monkeypatch):
    for gpus, workers in ((0, 1), (1, 1), (3, 3)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert composed("gpus").n_jobs == workers
    assert composed("gpus", "hydra.launcher.n_jobs=2").n_jobs == 2


def test_a_slurm_job_has_as_many_threads_as_processors():
    launcher = composed("slurm", "hydra.launcher.cpus_per_task=3", "hydra.launcher.partition=long")
    assert (launcher.cpus_per_task, launcher.gpus_per_node, launcher.partition) == (3, 1, "long")
    threads = [line.partition(" ")[2] for line in launcher.setup]
    assert threads == [f"{name}=$SLURM_CPUS_PER_TASK" for name in ("OMP_NUM_THREADS", "SRUN_CPUS_PER_TASK")]


def test_a_ray_task_has_one_gpu_and_may_join_a_cluster():
    ray = composed("cluster", "hydra.launcher.ray.remote.num_cpus=4").ray
    assert (ray.remote.num_gpus, ray.remote.num_cpus) == (1, 4)
    assert ray.init.setdefault("object_store_memory", 1) is None  # what the plugin does before ray.init
    # what conf/config.yaml reads, which a worker of another host needs before it composes
    copied = composed("cluster", key="job").env_copy
    assert set(copied) <= set(ray.init.runtime_env.env_vars)
    assert str(config.output()) == ray.init.runtime_env.env_vars.TEQ_OUTPUT


@pytest.mark.parametrize("sweep", [[], ["-m"]])
@pytest.mark.parametrize("own_name", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_launcher_whose_plugin_is_missing_is_one_line_with_its_remedy(
    preset, own_name, sweep, monkeypatch, capsys
):
    plugins = PRESETS[preset][0]
    repo = ConfigStore.instance().repo["hydra"]["launcher"]
    monkeypatch.delitem(repo, f"{plugins}.yaml", raising=False)
    chosen = f"hydra/launcher={plugins if own_name else preset}"
    assert entry.main([*sweep, "model=tiny-llama", "method=rtn", chosen]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    extra = EXTRAS[preset]
    assert line == f"error: {chosen} is not installed: run pip install -e '.[{extra}]' next to run.py"
    project = tomllib.loads((config.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert any("launcher" in package for package in project["optional-dependencies"][extra])
