"""A sweep on a real SLURM cluster of one node, disturbed in every way that an operator does."""

import os
from pathlib import Path

import pytest
import slurm_here
import small_sweep

import run as entry

LAUNCHER = ["hydra/launcher=slurm", "hydra.launcher.gpus_per_node=null", "hydra.launcher.cpus_per_task=1"]
LAUNCHER += ["hydra.launcher.mem_gb=1"]


@pytest.fixture
def cluster(tmp_path):
    """A cluster of this host alone, with two processors."""
    if reason := slurm_here.missing():
        pytest.skip(reason)
    pytest.importorskip(
        "hydra_plugins.hydra_submitit_launcher", reason="hydra-submitit-launcher is not installed"
    )
    here = slurm_here.Cluster(tmp_path / "slurm")
    try:
        here.start()
        yield here
    finally:
        here.stop()


def test_a_disturbed_sweep_is_that_of_one_process(cluster, own_home, tmp_path, monkeypatch):
    sweep = small_sweep.start(own_home, *LAUNCHER, SLURM_CONF=str(cluster.conf))
    try:
        process, _ = small_sweep.computing(sweep, own_home)
        environment = Path(f"/proc/{process}/environ").read_text().split("\0")
        slurm = dict(line.split("=", 1) for line in environment if line.startswith("SLURM_ARRAY_"))
        job = f"{slurm['SLURM_ARRAY_JOB_ID']}_{slurm['SLURM_ARRAY_TASK_ID']}"
        cluster.say("scontrol", "requeue", job)
        cluster.say("scontrol", "update", f"nodename={cluster.host}", "state=drain", "reason=test")
        cluster.end("slurmctld")
        cluster.begin("slurmctld")
        slurm_here.until(lambda: cluster.state().startswith("drain"), "the node is not drained")
        cluster.say("scontrol", "update", f"nodename={cluster.host}", "state=resume")
        said, _ = sweep.communicate(timeout=1500)
    finally:
        sweep.kill()
    assert sweep.returncode == 0, said
    assert f"{small_sweep.RUNS} records in" in said
    assert "Restarts=1" in cluster.say("scontrol", "show", "job", job)
    monkeypatch.setenv("TEQ_HOME", str(tmp_path / "one"))
    assert os.environ["OMP_NUM_THREADS"] == "1" and entry.main(small_sweep.SWEEP) == 0
    small_sweep.check(own_home, tmp_path / "one")
