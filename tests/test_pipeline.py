"""The chain: what is shared, what is cached, what is stored is what is evaluated, and no silent no-op."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch
from tiny_jobs import GPTQ, QUICK, run

import run as entry
from teq import config
from teq.models.checkpoint import Checkpoint
from teq.pipeline.loaded import LoadedModel
from teq.pipeline.store import Store
from teq.quantizers.rtn import Rtn
from teq.transforms.teq.settings import Teq
from teq.verbs import run as cli


def cached(finished):
    return {name: stage["cached"] for name, stage in finished.data["stages"].items()}


def test_teq_and_teq_gptq_train_once(own_home):
    first = run(own_home, "method=teq")
    second = run(own_home, "method=teq+gptq")
    assert cached(first) == {"scales": False, "weights": False, "python-docs": False}
    assert cached(second) == {"scales": True, "weights": False, "python-docs": False}
    assert first.data["stages"]["scales"]["key"] == second.data["stages"]["scales"]["key"]
    assert first.id != second.id


def test_the_baseline_does_not_depend_on_the_grid(own_home):
    first = run(own_home, "method=fp", "bits=3")
    second = run(own_home, "method=fp", "bits=4", "group_size=-1")
    assert first.id == second.id and first.file == second.file


def test_rerun_computes_and_loads_nothing(own_home, monkeypatch):
    first = run(own_home, "method=teq+gptq")

    def never(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(LoadedModel, "pristine", never)
    second = run(own_home, "method=teq+gptq")
    assert second.data == first.data  # a record is written once


def test_record_holds_what_tables_need(own_home):
    finished = run(own_home, "method=teq", "train.steps=3")
    data = finished.data
    assert data["run"]["transform"]["steps"] == 3 and len(data["training"]["loss"]) == 3
    assert len(data["training"]["scales"]) == 4
    site = data["training"]["scales"]["model.layers.0.input_layernorm"]
    assert sum(site["s"]["counts"]) == site["channels"] == 64
    assert data["metrics"]["python-docs"]["info"]["windows"] == 2
    assert len(data["metrics"]["python-docs"]["info"]["tokens_sha256"]) == 64
    assert data["stages"]["scales"]["cost"]["seconds"] > 0
    assert data["stages"]["scales"]["cost"]["machine"]["versions"]["torch"].startswith("2.")
    assert {"sources", "commit", "dirty"} == data["code"].keys()
    assert json.loads(finished.file.read_text()) == data


def test_edited_artefact_is_found_and_made_again(own_home, caplog):
    finished = run(own_home, "method=rtn")
    weights = own_home / "store" / "weights" / finished.data["stages"]["weights"]["key"] / "data.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    again = run(own_home, "method=rtn", "ppl.limit=1")
    assert "does not match its digest" in caplog.text and "computed again" in caplog.text
    assert cached(again) == {"scales": True, "weights": False, "python-docs": False}


def changed_result(monkeypatch, owner, name, change):
    """From now on `owner.name` gives what `change` makes of its result."""
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **options: change(original(*args, **options)))


def test_another_result_makes_another_record_and_says_so_the_same_one_keeps_its_record(
    own_home, monkeypatch, caplog
):
    first = run(own_home, "method=rtn")
    shutil.rmtree(own_home / "store")
    assert run(own_home, "method=rtn").file == first.file and "with other results" not in caplog.text
    shutil.rmtree(own_home / "store")
    (job,) = config.jobs([*QUICK, "method=rtn"])

    def higher(metric):
        return dataclasses.replace(metric, values={"ppl": metric.values["ppl"] + 1})

    changed_result(monkeypatch, type(job.run.evals[0]), "measure", higher)
    second = run(own_home, "method=rtn")
    assert second.id == first.id and second.file != first.file and first.file.is_file()
    values = [one.metrics["python-docs"]["values"]["ppl"] for one in (first, second)]
    assert values[1] == values[0] + 1
    assert f"{first.id}: computed again, with other results than in {first.file.name}" in caplog.text
    assert run(own_home, "method=rtn").file == second.file  # what the store holds decides


def results(home, finished):
    """By stage of a record: the digests of its result and of those it was made from, in the store."""
    found = {}
    for name, stage in finished.data["stages"].items():
        folder = home / "store" / (name if name in ("scales", "weights") else "metrics") / stage["key"]
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["result"] == stage["digest"], name
        found[name] = manifest["result"], manifest["reads"]
    return found


@pytest.mark.parametrize("gone", [["scales"], ["scales", "weights"], ["weights"]], ids=" ".join)
def test_a_record_never_mixes_results_of_other_scales_with_metrics(own_home, monkeypatch, gone):
    """What is deleted is made anew, with another result, by another run or for a record that is missing."""
    first = run(own_home, "method=teq")
    for stage in gone:
        shutil.rmtree(own_home / "store" / stage)
    owner, name = (Teq, "fit") if "scales" in gone else (Rtn, "quantize")

    def uneven(made):
        tensors = {
            key: t * torch.linspace(1, 2, t.shape[-1]) for key, t in made[0].items() if t.is_floating_point()
        }
        return made[0] | tensors, made[1]

    changed_result(monkeypatch, owner, name, uneven)
    if gone == ["scales"]:
        run(own_home, "method=teq+gptq")  # shares the scales
    else:
        first.file.unlink()
    again = run(own_home, "method=teq")
    found = results(own_home, again)
    assert found["weights"][1] == {"scales": found["scales"][0]}
    assert found["python-docs"][1] == {"weights": found["weights"][0]}
    before = {name: stage["digest"] for name, stage in first.data["stages"].items()}
    changed = {name for name in found if found[name][0] != before[name]}
    assert changed >= {"weights", "python-docs"} and ("scales" in changed) == ("scales" in gone)


def test_nor_with_a_metric_that_was_made_before_the_scales_were_made_anew(own_home, monkeypatch):
    """A second evaluation reads the weights that are there; only the record asks for the scales again."""
    run(own_home, "method=teq")
    shutil.rmtree(own_home / "store" / "scales")

    def uneven(made):
        return {key: t * torch.linspace(1, 2, t.shape[-1]) for key, t in made[0].items()}, made[1]

    changed_result(monkeypatch, Teq, "fit", uneven)
    again = run(own_home, "method=teq", "evals=[python-docs,lastword-python-docs]", "tasks.limit=2")
    found = results(own_home, again)
    assert found["weights"][1] == {"scales": found["scales"][0]}
    for name in ("python-docs", "lastword-python-docs"):
        assert found[name][1] == {"weights": found["weights"][0]}, name


@pytest.mark.parametrize(
    "gone", ["scales", "weights", "weights/*/data.safetensors", "scales/*/data.safetensors"]
)
def test_what_was_pruned_is_not_made_again_for_what_is_there(own_home, monkeypatch, gone):
    first = run(own_home, "method=teq+gptq")
    for path in (own_home / "store").glob(gone):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "load", lambda *_: pytest.fail("a model was loaded"))
        assert run(own_home, "method=teq+gptq").file == first.file
        if "data" in gone:  # the manifests still tell a new record what it needs
            first.file.unlink()
            again = run(own_home, "method=teq+gptq")
            assert again.file == first.file and again.data["training"] == first.data["training"]


def start(home, *argv, **environment):
    root = pathlib.Path(__file__).resolve().parent.parent
    command = [sys.executable, str(root / "run.py"), *QUICK, *GPTQ, *argv]
    variables = {**os.environ, "TEQ_HOME": str(home), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(command, env=variables, cwd=home.parent, stdout=-1, stderr=-2, text=True)


def test_three_processes_compute_each_stage_once_and_the_next_loads_no_model(own_home, capsys):
    own_home.mkdir()
    sweep = ["-m", "method=fp,rtn,gptq,teq,teq+gptq", "ppl.limit=1", "train.length=32"]
    processes = [start(own_home, *sweep) for _ in range(3)]
    logs = [process.communicate(timeout=500)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 3, logs
    assert all("5 records in" in log for log in logs)
    together = "".join(logs)
    # scales of identity and of teq, weights of five methods, one metric each
    assert together.count(": computing") == 12 and together.count(": done in") == 12
    assert entry.main([*QUICK, *GPTQ, *sweep]) == 0
    log = "".join(capsys.readouterr())
    assert log.count(": cached") == 5 and "loading" not in log  # the metrics
    assert len(list((own_home / "records").glob("*.json"))) == 5
    assert not list((own_home / "store").rglob("*making*")) and not list(own_home.glob("partial/*"))


@pytest.mark.parametrize(
    ("stage", "said"), [("scales", "scales"), ("weights", "weights"), ("metrics", "metrics")]
)
def test_interrupt_in_every_stage_is_one_line_and_loses_nothing(own_home, monkeypatch, capsys, stage, said):
    original = Store.get

    def interrupted(self, asked, device, content=False):
        def stop(*_, **__):
            raise KeyboardInterrupt

        if asked.name == stage:
            object.__setattr__(asked, "make", stop)
        return original(self, asked, device, content)

    argv = [*QUICK, *GPTQ, "method=teq"]
    with monkeypatch.context() as patch:
        patch.setattr(Store, "get", interrupted)
        assert entry.main(argv) == 130
    printed = capsys.readouterr()
    assert cli.INTERRUPTED in printed.err and "Traceback" not in printed.err + printed.out
    finished = {"scales": 0, "weights": 1, "metrics": 2}[stage]
    store = own_home / "store"
    kept = [p for s in ("scales", "weights", "metrics") for p in (store / s).glob("*") if p.is_dir()]
    assert len(kept) == finished
    assert entry.main(argv) == 0
