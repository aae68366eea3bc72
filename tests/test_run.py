"""The command line: what it runs, what it refuses before any work, what it says when a job fails."""

import contextlib
import errno
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import types

import pytest
from record_factory import add_experiment

import run as entry
from teq import config, models, record
from teq.files import disk as files
from teq.pipeline import run as pipeline
from teq.report import read as report
from teq.report.match import RecordIndex
from teq.verbs import run as cli
from teq.verbs import signals

ROOT = pathlib.Path(__file__).resolve().parent.parent
TINY = [
    "train.steps=2",
    "gptq.samples=4",
    "gptq.length=64",
    "ppl.limit=2",
    "ppl.context=64",
    "evals=[python-docs]",
]


def refused(argv, capsys):
    """The single line with which a command line is refused before any work."""
    assert entry.main(argv) == 2
    printed = capsys.readouterr()
    lines = printed.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), printed.err
    assert "Traceback" not in printed.err
    return lines[0]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["model=gpt5"], ["model=gpt5", "opt-6.7b", "smollm2-135m"]),
        (["method=awesome"], ["method=awesome", "teq+gptq"]),
        (["trian.lr=1"], ["'trian.lr'", "did you mean train.lr"]),
        (["train.learning_rate=1"], ["'train.learning_rate'", "--help"]),
        (["bits=0"], ["bits=0", "2, 3, 4"]),
        (["bits=99"], ["bits=99", "2, 3, 4"]),
        (["bits=x"], ["bits=x", "2, 3, 4"]),
        (["group_size=0"], ["group_size=0", "-1 (whole rows)"]),
        (["group_size=7.5"], ["group_size=7.5", "-1 (whole rows)"]),
        (["train.lr=0"], ["train.lr=0", "a number above 0"]),
        (["train.lr=-0.1"], ["train.lr=-0.1", "a number above 0"]),
        (["train.lr=abc"], ["train.lr='abc'", "a number above 0"]),
        (["train.steps=-1"], ["train.steps=-1", "at least 0"]),
        (["train.parameter=exp"], ["train.parameter='exp'", "clip, log"]),
        (["seed=-1"], ["seed=-1", "at least 0"]),
        (["dtype=int8"], ["dtype='int8'", "float32"]),
        (["device=cuda:77"], ["device=cuda:77", "does not exist"]),
        (["device=tpu"], ["device=tpu", "cuda:<n>"]),
        (["gptq.damping=0", "method=gptq"], ["gptq.damping=0", "above 0"]),
        (["evals=[nothing]"], ["evals=nothing", "python-docs"]),
        (["evals=[]"], ["evals is empty", "python-docs"]),
        (["recipe=best"], ["recipe=best", "paper", "quick"]),
        (["init=twos"], ["init=twos", "inv_sqrt"]),
        (["logger=print"], ["logger=print", "wandb"]),
        (["experiments=none"], ["experiments=none", "quickstart"]),
        (["method=rtn,teq"], ["method=rtn,teq", "-m"]),
        (["--nonsense"], ["--nonsense", "--help"]),
        (["model.path=/nowhere/at/all"], ["/nowhere/at/all", "is not a folder"]),
    ],
)
def test_bad_input_is_one_line_before_any_work(argv, said, capsys, monkeypatch):
    monkeypatch.setattr(models.Checkpoint, "load", lambda *_: pytest.fail("a model was loaded"))
    line = refused(argv if argv[0].startswith(("model", "--")) else ["model=tiny-llama", *argv], capsys)
    for part in said:
        assert part in line


def test_an_empty_folder_is_refused(tmp_path, capsys):
    line = refused(["model=opt-6.7b", "recipe=quick", f"model.path={tmp_path}"], capsys)
    assert "holds no config.json" in line


def test_every_job_of_a_sweep_is_checked_before_the_first_starts(capsys, monkeypatch, own_home):
    monkeypatch.setattr(cli, "run_job", lambda *_: pytest.fail("a job was started"))
    line = refused(["-m", "model=tiny-llama", "method=rtn,teq", "train.lr=1e-3,-1"], capsys)
    assert "train.lr=-1" in line


def test_hub_models_without_hub_end_in_one_line_each(capsys, monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert entry.main(["-m", "model=opt-6.7b,bloom-3b", "method=teq,teq+gptq"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    for repo in ("facebook/opt-6.7b", "bigscience/bloom-3b"):
        mine = [line for line in lines if repo in line]
        assert len(mine) == 1 and "model.path=<folder>" in mine[0] and "HF_ENDPOINT" in mine[0]
    assert len(lines) == 2


def test_the_papers_sweep_runs_as_four_jobs_from_a_hub_cache(tmp_path, own_home):
    """The literal command of the README, tiny weights standing in for the hub's."""
    import hashlib

    from teq.models.synthetic import build, byte_tokenizer

    for repo, tiny in (("facebook/opt-6.7b", "tiny-opt"), ("bigscience/bloom-3b", "tiny-bloom")):
        (job,) = config.jobs([f"model={tiny}"])
        base = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
        commit = hashlib.sha1(repo.encode()).hexdigest()
        (base / "refs").mkdir(parents=True)
        (base / "refs" / "main").write_text(commit)
        build(job.run.model.source).save_pretrained(base / "snapshots" / commit)
        byte_tokenizer(job.run.model.source.bos).save_pretrained(base / "snapshots" / commit)
    command = [sys.executable, str(ROOT / "run.py"), "-m", "model=opt-6.7b,bloom-3b", "method=teq,teq+gptq"]
    short = [*TINY, "train.length=64", "calib.corpus=python-docs", "recipe=paper"]
    environment = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "TEQ_HOME": str(own_home)}
    done = subprocess.run(
        [*command, *short], env={**os.environ, **environment}, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = record.load(own_home / "records")
    assert sorted((r.data["run"]["model"]["name"], r.data["run"]["method"]) for r in found) == [
        ("bloom-3b", "teq"),
        ("bloom-3b", "teq+gptq"),
        ("opt-6.7b", "teq"),
        ("opt-6.7b", "teq+gptq"),
    ]
    assert all(r.data["identity"].partition("@")[2] for r in found)
    # Table 8: bloom-3b starts at 1 / sqrt(max) on whole rows only, not on this run's default grid
    assert {r.data["run"]["transform"]["init"] for r in found} == {"ones"}


def test_sweep_writes_one_record_per_run_and_nothing_into_the_working_folder(
    own_home, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    assert (
        entry.main(["-m", "model=tiny-llama", "method=fp,rtn", "bits=3,4", "group_size=-1,128", *TINY]) == 0
    )
    printed = capsys.readouterr().out
    assert "tiny-llama" in printed and str(own_home / "records") in printed
    assert len(record.load(own_home / "records")) == 1 + 4  # one baseline for all grids
    assert set(tmp_path.iterdir()) - before <= {own_home}


def test_one_failing_job_does_not_stop_the_others(own_home, monkeypatch, capsys):
    original = pipeline.run

    def fail_rtn(spec, *rest):
        if spec.method == "rtn":
            raise RuntimeError("disk on fire")
        return original(spec, *rest)

    monkeypatch.setattr(pipeline, "run", fail_rtn)
    assert entry.main(["-m", "model=tiny-llama", "method=rtn,fp", *TINY]) == 1
    printed = capsys.readouterr()
    assert (
        "failed: model=tiny-llama method=rtn bits=3 group_size=64: RuntimeError: disk on fire" in printed.out
    )
    assert "Traceback" not in printed.out + printed.err
    assert [r.data["run"]["method"] for r in record.load(own_home / "records")] == ["fp"]
    logs = "".join(file.read_text() for file in (own_home / "hydra").rglob("run.log"))
    assert "Traceback" in logs and "disk on fire" in logs


def test_unwritable_cache_is_refused_before_any_work(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TEQ_HOME", str(tmp_path / "file" / "home"))
    assert "set TEQ_HOME to a folder you own" in refused(["model=tiny-llama"], capsys)


def test_a_home_that_cannot_be_written_serves_what_it_holds(read_only, own_home, monkeypatch, capsys):
    folder, lock = read_only
    argv = ["-m", "model=tiny-llama", "method=fp,rtn", *TINY]
    assert entry.main(argv) == 0
    table = capsys.readouterr().out.replace(str(own_home), str(folder / "home"))
    shutil.copytree(own_home, folder / "home")
    monkeypatch.setenv("TEQ_HOME", str(folder / "home"))
    before = sorted((folder / "home").rglob("*"))
    lock()
    output = None
    try:
        assert entry.main(argv) == 0
        output = config.output()
        printed = capsys.readouterr()
        assert table.splitlines()[-4:] == printed.out.splitlines()[-4:] and "computing" not in printed.out
        assert sorted((folder / "home").rglob("*")) == before
        assert not output.is_relative_to(folder) and len(list(output.rglob("run.log"))) == 2
        shutil.rmtree(output)
        assert entry.main(["-m", "model=tiny-llama", "method=fp,gptq", *TINY]) == 1
        output = config.output()
        printed = capsys.readouterr()
        failed = [line for line in printed.out.splitlines() if line.startswith("failed: model=")]
        assert (
            len(failed) == 1
            and "method=gptq" in failed[0]
            and "set TEQ_HOME to a folder you own" in failed[0]
        )
        assert "Traceback" not in printed.out + printed.err and "1 records in" in printed.out
    finally:
        if output is not None:
            shutil.rmtree(output, ignore_errors=True)


@pytest.mark.parametrize("key", ["ppl.context", "train.length", "gptq.length"])
@pytest.mark.parametrize("model", ["tiny-llama", "smollm2-135m"])
def test_a_window_longer_than_the_model_is_refused_before_any_work(key, model, capsys):
    argv = [f"model={model}", "method=teq+gptq", *TINY, f"{key}=100000000"]
    assert f"{key}=100000000 is not allowed: model={model} has" in refused(argv, capsys)


def test_every_job_is_checked_before_the_first_starts(capsys):
    jobs = ["-m", "model=tiny-llama", "method=rtn", *TINY]
    assert "device=cuda:99 does not exist" in refused([*jobs, "device=cpu,cuda:99"], capsys)
    assert "memory=much is not allowed" in refused([*jobs, "memory=auto,much"], capsys)
    message = refused(["-m", "experiments=quickstart,lowbit"], capsys)
    assert "experiments=quickstart,lowbit names several experiments" in message


def test_the_summary_shows_one_row_a_run_and_none_of_a_failed_one(own_home, capsys):
    argv = ["model=tiny-llama", "method=rtn", *TINY]
    assert entry.main(argv) == 0
    (file,) = (own_home / "records").glob("*.json")
    older = json.loads(file.read_text()) | {"created": "2020-01-01T00:00:00+00:00"}
    (own_home / "records" / file.name.replace("-", "-0")).write_text(json.dumps(older))
    capsys.readouterr()
    jobs = config.jobs(argv)
    assert cli.summary(jobs) == 0
    assert "1 records" in capsys.readouterr().out
    config.begin_run()  # another start, in which the job left nothing
    assert cli.summary(jobs) == 1
    out = capsys.readouterr().out
    assert cli.LOST in out and "records in" not in out


def test_an_experiment_ends_with_its_own_table_as_the_report_prints_it(
    own_home, tmp_path, monkeypatch, capsys
):
    text = """
hydra: {mode: MULTIRUN, sweeper: {params: {model: tiny-llama, method: "fp,rtn", grid: w4}}}
evals: [python-docs]
ppl: {limit: 2, context: 64}
layout:
  {title: T, caption: C, rows: [grid, method], cells: {ppl: {label: perplexity, mean: [python-docs.ppl]}}}
"""
    add_experiment(monkeypatch, tmp_path, "small", text)
    assert entry.main(["experiments=small"]) == 0
    table = report.read("small", (), RecordIndex(own_home / "records")).markdown()
    assert table.count("| w4 ") == 1 and "perplexity" in table
    assert f"{table}\n2 records in {own_home}" in capsys.readouterr().out
    (tmp_path / "experiments" / "small.yaml").write_text(f"# @package _global_{text.partition('layout')[0]}")
    assert entry.main(["experiments=small"]) == 0  # what a table lacks stops nothing
    assert "| model " in capsys.readouterr().out


def test_a_failure_here_is_said_whatever_another_process_does(own_home, monkeypatch, capsys):
    """Two starts of one job on one home: each has its own outcome."""
    argv = ["model=tiny-llama", "method=rtn", *TINY]
    (job,) = config.jobs(argv)
    config.begin_run()
    here = os.environ["TEQ_START"]

    def fail(*_):
        raise RuntimeError("disk on fire")

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "run", fail)
        cli.run_job(job)
    config.begin_run()
    cli.run_job(job)
    assert cli.summary([job]) == 0
    monkeypatch.setenv("TEQ_START", here)
    assert cli.summary([job]) == 1
    assert "failed: model=tiny-llama method=rtn bits=3 group_size=64: RuntimeError: disk on fire" in (
        capsys.readouterr().out
    )


def test_a_run_under_another_name_is_shown_under_the_name_that_was_asked_for(own_home, capsys):
    assert entry.main(["model=tiny-llama", "method=gptq", "gptq.order=act", *TINY]) == 0
    assert "| gptq   |" in capsys.readouterr().out
    assert entry.main(["model=tiny-llama", "method=gptq-ao", *TINY]) == 0
    assert "| gptq-ao |" in capsys.readouterr().out
    assert len(record.load(own_home / "records")) == 1


def test_help_lists_groups_options_experiments_and_examples(capsys):
    assert entry.main(["--help"]) == 0
    text = capsys.readouterr().out
    for part in (
        "opt-6.7b",
        "teq+gptq",
        "inv_sqrt",
        "quickstart",
        "train.steps=null",
        "python run.py -m",
        "TEQ_HOME",
    ):
        assert part in text


# --- what stops a run, and a disk that is full


class Steps(list):
    """The training steps that were made; `then` is called after step `after`."""

    after, then = -1, staticmethod(lambda: None)


@pytest.fixture
def steps(monkeypatch):
    """Notes the steps of every training in this process."""
    made = Steps()

    def step(number, loss):
        made.append(number)
        if number == made.after:
            made.after = -1
            made.then()

    logger = types.SimpleNamespace(step=step, finish=lambda _: None)
    monkeypatch.setattr(cli, "_started", lambda *_: contextlib.nullcontext(logger))
    return made


TRAINING = ["model=tiny-llama", "method=teq", *TINY[1:], "train.steps=5"]


def curve(home):
    """The loss curve of the only record."""
    (file,) = (home / "records").glob("*.json")
    return json.loads(file.read_text())["training"]["loss"]


@pytest.mark.parametrize(
    ("stop", "status", "said"),
    [(signal.SIGTERM, 143, cli.TERMINATED), (signal.SIGINT, 130, cli.INTERRUPTED)],
    ids=["SIGTERM", "Ctrl-C"],
)
def test_a_stopped_training_says_one_line_and_goes_on_from_the_step_it_was_at(
    own_home, steps, capsys, monkeypatch, stop, status, said
):
    with monkeypatch.context() as patch:
        patch.setenv("TEQ_HOME", str(own_home.parent / "undisturbed"))
        assert entry.main(TRAINING) == 0
    steps.clear()
    steps.after, steps.then = 2, lambda: os.kill(os.getpid(), stop)
    capsys.readouterr()
    before = signal.getsignal(signal.SIGTERM)
    assert entry.main(TRAINING) == status
    assert signal.getsignal(signal.SIGTERM) is before
    printed = capsys.readouterr()
    assert printed.err.strip().splitlines()[-1] == said and "Traceback" not in printed.err + printed.out
    assert steps == [0, 1, 2] and not list((own_home / "store" / "scales").glob("*/"))
    assert entry.main(TRAINING) == 0
    assert steps == [0, 1, 2, 3, 4] and not list((own_home / "partial").iterdir())
    assert curve(own_home) == curve(own_home.parent / "undisturbed")


def test_a_launchers_own_handler_of_sigterm_is_left_and_the_state_saved(own_home, steps):
    """As submitit's does: it starts the job anew elsewhere and ends this process."""
    steps.after, steps.then = 2, lambda: os.kill(os.getpid(), signal.SIGTERM)

    def requeue(*_):
        raise SystemExit(75)

    before = signal.signal(signal.SIGTERM, requeue)
    try:
        with pytest.raises(SystemExit, match="75"):
            cli.run_job(config.jobs(TRAINING)[0])
        assert signal.getsignal(signal.SIGTERM) is requeue
    finally:
        signal.signal(signal.SIGTERM, before)
    assert entry.main(TRAINING) == 0 and steps == [0, 1, 2, 3, 4]


def test_a_worker_of_a_launcher_takes_sigterm_too(own_home, steps):
    """`run_job` alone, without `run.py`'s own handler, as in a process of joblib's."""
    steps.after, steps.then = 2, lambda: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(signals.Terminated):
        cli.run_job(config.jobs(TRAINING)[0])
    assert entry.main(TRAINING) == 0 and steps == [0, 1, 2, 3, 4]


def test_scales_that_could_not_be_stored_are_not_trained_again(own_home, steps, monkeypatch, capsys):
    def full(file, tensors):
        if file.parent.parent.name == "scales":
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        files.save_tensors(file, tensors)

    sweep = ["-m", *TRAINING, "method=teq,rtn"]
    with monkeypatch.context() as patch:
        patch.setattr("teq.pipeline.store.save_tensors", full)
        assert entry.main(sweep) == 1
    printed = capsys.readouterr()
    (failed,) = re.findall(r"^failed: model.*", printed.out, re.M)
    assert "method=teq" in failed and "No space left on device" in failed and "free space" in failed
    assert "1 records in" in printed.out and "Traceback" not in printed.out + printed.err
    assert entry.main(sweep) == 0
    assert steps == [0, 1, 2, 3, 4]


def test_a_disk_that_fills_up_ends_each_job_in_a_line(small_disk, steps, monkeypatch, capsys):
    """A real disk: whatever Hydra, the log or the store write there fails for want of space."""
    disk = small_disk(2000)
    monkeypatch.setenv("TEQ_HOME", str(disk))

    def fill():
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as stream:
            while True:
                stream.write(bytes(1000))

    steps.after, steps.then = 1, fill
    sweep = ["-m", *TRAINING, "method=teq,rtn"]
    assert entry.main(sweep) == 1
    printed = capsys.readouterr()
    for method in ("teq", "rtn"):
        (failed,) = re.findall(rf"^failed: model=tiny-llama method={method} .*", printed.out, re.M)
        assert "No space left on device" in failed
    assert "Traceback" not in printed.out + printed.err and "Logging error" not in printed.err
    assert printed.err.count("run.log cannot be written") == 2  # once a job
    assert "the state of the training cannot be saved" in printed.err and steps == [0, 1, 2, 3, 4]
    assert "No space left on device" in refused(sweep, capsys)
    assert not list(disk.rglob("space"))
    (disk / "filler").unlink()
    assert entry.main(sweep) == 0
