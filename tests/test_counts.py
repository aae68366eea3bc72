"""Counts of parameters equal the paper's."""

import pytest

import run as entry
from teq import config
from teq.device.runtime import Runtime
from teq.evaluate.counts import Counts
from teq.report import cells
from teq.report.layout import CELL
from teq.report.layout_checks import parse
from teq.report.match import RecordIndex
from teq.report.read import read


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
    assert entry.main(["experiments=table9", "model=opt-6.7b,llama-7b"]) == 0
    body = read("table9", ["model=opt-6.7b,llama-7b"], RecordIndex(own_home / "records")).body
    verdicts = {place: value.verdict for place, value in body.cells.items()}
    assert verdicts.pop((("opt-6.7b",), ("groups",))) == cells.DIFFERS
    assert set(verdicts.values()) == {cells.MATCH}
    assert len(verdicts) == 13
