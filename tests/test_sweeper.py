"""A sweep over several processes: what is lost when a worker is killed, and where its output goes."""

import os
import pathlib
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool

import pytest
from hydra.core.plugins import Plugins

import run as entry
from teq import record
from teq.config import sweeper
from teq.config.waves import waves
from teq.pipeline.store import Stage
from teq.spec import UserError
from teq.verbs import run

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHORT = ["evals=[python-docs]", "ppl.limit=2", "ppl.context=64"]
KILLER = """
import contextlib, os, signal
from dataclasses import dataclass
from teq.pipeline.loggers import Wandb

@dataclass(frozen=True, kw_only=True)
class Killer(Wandb):
    def start(self, title, *rest):
        if "group_size=40" in title:
            os.kill(os.getpid(), signal.SIGKILL)
        return contextlib.nullcontext()
"""


def test_a_worker_that_is_killed_costs_its_own_job_only(own_home, tmp_path):
    pytest.importorskip(
        "hydra_plugins.hydra_joblib_launcher", reason="hydra-joblib-launcher is not installed"
    )
    (tmp_path / "killer.py").write_text(KILLER)
    command = [sys.executable, str(ROOT / "run.py"), "-m", "model=tiny-llama", "method=rtn", *SHORT]
    command += ["group_size=24,40,128", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    done = subprocess.run(
        [*command, "logger=wandb", "logger._target_=killer.Killer"],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "TEQ_HOME": str(own_home)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    sizes = {r.data["run"]["quantizer"]["grid"]["group_size"] for r in record.load(own_home / "records")}
    assert sizes == {24, 128}
    assert "2 records in" in done.stdout
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "group_size=40" in line.replace("'", "") and "the worker process was killed" in line


def no_needs(number):
    """Nothing to compute: all jobs are one wave."""
    return []


class Pool:
    """A launcher whose workers begin `width` jobs at once and die of the job `deadly`."""

    def __init__(self, folder, deadly, width=2):
        self.folder, self.deadly, self.width = folder, deadly, width
        self.batches, self.done = [], []

    def launch(self, jobs, first):
        self.batches.append([job for job, _ in jobs])
        for at in range(0, len(jobs), self.width):
            now = range(at, min(at + self.width, len(jobs)))
            notes = [self.folder / f"1-{jobs[i][1].removeprefix('hydra.sweep.subdir=')}" for i in now]
            for begun in notes:
                assert not begun.exists()  # no two jobs share a number
                begun.touch()
            if self.deadly & {jobs[i][0] for i in now}:
                raise BrokenProcessPool("a worker was terminated")
            for begun in notes:
                begun.rename(self.folder / f"{begun.name[2:]}.ended")
            self.done += [jobs[i][0] for i in now]
        return [job for job, _ in jobs]


def test_jobs_that_had_not_begun_go_on_together_and_the_others_one_by_one(tmp_path, capsys):
    pool = Pool(tmp_path, {"c", "f"})
    with pytest.raises(UserError, match=r"^c; f: the worker process was killed"):
        sweeper.Relauncher(pool, tmp_path, no_needs).launch([[job] for job in "abcdefgh"], 0)
    assert sorted(pool.done) == ["a", "b", "d", "e", "g", "h"]
    assert pool.batches == [list("abcdefgh"), list("efgh"), list("gh"), ["c"], ["d"], ["e"], ["f"]]
    assert "a worker process was killed" in capsys.readouterr().err


def test_a_pool_that_cannot_begin_is_not_tried_for_ever(tmp_path):
    class Broken:
        def launch(self, jobs, first):
            raise BrokenProcessPool("no workers")

    with pytest.raises(BrokenProcessPool):
        sweeper.Relauncher(Broken(), tmp_path, no_needs).launch([["a"], ["b"]], 0)


def test_a_job_starts_when_the_one_that_computes_its_stage_has_ended(tmp_path, capsys):
    # what e and f share comes after work of their own
    chains = {"c": "SWT", "a": "S", "b": "SW", "d": "SWU", "e": "XR", "f": "YR", "g": ""}
    needs = [[Stage(name, {}, None) for name in chain] for chain in chains.values()]
    pool = Pool(tmp_path, set(), width=9)
    results = sweeper.Relauncher(pool, tmp_path, needs.__getitem__).launch([[job] for job in chains], 0)
    assert pool.batches == [list("cefg"), list("abd")]
    assert sorted(results) == sorted(chains)
    assert {note.name for note in tmp_path.iterdir()} == {f"{number}.ended" for number in range(len(chains))}
    assert capsys.readouterr().err.startswith("jobs start in waves (4, then 3): ")
    assert waves(dict(enumerate(needs[1:4]))) == [[0], [1], [2]]  # each computes what the next reads


def test_a_wave_that_fails_does_not_stop_the_next_one(tmp_path):
    launched = []

    class Cluster:
        def launch(self, jobs, first):
            launched.append([job for job, _ in jobs])
            raise RuntimeError(f"job {jobs[0][0]} was cancelled")

    needs = [[Stage(name, {}, None)] for name in "SSX"]
    with pytest.raises(RuntimeError, match="job a was cancelled"):
        sweeper.Relauncher(Cluster(), tmp_path, needs.__getitem__).launch([["a"], ["b"], ["c"]], 0)
    assert launched == [["a", "c"], ["b"]]


def test_stages_to_compute_are_those_that_are_not_stored(own_home):
    argv = ["-m", "model=tiny-llama", "method=fp,rtn,teq,teq+gptq", "train.steps=2", "train.length=64"]
    argv += ["gptq.samples=2", "gptq.length=64", "grid=w3_g64,w4_g64", "device=cpu", *SHORT]
    jobs = run.checked_jobs(argv)

    def found(jobs):
        needs = {number: run.unfinished(jobs, number) for number in range(len(jobs))}
        return [[stage.name for stage in stages] for stages in needs.values()], waves(needs)

    names, split = found(jobs)
    own = ["weights", "metrics"]
    assert names == [own] * 4 + [["scales", *own]] * 4
    # fp is the same run on both grids
    assert split == [[0, 4, 5, 2, 3], [1, 6, 7]]
    assert entry.main([*argv[:2], "method=teq", *argv[3:]]) == 0
    names, split = found(jobs)
    assert names == [own] * 4 + [[]] * 2 + [own] * 2
    assert split == [[0, 2, 3, 4, 5, 6, 7], [1]]
    for file in (own_home / "store" / "scales").glob("*/*.safetensors"):  # as prune leaves it
        file.unlink()
    assert found(jobs)[0][4:] == [[], [], ["scales", *own], ["scales", *own]]


def test_what_a_launcher_raises_is_one_line_before_the_summary(own_home, monkeypatch, capsys):
    argv = ["-m", "model=tiny-llama", "method=rtn", *SHORT]
    assert entry.main(argv) == 0
    capsys.readouterr()

    class Cluster:
        def launch(self, jobs, first):
            raise RuntimeError("sbatch:\nno such queue")

    monkeypatch.setattr(Plugins, "instantiate_launcher", lambda *_, **__: Cluster())
    assert entry.main(argv) == 1
    printed = capsys.readouterr()
    assert printed.err == "error: the launcher failed: RuntimeError: sbatch: no such queue\n"
    assert "it left no record" in printed.out and "records in" not in printed.out
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(RuntimeError, match="no such queue"):
        entry.main(argv)


def test_starts_in_one_second_have_folders_of_their_own(own_home):
    argv = ["model=tiny-llama", "method=rtn", *SHORT]
    for start in (argv, argv, ["-m", *argv], ["-m", *argv]):
        assert entry.main(start) == 0
    assert len(list((own_home / "hydra").iterdir())) == 4
    assert len(list((own_home / "hydra").rglob("run.log"))) == 4
