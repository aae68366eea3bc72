"""A sweep on a real Ray cluster of this host, one of whose workers is killed."""

import os
import signal

import pytest
import small_sweep

import run as entry

LAUNCHER = ["hydra/launcher=cluster", "hydra.launcher.ray.remote.num_gpus=0"]


@pytest.fixture
def address():
    """A cluster with two processors that this process starts and a sweep joins."""
    ray = pytest.importorskip("ray", reason="ray is not installed")
    pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason="hydra-ray-launcher is not installed")
    try:
        yield ray.init(address="local", num_cpus=2, num_gpus=0, include_dashboard=False).address_info[
            "address"
        ]
    finally:
        ray.shutdown()


def test_a_sweep_with_a_killed_worker_is_that_of_one_process(address, own_home, tmp_path, monkeypatch):
    sweep = small_sweep.start(own_home, *LAUNCHER, RAY_ADDRESS=address)
    try:
        process, number = small_sweep.computing(sweep, own_home)
        os.kill(process, signal.SIGKILL)
        said, _ = sweep.communicate(timeout=1500)
    finally:
        sweep.kill()
    assert sweep.returncode == 0, said
    assert f"{small_sweep.RUNS} records in" in said
    notes = next(own_home.glob("hydra/*/working"))  # the retried job's worker ended its own
    assert (notes / f"{process}-{number}").exists() and (notes / f"{number}.ended").exists()
    monkeypatch.setenv("TEQ_HOME", str(tmp_path / "one"))
    assert os.environ["OMP_NUM_THREADS"] == "1" and entry.main(small_sweep.SWEEP) == 0
    small_sweep.check(own_home, tmp_path / "one")
