"""Weights & Biases: an offline run holds every loss, the metrics and the scales; its failures stop no run."""

import json
import struct

import pytest
from record_factory import add_experiment

import run as entry
from teq import config, record
from teq.pipeline.loggers import Wandb
from teq.verbs import run as cli

TINY = ["model=tiny-llama", "train.steps=3", "ppl.limit=2", "ppl.context=64", "evals=[python-docs]"]


def runs(folder):
    """The files of the offline runs under a folder, once wandb's own process has ended and written all."""
    import wandb

    wandb.teardown()
    return list(folder.rglob("run-*.wandb"))


def history(folder):
    """What an offline run logged: one dict per `log` call.

    The file is a LevelDB log: a header of 7 bytes, then blocks of 32 KiB holding chunks of (checksum 4,
    length 2, type 1, data), where types 1 and 4 end a record.
    """
    from wandb.proto import wandb_internal_pb2

    (file,) = runs(folder)
    content, at, parts, rows = file.read_bytes(), 7, [], []
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # too short for another chunk: the block's padding
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        parts.append(content[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):
            message = wandb_internal_pb2.Record()
            message.ParseFromString(b"".join(parts))
            parts = []
            if message.WhichOneof("record_type") == "history":
                items = message.history.item
                rows.append({item.key or "/".join(item.nested_key): item.value_json for item in items})
    return rows


@pytest.mark.parametrize("trained_before", [False, True])
def test_offline_run_holds_losses_metrics_and_histograms(own_home, trained_before):
    if trained_before:  # then the loss curve comes from the cache
        assert entry.main([*TINY, "method=teq+gptq", "gptq.samples=4", "gptq.length=64"]) == 0
    assert entry.main([*TINY, "method=teq", "logger=wandb"]) == 0
    finished = next(r for r in record.load(own_home / "records") if r.data["run"]["method"] == "teq")
    rows = history(own_home / "wandb")
    losses = [json.loads(row["train/loss"]) for row in rows if "train/loss" in row]
    assert losses == pytest.approx(finished.data["training"]["loss"])
    values = [json.loads(row["python-docs/ppl"]) for row in rows if "python-docs/ppl" in row]
    assert values == pytest.approx([finished.metrics["python-docs"]["values"]["ppl"]])
    assert sum("input_layernorm" in key for row in rows for key in row) >= 2


def test_an_experiment_ends_with_its_table_in_one_group(own_home, monkeypatch, tmp_path):
    layout = """
hydra: {mode: MULTIRUN, sweeper: {params: {model: tiny-llama, method: "fp,rtn", grid: w4}}}
evals: [python-docs]
ppl: {limit: 2, context: 64}
layout:
  {title: T, caption: C, rows: [grid, method], cells: {ppl: {label: perplexity, mean: [python-docs.ppl]}}}
"""
    add_experiment(monkeypatch, tmp_path, "logged", layout)
    jobs = config.jobs(["experiments=logged", "logger=wandb"])
    for job in jobs:
        cli.run_job(job)
    assert cli.summary(jobs) == 0
    files = runs(own_home / "wandb")
    (table,) = (own_home / "wandb").rglob("*.table.json")
    rows = json.loads(table.read_text())
    assert rows["columns"][:5] == ["grid", "method", "cell", "ours", "stderr"]
    assert [row[:3] for row in rows["data"]] == [["full", "fp", "ppl"], ["w4", "rtn", "ppl"]]
    fp = next(r for r in record.load(own_home / "records") if r.data["run"]["method"] == "fp")
    assert isinstance(rows["data"][0][3], float)  # sortable, plottable
    assert rows["data"][0][3] == pytest.approx(fp.metrics["python-docs"]["values"]["ppl"], rel=1e-6)
    assert [b"logged" in file.read_bytes() for file in files] == [True] * 3


def test_an_experiment_that_is_a_figure_ends_with_its_picture(own_home, monkeypatch, tmp_path):
    layout = """
hydra: {mode: MULTIRUN, sweeper: {params: {model: tiny-llama, method: teq, grid: w4}}}
train: {steps: 2}
evals: [python-docs]
ppl: {limit: 2, context: 64}
layout: {kind: figure, title: T, caption: C}
"""
    add_experiment(monkeypatch, tmp_path, "drawn", layout)
    jobs = config.jobs(["experiments=drawn", "logger=wandb"])
    for job in jobs:
        cli.run_job(job)
    assert cli.summary(jobs) == 0
    (picture,) = (own_home / "wandb").rglob("media/images/figure*.png")
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_a_failing_start_is_said_and_the_run_goes_on(monkeypatch, caplog, tmp_path):
    import wandb

    def refuse(**_):
        raise wandb.errors.CommError("no network\nat all")

    monkeypatch.setattr(wandb, "init", refuse)
    with Wandb(project="teq").start("run", {}, str(tmp_path)) as started:
        assert started is None
    assert "no network" in caplog.text and "not logged" in caplog.text


def test_a_failed_job_does_not_leave_its_run_to_the_next(own_home, monkeypatch):
    jobs = config.jobs(["-m", *TINY, "method=rtn,fp", "logger=wandb"])
    plain, failed = cli.pipeline.run, []

    def run(spec, *rest):
        if spec.method == "rtn":
            failed.append(spec.method)
            raise RuntimeError("out of luck")
        return plain(spec, *rest)

    monkeypatch.setattr(cli.pipeline, "run", run)
    for job in jobs:
        cli.run_job(job)
    assert failed == ["rtn"]
    found = [file.read_bytes() for file in runs(own_home / "wandb")]
    assert len(found) == 2
    assert sorted(b"python-docs/ppl" in content for content in found) == [False, True]


def test_an_error_without_words_stops_no_run(monkeypatch, caplog, tmp_path):
    import wandb

    def refuse(**_):
        raise TimeoutError

    monkeypatch.setattr(wandb, "init", refuse)
    with Wandb(project="teq").start("run", {}, str(tmp_path)) as started:
        assert started is None
    assert "TimeoutError" in caplog.text
