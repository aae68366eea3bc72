"""conf/ and experiments/: every file expands, shows what it says, and counts what the paper counts."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from record_factory import add_experiment
from safetensors.torch import load_file

from teq import config
from teq.device.runtime import Runtime
from teq.evaluate.counts import Counts
from teq.evaluate.overhead import Overhead
from teq.grid import Grid
from teq.models.checkpoint import Checkpoint
from teq.pipeline import run as pipeline
from teq.pipeline.store import Store
from teq.report import cells
from teq.report.cells import Table
from teq.report.layout import ANY, CELL, FULL
from teq.report.layout_checks import parse
from teq.report.match import RecordIndex
from teq.report.read import experiments, read
from teq.spec import UserError

NOTHING = RecordIndex(config.ROOT / "no-such-folder")
METHODS = set(config.groups()["method"])


def methods(name):
    """The methods that an experiment sweeps."""
    return set(config.experiment(name)["hydra"]["sweeper"]["params"]["method"].split(","))


@pytest.mark.parametrize("name", experiments())
def test_every_experiment_expands_and_places_every_published_number(name):
    assert methods(name) <= METHODS
    body = read(name, (), NOTHING).body
    if not isinstance(body, Table) or body.layout.published is None:
        return
    shown = {(*row, *column): value.published for (row, column), value in body.cells.items()}
    numbers = [leaf for leaf in _leaves(body.layout.published.numbers) if leaf is not None]
    assert sorted(map(str, numbers)) == sorted(str(value) for value in shown.values() if value is not None)


def _leaves(node):
    if isinstance(node, dict):
        return [leaf for value in node.values() for leaf in _leaves(value)]
    return node


def test_a_model_narrows_an_experiment():
    jobs = config.jobs(["experiments=table1", "model=opt-6.7b"])
    assert {job.run.model.name for job in jobs} == {"opt-6.7b"}
    assert len(jobs) == 10
    other = read("table1", ["model=tiny-opt"], NOTHING).body
    assert other.constant == {"model": "tiny-opt"}
    assert all(value.published is None for value in other.cells.values())


def test_methods_without_a_grid_run_once_and_show_one_row():
    body = read("table1", ["model=opt-6.7b", "method=fp,rtn"], NOTHING).body
    assert body.rows == [(FULL, "fp"), ("w4", "rtn"), ("w4_g128", "rtn")]


def test_runs_that_do_not_read_an_axis_show_one_row():
    body = read("ablation_steps", ["train.steps=1,2"], NOTHING).body
    assert body.rows == [("rtn", ANY), ("teq", "1"), ("teq", "2")]


def test_a_grid_is_one_name_for_bits_and_group_size():
    (named,) = config.jobs(["grid=w3_g128", "model=tiny-opt"])
    (spelled,) = config.jobs(["bits=3", "group_size=128", "model=tiny-opt"])
    assert named.run.key() == spelled.run.key()
    with pytest.raises(UserError, match=r"bits=.4. has no effect beside grid=w3_g128.*choose grid="):
        config.jobs(["grid=w3_g128", "bits=4"])


def test_act_order_methods_differ_from_gptq_in_that_alone():
    runs = {
        name: config.jobs([f"method={name}", "model=tiny-opt"])[0].run.quantizer.plain()
        for name in ("gptq", "gptq-ao", "teq+gptq-ao")
    }
    assert {key for key in runs["gptq"] if runs["gptq"][key] != runs["gptq-ao"][key]} == {"act_order"}
    assert runs["gptq-ao"] == runs["teq+gptq-ao"]
    assert runs["gptq-ao"]["static_groups"] is False


@pytest.fixture(scope="module")
def counted():
    """Table 9 by coordinates, its records made by counting."""
    found = {}
    for job in config.jobs(["experiments=table9"]):
        lm = job.run.model.load("float32", "cpu")
        found[job.run.model.name] = Counts().measure(lm, Runtime()).values
    return found


def test_table_9_equals_the_paper_but_for_two_counts_that_contradict_their_rows(counted):
    layout = parse("table9", config.experiment("table9")["layout"])
    differing = {}
    for model, values in counted.items():
        for name, cell in layout.cells.items():
            published = layout.published.at({"model": model, CELL: name}, layout.rows)
            ours = cell.apply([values[metric.rpartition(".")[2]] for metric in cell.names])
            if published is not None and round(ours, cell.digits) != published:
                differing[model, name] = (ours, published)
    assert differing == {("opt-6.7b", "groups"): (96, 72), ("opt-13b", "groups"): (120, 96)}
    assert len(layout.published.numbers) == 6


def test_counts_follow_the_dimensions(counted):
    (job,) = config.jobs(["experiments=table9", "model=opt-6.7b", "model.config.num_hidden_layers=31"])
    values = Counts().measure(job.run.model.load("float32", "cpu"), Runtime()).values
    whole = counted["opt-6.7b"]
    assert (values["blocks"], values["groups"]) == (31, 93)
    assert whole["trained"] - values["trained"] == 4096 + 4096 + 16384
    (wider,) = config.jobs(["experiments=table9", "model=opt-6.7b", "model.config.ffn_dim=16000"])
    values = Counts().measure(wider.run.model.load("float32", "cpu"), Runtime()).values
    assert whole["trained"] - values["trained"] == 32 * 384


def test_counting_allocates_nothing(counted):
    (job,) = config.jobs(["experiments=table9", "model=opt-13b"])
    lm = job.run.model.load("float32", "cpu")
    assert {parameter.device.type for parameter in lm.model.parameters()} == {"meta"}


def test_run_py_writes_count_records_that_the_report_shows(own_home):
    command = [sys.executable, str(config.ROOT / "run.py"), "experiments=table9", "model=opt-6.7b,llama-7b"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    body = read("table9", ["model=opt-6.7b,llama-7b"], RecordIndex(own_home / "records")).body
    verdicts = {place: value.verdict for place, value in body.cells.items()}
    assert verdicts.pop((("opt-6.7b",), ("groups",))) == cells.DIFFERS
    assert set(verdicts.values()) == {cells.MATCH}
    assert len(verdicts) == 13


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["method=teq", "evals=[counts]"],
            "method=teq needs weights: beside model.weights=none choose method=fp",
        ),
        (["method=fp", "evals=[ptb]"], r"evals=ptb needs weights: .* choose evals=\[counts\]"),
        (["model.weights=nothing"], "model.weights=nothing is not allowed: it must be null .* or none"),
    ],
)
def test_what_needs_weights_is_refused_without_them(overrides, message):
    with pytest.raises(UserError, match=message):
        config.jobs(["model=tiny-opt", "model.weights=none", *overrides])


def test_an_experiment_with_an_unknown_key(monkeypatch, tmp_path):
    add_experiment(monkeypatch, tmp_path, "bad", "ppl: {contxt: 3}\nhydra: {mode: MULTIRUN}\n")
    with pytest.raises(UserError, match=r"experiments/bad.yaml sets 'ppl.contxt'.*did you mean ppl.context"):
        config.jobs(["experiments=bad"])


def test_table_8_is_what_the_recipe_resolves_to():
    body = read("table8", (), NOTHING).body
    assert {value.verdict for value in body.cells.values()} == {cells.AS_STATED}
    special = {
        (row[0], column[0]): value.ours
        for (row, column), value in body.cells.items()
        if value.ours not in ("ones", 1e-3)
    }
    assert special == {
        ("opt-6.7b", "w4_g128"): "inv_sqrt",
        ("opt-13b", "w4"): "inv_sqrt",
        ("opt-13b", "w3_g128"): "inv_sqrt",
        ("bloom-3b", "w4"): "inv_sqrt",
        ("bloom-7b1", "w4"): "inv_sqrt",
        ("llama-7b", "w4"): 4e-4,
        ("llama-13b", "w4_g128"): 2e-4,
    }


def test_the_hours_on_real_data_train_one_grid_as_long_as_the_paper():
    trained = {
        job.run.transform.grid: (job.run.transform.steps, job.run.transform.lr, job.run.transform.parameter)
        for job in config.jobs(["experiments=smollm2", "method=teq"])
    }
    assert trained == {
        Grid(bits=4, group_size=-1): (1000, 1e-3, "clip"),
        Grid(bits=4, group_size=128): (100, 1e-2, "log"),
        Grid(bits=3, group_size=128): (100, 1e-2, "log"),
    }


def test_an_outline_is_a_checkpoint_of_its_own():
    real, outline = (
        config.jobs(["model=opt-6.7b", "method=fp", "evals=[counts]", f"model.weights={weights}"])[0].run
        for weights in ("null", "none")
    )
    assert isinstance(outline.model, Checkpoint)
    assert real.key() != outline.key()


def test_a_folded_model_is_its_original_architecture_and_function(own_home, family):
    given = [f"model=tiny-{family}", "train.steps=3", "train.lr=0.05", "evals=[overhead,python-docs]"]
    given += ["ppl.context=64", "ppl.limit=2"]
    jobs = {method: config.jobs([*given, f"method={method}"])[0] for method in ("fp", "teq-fp")}
    finished = {}
    for method, job in jobs.items():
        finished[method] = pipeline.run(job.run, Store(own_home / "store"), own_home, Runtime(), None)
    weights = finished["teq-fp"].data["stages"]["weights"]["key"]
    changed = load_file(own_home / "store" / "weights" / weights / "data.safetensors")
    plain = jobs["fp"].run.model.load("float32", "cpu").model.state_dict()
    assert any((changed[name] != plain[name.removeprefix("param/")]).any() for name in changed)
    for one in finished.values():
        counts = one.metrics["overhead"]["values"]
        assert counts["modules"] == counts["original_modules"] > 0
        assert counts["parameters"] == counts["original_parameters"] > 0
        assert counts["latency"] == np.median(one.array("overhead", "ratio")) > 0
    fp, folded = (one.metrics["python-docs"]["values"]["ppl"] for one in finished.values())
    assert folded == pytest.approx(fp, rel=1e-5)


def test_an_altered_architecture_is_refused(tiny):
    lm = tiny("llama")
    lm.model.model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"not of its original architecture.*extra"):
        Overhead(length=8, repeats=3).measure(lm, Runtime())
