"""Layouts, verdicts, claims and the rendered text, on records written by hand."""

import copy
import json
import pathlib

import numpy as np
import pytest
from record_factory import add_experiment, made
from scipy import stats

from teq import config, record
from teq.report import claims, compare, match
from teq.report import table as tables
from teq.report.cells import (
    BETTER,
    DIFFERS,
    MATCH,
    NOT_RUN,
    ONE_SEED,
    OURS,
    PARTIAL,
    UNJUDGED,
    WORSE,
)
from teq.report.layout import Formula
from teq.report.layout_checks import parse
from teq.report.match import RecordIndex
from teq.report.render import formats, sheets, wording
from teq.spec import UserError

GOLDEN = """\
hydra:
  mode: MULTIRUN
  sweeper:
    params: {model: "tiny-opt,tiny-llama", method: "fp,rtn,teq", grid: w3_g64, recipe: quick}
evals: [python-docs, lastword-python-docs]
layout:
  title: A table
  caption: Made by hand.
  rows: [grid, method]
  columns: [model]
  cells:
    ppl: {label: perplexity, mean: [python-docs.ppl], best: lowest, allowance: 0.1}
    seconds: {label: seconds, sum: [seconds.scales, seconds.weights], digits: 0, best: lowest}
  published:
    across: {model: [tiny-opt], cell: [ppl, seconds]}
    numbers:
      full: {fp: [7.0, null]}
      w3_g64: {rtn: [9.0, null], teq: [8.0, 30]}
  claims:
    - {says: TEQ beats RTN, winners: [teq], losers: [rtn], count: 1, of: 1}
"""
NOTHING = RecordIndex(config.ROOT / "no-such-folder")
LOSSES = np.log(8) + np.array([0.01, -0.02, 0.03, -0.01, 0.0, 0.02, -0.03, 0.0])


def undecided(cell):
    """Whether a cell was compared with its baseline and does not differ significantly from it."""
    return cell.versus is not None and not cell.versus.significant


def filled(name, records, overrides=()):
    """The table of an experiment from the records of a folder."""
    jobs = config.jobs([f"experiments={name}", *overrides])
    return tables.fill(name, parse(name, jobs[0].layout), jobs, RecordIndex(records))


def sheet(name, records):
    """The sheet of an experiment's table."""
    return sheets.of_table(filled(name, records))


def of(jobs, model, method):
    """The run of a model and a method."""
    return next(j for j in jobs if (j.run.model.name, j.run.method) == (model, method))


@pytest.fixture
def golden(monkeypatch, tmp_path):
    """Records for GOLDEN: exact, partial, synthetic and missing cells."""
    add_experiment(monkeypatch, tmp_path, "golden", GOLDEN)
    jobs, folder = config.jobs(["experiments=golden"]), tmp_path / "records"
    made(folder, of(jobs, "tiny-opt", "fp"), evals={"python-docs": LOSSES - 0.12}, seconds=0.25)
    made(folder, of(jobs, "tiny-opt", "rtn"), evals={"python-docs": LOSSES + 0.5}, seconds=2)

    def shorter(data):
        data["run"]["transform"]["steps"] = 50

    made(folder, of(jobs, "tiny-opt", "teq"), evals={"python-docs": LOSSES}, seconds=20, change=shorter)

    def synthetic(data):
        data["run"]["model"]["source"]["kind"] = "Synthetic"

    made(folder, of(jobs, "tiny-llama", "rtn"), evals={"python-docs": LOSSES}, seconds=3, change=synthetic)
    return folder


def test_a_table_with_a_missing_a_partial_and_a_synthetic_cell_is_the_golden_one(golden):
    shown = formats.markdown(sheet("golden", golden))
    assert shown == (pathlib.Path(__file__).parent / "golden_table.md").read_text(encoding="utf-8")


def test_synthetic_weights_never_enter_an_accuracy(golden):
    table = filled("golden", golden)
    row, column = ("w3_g64", "rtn"), ("tiny-llama",)
    assert table.cells[row, (*column, "ppl")].verdict == NOT_RUN
    assert table.cells[row, (*column, "seconds")].synthetic


def test_narrowed_by_overrides(golden):
    table = filled("golden", golden, ["model=tiny-opt", "method=fp,teq"])
    assert table.rows == [("full", "fp"), ("w3_g64", "teq")]
    assert table.constant == {"model": "tiny-opt"}


@pytest.mark.parametrize(
    ("ours", "published", "best", "verdict"),
    [
        (10.004, 10.0, "lowest", MATCH),  # the printed digits
        (10.104, 10.0, "lowest", MATCH),  # and the allowance
        (10.2, 10.0, "lowest", WORSE),
        (9.8, 10.0, "lowest", BETTER),
        (10.2, 10.0, "highest", BETTER),
        (9.8, 10.0, "highest", WORSE),
        (9.8, 10.0, None, DIFFERS),
        (9.8, None, "highest", OURS),
    ],
)
def test_verdicts(ours, published, best, verdict):
    formula = Formula(label="x", mean=("a.ppl",), best=best, allowance=0.05, allowance_percent=0.5)
    assert tables._verdict([ours], published, formula, seeded=False) == verdict


def test_one_draw_of_calibration_text_and_seconds_are_not_judged():
    formula = Formula(label="x", mean=("a.ppl",), best="lowest")
    assert tables._verdict([10.0], 10.0, formula, seeded=True) == ONE_SEED
    assert tables._verdict([10.0, 10.0], 10.0, formula, seeded=True) == MATCH
    seconds = Formula(label="s", sum=("seconds.scales",), best="lowest")
    assert tables._verdict([600.0], 1239.0, seconds, seeded=True) == UNJUDGED


def test_the_noise_of_seeds_widens_the_tolerance(monkeypatch, tmp_path):
    add_experiment(monkeypatch, tmp_path, "three", GOLDEN.replace("recipe: quick", 'seed: "0,1,2"'))
    jobs = [j for j in config.jobs(["experiments=three"]) if j.run.model.name == "tiny-opt"]
    teq = [j for j in jobs if j.run.method == "teq"]
    for job, shift in zip(teq, (0.0, 0.1, 0.2), strict=True):
        made(tmp_path / "records", job, evals={"python-docs": LOSSES + shift})
    cell = filled("three", tmp_path / "records").cells[("w3_g64", "teq"), ("tiny-opt", "ppl")]
    numbers = 8 * np.exp([0.0, 0.1, 0.2])
    assert cell.ours == pytest.approx(numbers.mean()) and cell.seeds == pytest.approx(numbers)
    assert cell.spread == pytest.approx(numbers.std(ddof=1))
    assert cell.verdict == MATCH  # 8.86 against 8.0: another mean of three such seeds may lie there
    made(tmp_path / "records", of(jobs, "tiny-opt", "rtn"), evals={"python-docs": LOSSES})
    assert "sd 0.89 over 3 seeds" in formats.markdown(sheet("three", tmp_path / "records"))


def published_pairs():
    """The table, and each cell of Tables 1 to 4 with the published numbers of the other methods there."""
    found = []
    for name in ("table1", "table2", "table3", "table4"):
        jobs = config.jobs([f"experiments={name}"])
        table = tables.fill(name, parse(name, jobs[0].layout), jobs, NOTHING)
        for cell in table.cells.values():
            for other in table.cells.values():
                numbers = [one.published for one in (cell, other) if isinstance(one.published, float)]
                same = all(cell.at[axis] == other.at[axis] for axis in cell.at if axis != "method")
                if len(numbers) == 2 and same and cell is not other:
                    found.append((cell.formula, *numbers))
    return found


def test_another_methods_number_is_a_match_in_at_most_one_of_ten_pairs():
    pairs = published_pairs()
    verdicts = [tables._verdict([other] * 3, wanted, formula, True) for formula, wanted, other in pairs]
    assert len(pairs) == 432
    assert verdicts.count(MATCH) <= 43


def test_the_cells_own_number_with_the_noise_of_seeds_is_a_match():
    rng, verdicts = np.random.default_rng(0), []
    for formula, wanted, _ in published_pairs():
        ours = rng.normal(wanted, 0.02 * wanted, size=3)
        verdicts.append(tables._verdict(ours.tolist(), wanted, formula, seeded=True))
    assert verdicts.count(MATCH) >= 0.93 * len(verdicts)


def test_a_missing_seed_makes_the_cell_partial(monkeypatch, tmp_path):
    add_experiment(monkeypatch, tmp_path, "two", GOLDEN.replace("recipe: quick", 'seed: "0,1"'))
    (first, _) = [j for j in config.jobs(["experiments=two", "model=tiny-opt"]) if j.run.method == "teq"]
    made(tmp_path / "records", first, evals={"python-docs": LOSSES})
    value = filled("two", tmp_path / "records").cells[("w3_g64", "teq"), ("tiny-opt", "ppl")]
    assert (value.verdict, wording.difference_text(value)) == (PARTIAL, "1 of 2 seeds are missing")


def test_a_difference_to_rtn_within_chance_is_marked_and_only_on_the_same_tokens(golden):
    noise = np.array([0.3, -0.3, 0.2, -0.2, 0.1, -0.1, 0.25, -0.24])
    jobs = config.jobs(["experiments=golden"])
    for file in golden.iterdir():
        file.unlink()
    made(golden, of(jobs, "tiny-opt", "rtn"), evals={"python-docs": LOSSES})
    made(golden, of(jobs, "tiny-opt", "teq"), evals={"python-docs": LOSSES + noise})
    place = ("w3_g64", "teq"), ("tiny-opt", "ppl")
    assert undecided(filled("golden", golden).cells[place])
    made(
        golden,
        of(jobs, "tiny-opt", "teq"),
        evals={"python-docs": LOSSES - 0.1},
        created="2027",
        change=_again,
    )
    assert not undecided(filled("golden", golden).cells[place])

    def other_tokens(data):
        _again(data)
        data["stages"]["weights"]["key"] = "third"
        data["metrics"]["python-docs"]["info"]["tokens_sha256"] = "1" * 64

    made(
        golden,
        of(jobs, "tiny-opt", "teq"),
        evals={"python-docs": LOSSES + noise},
        created="2028",
        change=other_tokens,
    )
    assert not undecided(filled("golden", golden).cells[place])


def test_several_seeds_are_compared_together(monkeypatch, tmp_path):
    seeds = GOLDEN.replace("params: {model:", 'params: {seed: "0,1", model:')
    add_experiment(monkeypatch, tmp_path, "seeds2", seeds)
    jobs, folder = config.jobs(["experiments=seeds2", "model=tiny-opt"]), tmp_path / "records"
    teq = [job for job in jobs if job.run.method == "teq"]
    made(folder, next(j for j in jobs if j.run.method == "rtn"), evals={"python-docs": LOSSES})
    made(folder, teq[0], evals={"python-docs": LOSSES - 0.1})
    place = ("w3_g64", "teq"), ("tiny-opt", "ppl")
    assert not undecided(filled("seeds2", folder).cells[place])
    made(folder, teq[1], evals={"python-docs": LOSSES + 0.1})
    cell = filled("seeds2", folder).cells[place]
    assert undecided(cell) and cell.versus.difference.mean == pytest.approx(0, abs=1e-9)
    lines = formats.comma_separated(sheet("seeds2", folder)).splitlines()
    header, row = (
        lines[0].split(","),
        next(line for line in lines if line.startswith("w3_g64,teq,tiny-opt,ppl")),
    )
    values = dict(zip(header, row.split(","), strict=False))
    assert float(values["low"]) < 0 < float(values["high"])
    assert values["unit"] == "%" and float(values["p_adjusted"]) > 0.05


@pytest.mark.parametrize(("key", "value"), [("lm_eval", "0.5"), ("bos", "<s>"), ("task_version", 2)])
def test_records_of_another_harness_are_not_paired(golden, key, value):
    jobs = config.jobs(["experiments=golden"])
    for file in golden.iterdir():
        file.unlink()
    correct = [1, 0] * 40

    def harness(data):
        data["metrics"]["lastword-python-docs"]["info"] |= {"lm_eval": "0.4", "bos": None, "task_version": 1}

    def other(data):
        harness(data)
        data["metrics"]["lastword-python-docs"]["info"][key] = value

    formula = Formula(label="x", mean=("lastword-python-docs.acc",), times=100)
    files = [
        made(golden, of(jobs, "tiny-opt", method), evals={"lastword-python-docs": correct}, change=change)
        for method, change in (("rtn", harness), ("teq", harness), ("fp", other))
    ]
    rtn, teq, fp = (one if isinstance(one, record.Record) else record.read(one) for one in files)
    assert compare.compared(formula, [teq], [rtn]) is not None
    assert compare.compared(formula, [fp], [rtn]) is None


def _again(data):
    data["stages"]["weights"]["key"] = "again"


def test_claims_from_published_numbers_and_ours(golden):
    table = filled("golden", golden)
    (claim,) = claims.count_claims({"golden": table})["golden"]
    assert (claim.published.won, claim.published.of) == (1, 1)
    assert (claim.ours.won, claim.ours.of, claim.ours.wins, claim.partial) == (1, 1, 1, 1)  # no seconds


@pytest.mark.parametrize(("name", "counts"), [("table1", [11, 6, 5, 8]), ("table4", [12, 8])])
def test_the_papers_claims_hold_on_its_own_numbers(name, counts):
    layouts = {n: parse(n, config.experiment(n)["layout"]) for n in ("table1", "table3", "table4")}
    found = _claims(name, layouts)
    assert [(c.published.won, c.published.of) for c in found] == [(count, 12) for count in counts]
    assert all((c.published.won, c.published.of) == c.claimed for c in found)


def test_a_changed_published_cell_changes_the_count():
    raw = copy.deepcopy(config.experiment("table1")["layout"])
    raw["published"]["numbers"]["w4"]["teq"][0] = 62.0  # opt-6.7b: below RTN's 62.99
    found = _claims("table1", {"table1": parse("table1", raw)})
    assert [c.published.won for c in found] == [10, 5, 5, 8]


def _claims(name, layouts):
    """The claims of a table, its layout given, without any record."""
    nothing = RecordIndex(config.ROOT / "no-such-folder")
    filled_tables = {}
    for each, layout in layouts.items():
        jobs = config.jobs([f"experiments={each}"])
        filled_tables[each] = tables.fill(each, layout, jobs, nothing)
    return claims.count_claims(filled_tables)[name]


def test_a_metric_that_no_run_measures(monkeypatch, tmp_path):
    add_experiment(monkeypatch, tmp_path, "bad", GOLDEN.replace("python-docs.ppl", "wikitext3.ppl"))
    with pytest.raises(
        UserError, match=r"experiments/bad.yaml: layout.cells.ppl reads 'wikitext3'.*python-docs"
    ):
        filled("bad", tmp_path)


def test_a_metric_that_the_record_does_not_have(golden, monkeypatch, tmp_path):
    add_experiment(monkeypatch, tmp_path, "golden", GOLDEN.replace("python-docs.ppl", "python-docs.bits"))
    with pytest.raises(
        UserError, match=r"cells.ppl reads 'python-docs.bits'.*must be one of python-docs.ppl"
    ):
        filled("golden", golden)


def test_runs_that_the_axes_do_not_tell_apart(monkeypatch, tmp_path):
    add_experiment(monkeypatch, tmp_path, "bad", GOLDEN.replace("recipe: quick", 'train.steps: "1,2"'))
    with pytest.raises(
        UserError, match=r"2 runs fall into one cell \(w3_g64, teq, tiny-opt\): name train.steps"
    ):
        filled("bad", tmp_path)


def test_an_axis_that_the_sweep_does_not_vary(monkeypatch, tmp_path):
    add_experiment(monkeypatch, tmp_path, "bad", GOLDEN.replace("[grid, method]", "[grid, init]"))
    with pytest.raises(UserError, match="names the axis 'init', which the sweep does not vary"):
        filled("bad", tmp_path)


GOOD = {
    "title": "t",
    "caption": "c",
    "rows": ["grid", "method"],
    "columns": ["model"],
    "cells": {"ppl": {"label": "x", "mean": ["a.ppl"]}},
    "published": {"across": {"model": ["m", "n"]}, "numbers": {"w4": {"rtn": [1, 2]}}},
}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["colums"], ["model"], "layout.colums is not known: did you mean columns?"),
        (["title"], 3, "layout.title=3 is not allowed: it must be a text"),
        (["cells", "ppl", "digitz"], 2, "layout.cells.ppl.digitz is not known: did you mean digits?"),
        (
            ["cells", "ppl", "best"],
            "high",
            "layout.cells.ppl.best='high' is not allowed: it must be one of lowest",
        ),
        (["cells", "ppl", "sum"], ["a.b"], "layout.cells.ppl has mean and sum: it must have exactly one"),
        (["cells", "ppl", "mean"], ["ppl"], "layout.cells.ppl.mean='ppl' is not allowed: a metric is"),
        (["cells"], {}, "layout.cells is empty"),
        (["cells"], [1], "layout.cells=.1. is not allowed: it must be a mapping"),
        (
            ["published", "across"],
            {"method": ["rtn"]},
            "published.across.method=.*must be a list for one of model",
        ),
        (
            ["published", "numbers", "w4", "rtn"],
            [1],
            r"numbers.w4.rtn has 1 numbers: it must have 2.*model .m, n",
        ),
        (["published", "numbers", "w4"], [1, 2], "numbers.w4=.*the numbers nest by grid, method"),
        (["published", "numbers", "w4", "rtn"], [1, [2]], "holds .2.: it must be numbers, texts or null"),
        (["claims"], [{"says": "s", "winners": ["a"]}], r"layout.claims\[0\].losers is missing"),
        (
            ["quoted"],
            [{"at": {}, "source": "s", "values": [1]}],
            r"quoted\[0\] is not allowed.*have 2 numbers",
        ),
        (["kind"], "tabel", "layout.kind='tabel' is not allowed: it must be one of table, figure"),
    ],
)
def test_a_wrong_layout_is_one_line_that_names_file_key_and_way_out(path, value, message):
    raw = copy.deepcopy(GOOD)
    node = raw
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(UserError, match=message) as error:
        parse("mine", raw)
    assert str(error.value).startswith("experiments/mine.yaml: layout")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            ["across", "model"],
            ["tiny-opd"],
            r"model=tiny-opd, which no cell can have: did you mean tiny-opt\?",
        ),
        (["only"], {"model": "gpt5"}, "model=gpt5, which no cell can have"),
        (["numbers", "w3_g64"], {"rnt": [1, 2]}, r"method=rnt, which no cell can have: did you mean rtn\?"),
        (
            ["numbers", "w3_g64", "rtn"],
            [1, "two"],
            r"numbers.w3_g64.rtn holds 'two' for second: it must be a number",
        ),
    ],
)
def test_published_numbers_that_no_cell_can_show_are_refused(path, value, message):
    published = {"across": {"model": ["tiny-opt"], "cell": ["first", "second"]}, "numbers": {"w3_g64": {}}}
    published["numbers"]["w3_g64"]["rtn"] = [1, 2]
    cells = {name: {"label": name, "mean": ["python-docs.ppl"]} for name in ("first", "second")}
    raw = {"title": "t", "caption": "c", "rows": ["grid", "method"], "columns": ["model"], "cells": cells}
    node = published
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    known = {"model": ["tiny-opt"], "method": ["rtn", "teq"], "grid": ["w3_g64"]}
    with pytest.raises(UserError, match=message):
        parse("mine", raw | {"published": published}, known)


def test_a_claim_about_no_method_is_refused():
    claim = {"says": "s", "winners": ["teqq"], "losers": ["rtn"], "count": 1, "of": 1}
    raw = {"title": "t", "caption": "c", "rows": ["method"], "claims": [claim]}
    raw["cells"] = {"ppl": {"label": "l", "mean": ["python-docs.ppl"]}}
    with pytest.raises(UserError, match=r"claims\[0\].winners names the method 'teqq': did you mean teq\?"):
        parse("mine", raw, {"method": ["rtn", "teq"]})


def test_an_experiment_that_is_no_yaml_is_one_line(monkeypatch, tmp_path):
    add_experiment(monkeypatch, tmp_path, "broken", "layout: {title: [")
    with pytest.raises(UserError, match="broken") as error:
        config.jobs(["experiments=broken"])
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"layout=\[1, 2\] is not allowed: it must be a mapping"):
        parse("mine", [1, 2])


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data["run"].pop("method"),
        lambda data: data["run"].pop("quantizer"),
        lambda data: data.update(metrics=[1]),
        lambda data: data.update(stages=[1]),
        lambda data: data["metrics"]["python-docs"]["arrays"]["window_loss"].update(data="AAAA"),
        lambda data: data["metrics"]["python-docs"]["values"].update(ppl="high"),
        lambda data: data.pop("text"),
        lambda data: data.update(text={"transform": "pile"}),
        lambda data: data.update(created=7),
        lambda data: data["training"].update(scales={"block.0": {"channels": 8}}),
        lambda data: data["metrics"]["python-docs"]["info"].update(partial=True),
    ],
)
def test_a_damaged_record_is_left_out_and_hides_no_other(golden, damage, caplog):
    file = next(f for f in golden.iterdir() if json.loads(f.read_text())["run"]["method"] == "rtn")
    data = json.loads(file.read_text())
    damage(data)
    file.write_text(json.dumps(data))
    table = filled("golden", golden)
    assert "is left out" in caplog.text and file.name in caplog.text
    assert table.cells[("full", "fp"), ("tiny-opt", "ppl")].verdict == MATCH


def test_the_best_is_found_for_each_model_even_where_models_are_rows(monkeypatch, tmp_path):
    rows = GOLDEN.replace("rows: [grid, method]\n  columns: [model]", "rows: [model, grid, method]")
    rows = rows[: rows.index("  published:")]
    add_experiment(monkeypatch, tmp_path, "rows", rows)
    jobs, folder = config.jobs(["experiments=rows"]), tmp_path / "records"
    for model, shift in (("tiny-opt", 0), ("tiny-llama", 2)):
        for method, gain in (("rtn", 0), ("teq", 0.1)):
            made(folder, of(jobs, model, method), evals={"python-docs": LOSSES + shift - gain})
    values = filled("rows", folder).cells
    best = {row for (row, column), value in values.items() if value.is_best and column[-1] == "ppl"}
    assert best == {("tiny-opt", "w3_g64", "teq"), ("tiny-llama", "w3_g64", "teq")}


def test_a_text_of_which_only_a_part_was_read_makes_a_cell_partial(golden):
    jobs = config.jobs(["experiments=golden"])
    (file,) = [f for f in golden.iterdir() if f.name.startswith(of(jobs, "tiny-opt", "fp").run.key())]
    data = json.loads(file.read_text())
    data["metrics"]["python-docs"]["info"] |= {"partial": True, "rows": 10, "expected_rows": 11}
    file.write_text(json.dumps(data))
    value = filled("golden", golden).cells[("full", "fp"), ("tiny-opt", "ppl")]
    assert value.verdict == PARTIAL
    assert wording.difference_text(value) == "python-docs.rows 10 instead of 11"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda data: data["metrics"]["python-docs"]["info"].update(sha256="b" * 64),
            "python-docs.text bbbb",
        ),
        (lambda data: data.update(identity="other@2222"), "tiny-opt.weights other@2222"),
    ],
)
def test_a_record_of_another_text_or_other_weights_is_marked(golden, change, said):
    jobs = config.jobs(["experiments=golden"])
    made(golden, of(jobs, "tiny-opt", "teq"), evals={"python-docs": LOSSES})
    for file in golden.iterdir():
        data = json.loads(file.read_text())
        data["metrics"]["python-docs"]["info"]["sha256"] = "a" * 64
        if data["run"]["method"] == "fp":
            change(data)
        file.write_text(json.dumps(data))
    values = filled("golden", golden).cells
    value = values[("full", "fp"), ("tiny-opt", "ppl")]
    assert value.verdict == PARTIAL and said in wording.difference_text(value)
    assert values[("w3_g64", "rtn"), ("tiny-opt", "ppl")].verdict == WORSE


def test_an_experiment_without_layout():
    with pytest.raises(UserError, match=r"experiments/mine.yaml: layout is missing"):
        parse("mine", None)


def test_the_nearest_record_is_the_one_with_fewest_differences(golden):
    teq = of(config.jobs(["experiments=golden"]), "tiny-opt", "teq")

    def further(data):
        data["run"]["transform"] |= {"steps": 60, "lr": 0.5}
        data["stages"]["weights"]["key"] = "further"

    made(golden, teq, evals={"python-docs": LOSSES}, created="2030", change=further)
    found = RecordIndex(golden).find(teq.run, {"python-docs"})
    assert dict(found.differences) == {"transform.steps": (100, 50)}
    assert RecordIndex(golden).find(teq.run, {"python-docs"}, fixed=("transform.steps",)) is None
    made(golden, teq, evals={"python-docs": LOSSES}, created="2020", change=_again)
    assert RecordIndex(golden).find(teq.run, {"python-docs"}).differences == {}


@pytest.mark.parametrize("created", ["2020-01-01", "2030-01-01"])
def test_a_real_models_seconds_come_before_made_up_weights(golden, created):
    rtn = of(config.jobs(["experiments=golden"]), "tiny-llama", "rtn")
    assert RecordIndex(golden).find(rtn.run, set(), synthetic=True).record.synthetic

    def real_and_other(data):
        data["run"]["dtype"] = "bfloat16"
        _again(data)

    made(golden, rtn, evals={"python-docs": LOSSES}, created=created, change=real_and_other)
    found = RecordIndex(golden).find(rtn.run, set(), synthetic=True)
    assert not found.record.synthetic and dict(found.differences) == {"dtype": ("float32", "bfloat16")}


def test_another_file_that_stands_in_for_a_text_is_named(golden):
    jobs = config.jobs(["experiments=golden"])
    stands_in = {"name": "pile-10k", "file": "pile/validation.parquet", "partial": True}

    def calibrated(data):
        data["text"]["transform"] = stands_in | {"rows": 512, "expected_rows": 10000}

    made(golden, of(jobs, "tiny-llama", "teq"), evals={"python-docs": LOSSES}, change=calibrated)
    value = filled("golden", golden).cells[("w3_g64", "teq"), ("tiny-llama", "ppl")]
    assert wording.difference_text(value) == (
        "documents for the scales 512 instead of 10000; "
        "text for the scales pile/validation instead of pile/train"
    )


def test_settings_of_other_evaluations_do_not_count(golden):
    teq = of(config.jobs(["experiments=golden", "ppl.limit=3", "tasks.limit=5"]), "tiny-opt", "fp")
    index = RecordIndex(golden)
    assert dict(index.find(teq.run, {"python-docs"}).differences) == {"python-docs.limit": (3, 16)}
    assert index.find(teq.run, {"lastword-python-docs"}) is None
    assert index.find(teq.run, set()).differences == {}


def test_own_records_come_first_unless_they_are_the_published_ones(golden, tmp_path):
    fp = of(config.jobs(["experiments=golden"]), "tiny-opt", "fp")
    own = tmp_path / "own"
    mine = made(own, fp, evals={"python-docs": LOSSES - 0.12}, seconds=0.25)
    found = RecordIndex(golden, own).find(fp.run, {"python-docs"})
    assert not found.unpublished
    mine.file.write_text(mine.file.read_text().replace("0.25", "0.75"))
    found = RecordIndex(golden, own).find(fp.run, {"python-docs"})
    assert found.unpublished
    assert found.record.data["stages"]["scales"]["cost"]["seconds"] == 0.75


def test_a_broken_record_and_one_of_another_schema_are_named_and_hide_nothing(golden, caplog):
    (golden / "a.json").write_text("{")
    old = json.loads(next(golden.glob("*-*.json")).read_text()) | {"schema": 0}
    (golden / "b.json").write_text(json.dumps(old))
    half = json.loads(next(golden.glob("*-*.json")).read_text())
    del half["stages"]["scales"]["cost"]["seconds"]
    (golden / "c.json").write_text(json.dumps(half))
    assert len(record.load(golden)) == 4
    assert "c.json is left out: no 'seconds' in it" in caplog.text
    assert "a.json is left out" in caplog.text
    assert "b.json is left out: schema 0, this version reads 1" in caplog.text


def test_latex_and_csv(golden):
    table = filled("golden", golden)
    latex = formats.latex(sheets.of_table(table))
    stacked = [r"\begin{tabular}[t]{@{}r@{}}13.19\\\scriptsize (9.00, +4.19, worse)\end{tabular}"]
    stacked += [r"\textbf{4} & -- & \begin{tabular}[t]{@{}r@{}}6\\\scriptsize [synthetic]\end{tabular} \\"]
    assert rf"w3\_g64 & rtn & {' & '.join(stacked)}" in latex
    assert latex.count(r"\begin{") == latex.count(r"\end{") and latex.count(r"\toprule") == 1
    rows = formats.comma_separated(sheets.of_table(table)).splitlines()
    assert rows[0].startswith("grid,method,model,cell,ours,stderr,seed_sd,published,difference,verdict")
    assert any(
        r.startswith("w3_g64,teq,tiny-opt,ppl,8,0.0565685") and r.endswith("transform.steps=50") for r in rows
    )
    assert len(rows) == 1 + 12


def test_csv_has_whole_numbers_whole_and_quoted_ones_too(golden, monkeypatch, tmp_path):
    fp = of(config.jobs(["experiments=golden"]), "tiny-llama", "fp")
    made(golden, fp, evals={"python-docs": LOSSES}, seconds=3_644_810_240 / 2)
    assert "full,fp,tiny-llama,seconds,3644810240," in formats.comma_separated(sheet("golden", golden))
    quoted = "  quoted:\n    - {at: {grid: w3_g64, method: teq}, source: their report, values: [7.5, null]}\n"
    add_experiment(monkeypatch, tmp_path, "quoting", GOLDEN + quoted)
    rows = formats.comma_separated(sheet("quoting", golden)).splitlines()
    assert rows[-1] == 'w3_g64,"teq, their report",tiny-opt,ppl,,,,7.5,,quoted,,,,,,,,,,,,,'
    assert len(rows[-1].replace('"teq, their report"', "x").split(",")) == len(rows[0].split(","))


def test_plain_shows_standard_errors_beside_accuracies_alone(golden, tmp_path):
    fp = of(config.jobs(["experiments=golden"]), "tiny-opt", "fp")
    right = np.array([1, 0, 1, 1])
    one = made(tmp_path / "r", fp, evals={"python-docs": LOSSES, "lastword-python-docs": right})
    row = tables.plain([one]).splitlines()[2]
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "tiny-opt", "fp", "", "", "8.000", "0.75 ± 0.25",
    ]  # fmt: skip


def test_what_varies_within_a_place_belongs_to_the_cell():
    jobs = config.jobs(["-m", "model=tiny-opt", "method=rtn,teq", "train.steps=1,2", "init=ones,inv_sqrt"])
    found = match.varying(job.run for job in jobs)
    assert sorted(map(sorted, found.values())) == [[], ["transform.init", "transform.steps"]]


def test_what_is_known_of_a_file_is_said_where_it_was_read_and_nowhere_else(golden):
    """By its digest: the same table of someone with another file does not say it."""
    from teq.data.sources import SOURCES

    assert "hellaswag" in SOURCES and not any("HellaSwag" in note for note in _all_notes())
    table = filled("golden", golden)
    digest, text = next(iter(SOURCES["hellaswag"].known.items()))
    (match, *_) = (match for cell in table.cells.values() for match in cell.matches)
    info = match.record.metrics["python-docs"]["info"]
    assert not any(text in line for line in wording.limits(table))
    info |= {"name": "hellaswag", "sha256": digest}
    assert f"python-docs: {text}" in wording.limits(table)


@pytest.mark.parametrize(
    ("windows", "said"),
    [("first", "the first 4 of 9 windows of 512"), ("even", "4 evenly spaced of 9 windows of 512")],
)
def test_windows_are_said_as_they_were_chosen(golden, windows, said):
    table = filled("golden", golden)
    for shown in (shown for cell in table.cells.values() for shown in cell.matches):
        shown.record.metrics["python-docs"]["info"] |= {"windows": 4, "available_windows": 9, "context": 512}
        for evaluation in shown.record.data["run"]["evals"]:
            evaluation.pop("windows", None)
            if windows == "even":
                evaluation["windows"] = windows
    assert any(f"python-docs: {said} tokens" in line for line in wording.limits(table))


def _all_notes():
    """Every note of every experiment's layout."""
    for name in config.groups()["experiments"]:
        yield from config.experiment(name).get("layout", {}).get("notes", [])


def test_the_nearest_record_is_the_one_that_measured_most(golden):
    """A newer record of one window, with as many settings of its own, does not hide the older of eight."""
    job = of(config.jobs(["experiments=golden", "ppl.limit=3"]), "tiny-llama", "fp")

    def limited(limit):
        def change(data):
            data["run"]["evals"][0]["limit"] = limit
            data["metrics"]["python-docs"]["info"]["windows"] = limit
            data["id"] = f"{limit:016d}"

        return change

    made(golden, job, evals={"python-docs": LOSSES}, change=limited(8), created="2026-01-01")
    made(golden, job, evals={"python-docs": LOSSES[:1]}, change=limited(1), created="2027-01-01")
    found = RecordIndex(golden).find(job.run, {"python-docs"})
    assert found.record.metrics["python-docs"]["info"]["windows"] == 8


def test_a_record_that_was_measured_otherwise_hides_none_that_was_measured_alike(golden):
    """Many short windows of the very method: beside those of other cells its perplexity says nothing."""
    job = of(config.jobs(["experiments=golden"]), "tiny-opt", "teq")
    before = RecordIndex(golden).find(job.run, {"python-docs"})
    assert set(before.differences) == {"transform.steps"}

    def otherwise(data):
        data["run"]["evals"][0]["context"] = 16
        data["metrics"]["python-docs"]["info"]["windows"] = 64
        _again(data)

    made(golden, job, evals={"python-docs": LOSSES}, change=otherwise)
    assert RecordIndex(golden).find(job.run, {"python-docs"}) == before

    def whole(data):
        """All windows are neither the first nor evenly spaced ones."""
        data["run"]["evals"][0] |= {"limit": None}
        data["run"]["evals"][0].pop("windows")
        data["metrics"]["python-docs"]["info"] |= {"windows": 99, "available_windows": 99}
        data["stages"]["weights"]["key"] = "whole"

    made(golden, job, evals={"python-docs": LOSSES}, change=whole)
    found = RecordIndex(golden).find(job.run, {"python-docs"})
    assert found.record.metrics["python-docs"]["info"]["windows"] == 99


DIVERGENCE = """\
hydra:
  mode: MULTIRUN
  sweeper: {params: {model: tiny-opt, method: "fp,rtn,teq", grid: w3_g64, recipe: quick}}
evals: [python-docs]
ppl: {kl: true}
layout:
  title: A table
  caption: Made by hand.
  rows: [grid, method]
  cells:
    ppl: {label: perplexity, mean: [python-docs.ppl], best: lowest}
    bits: {label: bits per weight, mean: [quantization.bits_per_weight]}
    kl: {label: KL, mean: [python-docs.kl], digits: 3, best: lowest}
    top1: {label: top-1 in %, mean: [python-docs.top1], times: 100, digits: 1, best: highest}
"""


def test_divergence_and_agreement_are_columns_with_paired_differences(monkeypatch, tmp_path):
    add_experiment(monkeypatch, tmp_path, "divergence", DIVERGENCE)
    jobs, folder = config.jobs(["experiments=divergence"]), tmp_path / "records"
    noise = np.array([0.01, -0.02, 0.03, -0.01, 0.0, 0.02, -0.03, 0.0])
    arrays = {"rtn": (0.3 + noise, 0.8 + noise), "teq": (0.2 + 0.9 * noise, 0.801 + 0.5 * noise)}
    for method, (kl, top1) in arrays.items():

        def add(data, kl=kl, top1=top1):
            data["quantization"]["bits_per_weight"] = 3.3
            measured = data["metrics"]["python-docs"]
            measured["values"] |= {"kl": kl.mean(), "top1": top1.mean()}
            measured["arrays"] |= {"window_kl": record.pack(kl), "window_top1": record.pack(top1)}

        made(folder, of(jobs, "tiny-opt", method), evals={"python-docs": LOSSES}, change=add)

    def before(data):
        del data["run"]["evals"][0]["kl"]

    made(folder, of(jobs, "tiny-opt", "fp"), evals={"python-docs": LOSSES - 0.1}, change=before)
    cells = {(row[1], column[-1]): cell for (row, column), cell in filled("divergence", folder).cells.items()}
    kl, top1 = cells["teq", "kl"], cells["teq", "top1"]
    assert kl.ours == pytest.approx(0.2) and kl.is_best and not cells["rtn", "kl"].is_best
    assert kl.stderr == pytest.approx(0.9 * noise.std(ddof=1) / np.sqrt(8))
    assert kl.versus.unit == "nats" and kl.versus.significant
    expected = stats.ttest_rel(*(arrays[method][0] for method in ("teq", "rtn")))
    assert kl.versus.difference.mean == pytest.approx(-0.1) and kl.versus.difference.p == pytest.approx(
        expected.pvalue
    )
    assert top1.versus.unit == "points" and undecided(top1) and top1.is_best
    assert top1.ours == pytest.approx(80.1) and top1.versus.difference.mean == pytest.approx(0.1)
    # a record from before the option has the perplexity, and no other cell
    assert cells["fp", "ppl"].verdict == OURS and cells["fp", "kl"].verdict == NOT_RUN
    assert [cells[method, "bits"].ours for method in ("fp", "rtn", "teq")] == [32, 3.3, 3.3]
    assert cells["teq", "bits"].versus is None


def test_records_from_before_bits_per_weight_leave_its_cell_empty(monkeypatch, tmp_path):
    add_experiment(monkeypatch, tmp_path, "divergence", DIVERGENCE)
    jobs, folder = config.jobs(["experiments=divergence"]), tmp_path / "records"
    made(folder, of(jobs, "tiny-opt", "rtn"), evals={"python-docs": LOSSES})
    cells = {(row[1], column[-1]): cell for (row, column), cell in filled("divergence", folder).cells.items()}
    assert cells["rtn", "bits"].verdict == NOT_RUN and cells["rtn", "ppl"].verdict == OURS


def test_any_metric_that_is_a_mean_over_documents_is_compared(golden):
    """lm-eval's exact_match, say: by McNemar where each document is right or wrong."""
    jobs, name = config.jobs(["experiments=golden"]), "exact_match,strict-match"
    correct = {"rtn": np.array([1, 0, 0, 1, 0, 0, 0, 1.0]), "teq": np.array([1, 1, 1, 1, 1, 1, 0, 0.0])}
    found = []
    for method, values in correct.items():

        def add(data, values=values):
            measured = data["metrics"]["lastword-python-docs"]
            measured["values"] |= {name: values.mean(), "perplexity": 3.0}
            measured["arrays"] |= {name: record.pack(values), "perplexity": record.pack(-values)}

        job, given = of(jobs, "tiny-opt", method), {"lastword-python-docs": [1, 0]}
        found.append(made(golden, job, evals=given, change=add, created="2026-02-01"))
    formula = Formula(label="x", mean=(f"lastword-python-docs.{name}",), times=100)
    one = compare.compared(formula, found[1:], found[:1])
    assert one.difference.mean == pytest.approx(100 * 3 / 8) and one.unit == "points"
    assert one.difference.p == pytest.approx(stats.binomtest(4, 5).pvalue)
    assert one.discordant == (4, 1) and one.n == 8
    half = stats.t.ppf(0.975, 7) * stats.sem(correct["teq"])
    expected = [100 * (6 / 8 + side * half) for side in (-1, 1)]
    assert compare.interval(formula, found[1:]) == (*map(pytest.approx, expected), 8)
    # an aggregate that is no mean of its array has no error
    other = Formula(label="x", mean=("lastword-python-docs.perplexity",))
    assert compare.compared(other, found[1:], found[:1]) is None
    assert compare.stderr(found[0], "lastword-python-docs.perplexity") is None
