"""torchrun: two processes train what one does, each holds half of the blocks, and all end together."""

import json
import os
import pathlib
import re
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import run as entry
from teq import cli, config, pipeline, ranks, record
from teq.loggers import Silent
from teq.models import Checkpoint
from teq.spec import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent
TINY = ["model=tiny-llama", "method=teq", "device=cpu", "memory=keep", "train.length=48", "train.steps=4"]
TINY += ["ppl.limit=2", "ppl.context=64", "evals=[python-docs]"]
BATCHES = ["-m", "train.batch=1,2"]


def torchrun(home, script, *argv, **environment):
    """Run a script as two processes on one CPU; returns the exit status and what was printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script), *argv]
    variables = {**os.environ, "TEQ_HOME": str(home), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command,
        env=variables | environment,
        cwd=home.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
        check=False,
    )
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two ranks' home and log after a sweep over batches, each at a rate that diverges and at a good one."""
    home = tmp_path_factory.mktemp("ranks") / "home"
    script = ROOT / "tests" / "two_ranks.py"
    status, log = torchrun(home, script, *TINY, *BATCHES, "train.lr=1e30,0.01")
    return home, status, log


def noted(home, rank):
    """What `two_ranks.py` noted on a rank, as one dict of lists."""
    lines = [json.loads(line) for line in (home / f"rank-{rank}.jsonl").read_text().splitlines()]
    return {key: [line[key] for line in lines if key in line] for key in ("whole", "held", "plain")}


def test_scales_equal_one_process_and_are_found_by_it(trained, own_home, monkeypatch, caplog):
    home, _, log = trained
    argv = [*TINY, *BATCHES, "train.lr=0.01"]
    assert entry.main(argv) == 0
    alone, together = (
        {f.parent.name: load_file(f) for f in (h / "store" / "scales").glob("*/data.safetensors")}
        for h in (own_home, home)
    )
    assert len(alone) == 2 and alone.keys() == together.keys()  # a key knows nothing of ranks
    for key, scales in alone.items():
        assert scales.keys() == together[key].keys()
        for name, s in scales.items():
            torch.testing.assert_close(together[key][name], s, rtol=1e-5, atol=1e-5)
    losses = [
        {r.id: r.data["training"]["loss"] for r in record.load(h / "records")} for h in (own_home, home)
    ]
    assert len(losses[1]) == 2, log
    for key, curve in losses[0].items():
        assert losses[1][key] == pytest.approx(curve, rel=1e-5)
    monkeypatch.setenv("TEQ_HOME", str(home))
    monkeypatch.setattr(pipeline.Bench, "pristine", lambda *_: pytest.fail("a model was loaded"))
    assert entry.main(argv) == 0
    assert len(list((home / "records").glob("*.json"))) == 2


def test_a_loss_that_is_not_finite_ends_the_job_on_all_ranks_and_the_sweep_goes_on(trained):
    home, status, log = trained
    assert status != 0 and len(re.findall(r"^failed: training stopped: the loss is", log, re.M)) == 2
    assert len(list((home / "failed").glob("*.safetensors"))) == 2
    assert log.count("scales") and "Connection closed" not in log  # the others were sent home in time


def test_between_the_passes_a_rank_holds_half_of_the_blocks(trained):
    home = trained[0]
    for rank in (0, 1):
        found = noted(home, rank)
        assert len(found["held"]) >= 2 * 4 and set(found["plain"]) == {0}
        assert max(found["held"]) <= 0.51 * max(found["whole"])
    (finished, _) = record.load(home / "records")
    assert finished.data["stages"]["scales"]["cost"]["machine"]["ranks"] == 2


def test_a_failure_on_another_rank_ends_all(tmp_path):
    script = ROOT / "tests" / "two_ranks.py"
    status, log = torchrun(tmp_path / "home", script, *TINY, "memory=checkpoint", TEQ_TEST_FAIL="1")
    assert status != 0 and "OSError: the disk is full" in log
    assert not (tmp_path / "home" / "records").exists()


def test_sigterm_lets_the_ranks_end_their_step_and_one_process_goes_on(tmp_path, monkeypatch):
    """As a scheduler sends it to torchrun, which passes it on to all ranks."""
    home = tmp_path / "home"
    argv = [word for word in TINY if "steps" not in word] + ["train.steps=3000"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += [str(ROOT / "tests" / "two_ranks.py"), *argv]
    variables = {**os.environ, "TEQ_HOME": str(home), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=variables, cwd=tmp_path, stdout=-1, stderr=-2, text=True)
    while (
        not all((home / f"rank-{rank}.jsonl").exists() for rank in (0, 1))
        or "held" not in (home / "rank-0.jsonl").read_text()
    ):
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    log = process.communicate(timeout=100)[0]
    assert log.count(cli.TERMINATED) == 1
    (state,) = home.glob("partial/*/*/training.safetensors")
    made = len(load_file(state)["losses"])
    assert 0 < made < 3000
    monkeypatch.setenv("TEQ_HOME", str(home))
    steps = []

    def step(self, number, loss):
        steps.append(number)
        raise KeyboardInterrupt

    monkeypatch.setattr(Silent, "step", step)
    assert entry.main(argv) == 130
    assert steps == [made]


def test_bad_input_is_said_once(tmp_path):
    status, log = torchrun(tmp_path / "home", ROOT / "run.py", *TINY, "train.batch=3")
    assert status != 0 and log.count("train.batch=3 cannot be shared by 2 ranks") == 1
    assert "computing" not in log


@pytest.fixture
def of_ranks(monkeypatch):
    """Be rank 0 of so many, as far as the checks before any work can tell."""

    def be(count, rank=0):
        for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": count, "RANK": rank}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setattr(Checkpoint, "load", lambda *_: pytest.fail("a model was loaded"))

    return be


@pytest.mark.parametrize(
    ("count", "argv", "said"),
    [
        (3, ["train.batch=3"], "3 ranks are more than the model's 2 blocks"),
        (2, ["train.batch=5"], "train.batch=5 cannot be shared by 2 ranks"),
        (2, ["device=cuda:1"], "device=cuda:1 is one device for 2 processes"),
        (2, ["-m", "device=cpu,auto"], "device=auto,cpu is mixed"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(of_ranks, capsys, count, argv, said):
    of_ranks(count)
    assert entry.main([*TINY, *argv]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and said in line


def test_methods_that_do_not_train_run_on_any_number_of_ranks(of_ranks):
    of_ranks(9)
    for job in config.jobs([*TINY, "method=rtn"]):
        ranks.check(job.run.transform, job.run.model)
    with pytest.raises(UserError, match="9 ranks"):
        ranks.check(config.jobs(TINY)[0].run.transform, job.run.model)


def test_each_rank_takes_its_own_samples_or_all_of_them(of_ranks, monkeypatch):
    samples = torch.arange(12).view(4, 3)
    of_ranks(2, rank=1)
    assert torch.equal(ranks.share(samples), samples)  # outside of a training
    monkeypatch.setattr(ranks._Team, "training", True)
    assert torch.equal(ranks.share(samples), samples[2:])
    assert torch.equal(ranks.share(samples, whole=True), samples)
    assert torch.equal(ranks.share(samples[:1]), samples[:1])
