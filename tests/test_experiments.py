"""conf/ and experiments/: every file expands, shows what it says, and counts what the paper counts."""

import pytest

from teq import config
from teq.report.cells import Table
from teq.report.layout import ANY, FULL
from teq.report.match import RecordIndex
from teq.report.read import experiments, read

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
