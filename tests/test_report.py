"""The verbs `report` and `publish`, the page in a browser, and the notebook."""

import json
import re
import subprocess
import sys

import chromium
import numpy as np
import pytest
from record_factory import add_experiment, made

from teq import __main__ as verbs
from teq import config, record
from teq.report import read as report
from teq.report.match import RecordIndex

TABLE = """\
hydra:
  mode: MULTIRUN
  sweeper:
    params: {model: "tiny-opt,tiny-llama", method: "fp,rtn,teq", grid: "w4,w3_g64", recipe: quick}
evals: [python-docs]
layout:
  title: "Added: <one> file & no code"
  caption: Made by a test.
  rows: [grid, method]
  columns: [model]
  cells:
    ppl: {label: perplexity, mean: [python-docs.ppl], best: lowest}
  published:
    across: {model: [tiny-opt]}
    numbers: {w4: {rtn: [9.0], teq: [8.0]}}
"""


@pytest.fixture
def added(monkeypatch, tmp_path):
    """A project with one experiment, which a test adds as one YAML file."""
    add_experiment(monkeypatch, tmp_path, "added", TABLE)
    return tmp_path


def run_some(folder, methods=("fp", "rtn", "teq"), seconds=1.0):
    """Records of tiny-opt's runs, those of TEQ with errors by linear."""

    def with_errors(data):
        data["quantization"]["weight_error"] = {"layers.0.fc1": 0.0123}

    for i, job in enumerate(config.jobs(["experiments=added", "model=tiny-opt"])):
        if job.run.method in methods:
            losses = 2 + 0.1 * i + 0.01 * np.arange(6)
            change = with_errors if job.run.method == "teq" else None
            made(folder, job, evals={"python-docs": losses}, seconds=seconds, change=change)


def test_a_table_is_one_file(added, own_home, capsys):
    run_some(own_home / "records")
    assert verbs.main(["report", "added"]) == 0
    out = capsys.readouterr().out
    assert "## Added: <one> file & no code" in out
    assert "| 9.25" in out or "**9.25**" in out, out
    assert "(9.00, +0.25, worse)" in out
    assert f"added: {own_home}/report/tables/added.md (with records of your own)" in out
    assert not (added / "results").exists()
    page = (own_home / "report" / "added.html").read_text()
    assert f"page: {own_home}/report/added.html" in out and "Added: &lt;one&gt; file &amp; no code" in page


def test_without_any_record_a_page_of_commands(added, capsys):
    assert verbs.main(["report"]) == 0
    out = capsys.readouterr().out
    assert "not run: 10 of 10 cells" in out
    page = (added / "results" / "report" / "index.html").read_text()
    assert "python run.py model=tiny-opt method=fp grid=w4 recipe=quick experiments=added" in page
    assert f"report: {added}/results/report/index.html" in out


def test_publish_copies_what_the_cells_use_and_renders_it(added, own_home, capsys):
    run_some(own_home / "records")
    (stranger,) = config.jobs(["model=tiny-bloom", "method=fp", "evals=[python-docs]"])
    made(own_home / "records", stranger, evals={"python-docs": [2.0, 2.1]})
    assert verbs.main(["publish", "added"]) == 0
    results = added / "results"
    copied = {file.name for file in (results / "records").iterdir()}
    assert len(copied) == 5
    assert not any(file.startswith(stranger.run.key()) for file in copied)
    rendered = contents(results)
    assert {str(name) for name in rendered} >= {"tables/added.md", "tables/added.tex", "tables/added.csv"}
    assert "report/index.html" in map(str, rendered)
    for file in (*results.glob("tables/*"), *results.glob("report/*")):
        file.unlink()
    assert verbs.main(["report", "all"]) == 0  # the user's records are the published ones
    assert contents(results) == rendered
    assert not (own_home / "report").exists()


def contents(folder):
    """The bytes of every file below a folder."""
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_own_records_and_overrides_never_change_results(added, own_home, capsys):
    run_some(added / "results" / "records")
    assert verbs.main(["report", "added"]) == 0
    before = contents(added / "results")
    run_some(own_home / "records", seconds=2.0)
    assert verbs.main(["report", "all"]) == 0
    assert verbs.main(["report", "added", "model=tiny-llama"]) == 0
    assert "(narrowed)" in capsys.readouterr().out
    assert contents(added / "results") == before
    assert (own_home / "report" / "index.html").is_file()


def test_claims_counted_in_own_records_of_another_table_never_change_results(
    added, own_home, monkeypatch, capsys
):
    claim = "  claims: [{says: s, winners: [teq], losers: [rtn], count: 1, of: 1, tables: [added]}]\n"
    add_experiment(monkeypatch, added, "counting", TABLE.replace('"fp,rtn,teq"', "fp") + claim)
    for name in ("added", "counting"):
        for job in config.jobs([f"experiments={name}", "model=tiny-opt", "method=fp"]):
            made(added / "results" / "records", job, evals={"python-docs": np.full(6, 2.0)})
    assert verbs.main(["report", "counting"]) == 0
    before = contents(added / "results")
    run_some(own_home / "records", methods=("rtn", "teq"))
    assert verbs.main(["report", "counting"]) == 0
    assert contents(added / "results") == before
    assert "counting.md (with records of your own)" in capsys.readouterr().out


def test_a_broken_experiment_does_not_hide_the_others(added, monkeypatch, own_home, capsys):
    run_some(own_home / "records")
    add_experiment(monkeypatch, added, "broken", TABLE.replace("mean:", "meen:"))
    assert verbs.main(["report"]) == 2
    out, err = capsys.readouterr()
    assert "## Added" in out
    assert "error: experiments/broken.yaml: layout.cells.ppl.meen is not known: did you mean mean?" in err
    page = (own_home / "report" / "index.html").read_text()
    assert "broken cannot be shown" in page


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["report", "tabel1"], "there is no experiment 'tabel1': it must be all or some of added"),
        (["report", "added", "modle=x"], "there is no option 'modle': did you mean model?"),
        (["publish", "added", "model=tiny-opt"], "publish takes no overrides"),
        (["publish"], "publish needs an experiment: all or some of added"),
        (["raport"], "there is no verb 'raport'"),
    ],
)
def test_wrong_words(added, capsys, argv, message):
    assert verbs.main(argv) == 2
    assert message in capsys.readouterr().err


def test_the_report_imports_no_torch(own_home):
    run_some_paper_records(own_home / "records")
    watched = "import sys; from teq.__main__ import main; status = main(sys.argv[1:]); "
    watched += "assert 'torch' not in sys.modules; sys.exit(status)"
    words = ["report", "table1", "table9", "figure2", "model=opt-6.7b"]
    done = subprocess.run(
        [sys.executable, "-c", watched, *words], cwd=config.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "| 75.00 " in done.stdout


def run_some_paper_records(folder):
    """One cell of Table 1, 75 % right."""
    job = next(j for j in config.jobs(["experiments=table1", "model=opt-6.7b"]) if j.run.method == "rtn")
    made(folder, job, evals={evaluation.name: [1, 1, 0, 1] * 5 for evaluation in job.run.evals})


def test_the_page_needs_nothing_from_elsewhere(added, own_home):
    run_some(own_home / "records")
    shown, problems = report.read_all(["added"], (), RecordIndex(own_home / "records"))
    page = report.page_of(shown, problems)
    assert not re.search(r'(?:src|href)="(?!#|data:)', page)
    assert "@import" not in page
    assert "url(" not in page
    assert "<one> file" not in page.replace("\\u003c", "<").split("<script")[0]
    assert page == report.page_of(shown, problems)


def test_costs_are_drawn_with_the_cheaper_left_and_the_better_below(added, own_home):
    run_some(own_home / "records", methods=("fp", "rtn"), seconds=1.0)
    run_some(own_home / "records", methods=("teq",), seconds=100.0)
    shown, _ = report.read_all(["added"], (), RecordIndex(own_home / "records"))
    found = re.findall(
        r'<circle cx="([\d.]+)" cy="([\d.]+)" r="4"/><text[^>]*>([^<]+)', report.page_of(shown, {})
    )
    at = {name: (float(x), float(y)) for x, y, name in found}
    assert set(at) == {"rtn w4", "teq w4", "rtn w3_g64", "teq w3_g64"}
    assert at["rtn w4"][0] == at["rtn w3_g64"][0] < at["teq w4"][0]
    assert at["rtn w4"][1] > at["rtn w3_g64"][1] > at["teq w4"][1]  # perplexities of 9.25, 10.23, 11.30


@pytest.fixture
def opened(added, own_home, tmp_path):
    """The page of all in a chromium."""
    if chromium.PROGRAM is None:
        pytest.skip("needs chromium (Debian: apt-get install chromium)")
    run_some(own_home / "records")
    assert verbs.main(["report", "all"]) == 0
    one = chromium.Browser(tmp_path / "profile")
    try:
        yield one, own_home / "report" / "index.html"
    finally:
        one.close()


ROWS = """[...document.querySelectorAll('#added tbody tr')].map(
    row => [...row.cells].slice(0, 3).map(cell => cell.innerText.trim().split(/\\s/)[0]))"""
HEADINGS = """[...document.querySelectorAll('#added thead th')]
    .filter(heading => heading.getClientRects().length).map(heading => heading.innerText.trim())"""


def choose(page, axis, value):
    """Set a filter; return the heads of the rows that are left."""
    return page.run(
        f"document.getElementById('{axis}').value = '{value}';"
        f"document.getElementById('{axis}').dispatchEvent(new Event('change'));"
        "[...document.querySelectorAll('#added tbody tr')].filter(row => row.offsetParent)"
        ".map(row => [...row.querySelectorAll('th')].map(head => head.dataset.sort).join(' '))"
    )


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_browser(opened, width):
    page, file = opened
    page.open(file, width=width)
    assert page.run("document.querySelectorAll('table').length") == 1
    assert page.run("document.documentElement.scrollWidth") <= width  # wide tables scroll in their own box
    assert [url for url in page.requested() if not url.startswith(("file:", "data:"))] == []
    verdicts = page.run("[...document.querySelectorAll('.cell .verdict')].map(v => v.innerText)")
    assert {"○ not run", "▼ worse"} <= set(verdicts)  # a sign and a word, not a colour alone

    before = page.run(ROWS)
    page.run("document.querySelectorAll('#added thead th button')[2].click()")
    ascending = [float(row[2]) for row in page.run(ROWS)]
    assert ascending == sorted(ascending)
    page.run("document.querySelectorAll('#added thead th button')[2].click()")
    assert [float(row[2]) for row in page.run(ROWS)] == ascending[::-1]
    assert (
        page.run("document.querySelectorAll('#added thead th')[2].getAttribute('aria-sort')") == "descending"
    )
    assert sorted(page.run(ROWS)) == sorted(before)

    # scrolled sideways, grid and method of a row stay on a narrow screen; its header stays everywhere
    page.run("document.querySelector('#added .scroll').scrollTo(40, 20)")
    box = "document.querySelector('#added .scroll').getBoundingClientRect()"
    name = "document.querySelector('#added tbody tr:nth-child(2) .inner').getBoundingClientRect()"
    if width == 390:
        assert page.run(f"{name}.left - {box}.left") == 0
        assert page.run(
            "document.querySelector('#added tbody tr:nth-child(2) .inner').innerText"
        ).split() in ([grid, method] for grid in ("w4", "w3_g64") for method in ("rtn", "teq"))
    assert (
        page.run(f"document.querySelector('#added thead th.inner').getBoundingClientRect().top - {box}.top")
        == 0
    )

    page.run(
        "document.getElementById('model').value = 'tiny-opt';"
        "document.getElementById('model').dispatchEvent(new Event('change'))"
    )
    assert [h.split()[0] for h in page.run(HEADINGS)] == ["grid", "method", "tiny-opt"][width == 390 :]
    assert sorted(choose(page, "method", "teq")) == ["w3_g64 teq", "w4 teq"]
    assert choose(page, "grid", "w4") == ["w4 teq"]
    assert choose(page, "verdict", "worse") == []
    assert page.run("document.getElementById('added').hidden") is True
    assert choose(page, "verdict", "") == ["w4 teq"]
    assert page.errors == []


FOREST = """[...document.querySelectorAll('.forest h3, .forest .place, .forest .said')].map(part => {
    const box = part.getBoundingClientRect();
    const cut = part.scrollWidth > part.clientWidth + 1;
    return [part.innerText, parseFloat(getComputedStyle(part).fontSize), box.left, box.right, cut];
})"""
MARKS = """[...document.querySelectorAll('.forest a')].map(row => {
    const at = part => row.querySelector(part).getBoundingClientRect();
    return [row.querySelector('.said').innerText, at('circle').left + 4 - at('.axis').left];
})"""


@pytest.mark.parametrize("width", [1280, 390])
def test_the_forest_is_readable_on_any_screen(opened, width):
    page, file = opened
    page.open(file, width=width)
    assert page.run("document.scrollingElement.scrollWidth") <= width
    parts = page.run(FOREST)
    texts = [text for text, *_ in parts]
    assert texts[0] == "Added: <one> file & no code" and "w4, teq, tiny-opt" in texts and len(texts) == 5
    for text, size, left, right, cut in parts:
        assert size >= 10 and left >= 0 and right <= width and not cut, text
    for text, offset in page.run(MARKS):  # a higher perplexity lies right of the line
        assert text[0] in "+−" and (offset > 0) == (text[0] == "+"), text
    assert page.errors == []


COUNTS = """[...document.querySelectorAll('nav li .counts span:not([hidden])')].map(s => s.textContent)"""
LEFT = """[...document.querySelectorAll('#added .cell:not(.off)')].map(
    cell => data.cells[cell.dataset.cell].verdict)"""


def test_the_contents_and_the_forest_follow_the_filters(opened):
    page, file = opened
    page.open(file)
    for axis, value in (("method", "teq"), ("model", "tiny-opt"), ("grid", "w4"), ("grid", "")):
        choose(page, axis, value)
        left = page.run(LEFT)
        expected = {f"{report.page.SYMBOLS[verdict]} {left.count(verdict)}" for verdict in left}
        assert left and set(page.run(COUNTS)) == expected
    rows = "[...document.querySelectorAll('.forest a')].filter(r => r.offsetParent).length"
    assert page.run(rows) == 2
    choose(page, "grid", "w3_g64")
    assert page.run(rows) == 1
    choose(page, "method", "rtn")
    assert page.run("document.getElementById('differences').hidden") is True
    assert page.errors == []


def test_a_cell_opens_its_record_and_two_cells_their_differences(opened):
    page, file = opened
    page.open(file)
    data = json.loads(page.run("document.getElementById('data').textContent"))
    titles = [cell["title"] for cell in data["cells"]]
    rtn, teq = (
        titles.index(f"Added: <one> file & no code: {at}, tiny-opt") for at in ("w4, rtn", "w3_g64, teq")
    )
    page.run(f"document.querySelector('[data-cell=\"{teq}\"]').click()")
    details = page.run("document.getElementById('details').innerText")
    assert "python run.py model=tiny-opt method=teq grid=w3_g64 recipe=quick experiments=added" in details
    assert "Training loss over 3 steps: first 3.000, last 2.000" in details
    assert "paired t interval, n = 6 windows" in details
    assert "log-loss difference of each of 6 windows, 0 of them below 0; mean +0.2000" in details.replace(
        "−", "-"
    )
    assert re.search(r"Squared error of 1 linears' weights, relative.*\nlayers.0.fc1\t1.23%", details)
    opened_record = page.run("document.getElementById('details').textContent")
    for fact in ("transform.steps", "scales seconds", "torch", "python-docs.tokens_sha256"):
        assert fact in opened_record
    page.run("document.querySelector('[data-pick=a]').click()")
    page.run(f"document.querySelector('[data-cell=\"{rtn}\"]').click()")
    assert "Squared error" not in page.run("document.getElementById('details').innerText")
    page.run("document.querySelector('[data-pick=b]').click()")
    assert page.run("document.getElementById('pair').hidden") is False
    page.run("document.getElementById('pair-show').click()")
    rows = page.run(
        "[...document.querySelectorAll('#details-body tr')].map(r => [...r.cells].map(c => c.innerText))"
    )
    assert ["method", "teq", "rtn"] in rows
    assert ["quantizer.grid.bits", "3", "4"] in rows
    assert ["transform.steps", "100", "–"] in rows
    assert not any(row[0] == "model.name" for row in rows)
    text = page.run("document.getElementById('details').innerText").replace("−", "-")
    assert re.search(r"The same: .*versions", text)
    # losses of 2 + 0.1 i + ..., i of the run: exp(0.3) - 1
    assert rows[2] == ["A minus B, paired [95 %]", "+35.0 % [+35.0, +35.0]"]
    assert rows[3] == ["test", "paired t interval, n = 6 windows"]
    assert page.errors == []


def test_a_link_opens_its_cell_and_the_numbers_can_be_taken_along(opened):
    page, file = opened
    link = "added/w4/teq/tiny-opt/ppl"
    page.open(f"{file}#{link}")
    title = "document.getElementById('details-title').innerText"
    assert page.run(title) == "Added: <one> file & no code: w4, teq, tiny-opt"
    assert page.run("document.getElementById('details').open") is True
    page.run("document.getElementById('details').close()")
    page.run("document.querySelector('[data-cell]').click()")
    assert page.run("decodeURIComponent(location.hash)") == "#added/full/fp/tiny-opt/ppl"
    csv = page.run(
        "decodeURIComponent(document.querySelector('#added a[download]').href.split(',').slice(1).join(','))"
    )
    assert csv == (file.parent / "tables" / "added.csv").read_text()
    page.run("navigator.clipboard.writeText = (text) => { window.copied = text; }")
    page.run("document.querySelector('.copy').click()")
    assert (
        page.run("copied") == "python run.py model=tiny-opt method=fp grid=w4 recipe=quick experiments=added"
    )
    assert page.errors == []


def test_the_notebook_runs(monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="needs the notebook extra: pip install 'teq[notebook]'")
    nbclient = pytest.importorskip("nbclient", reason="needs the notebook extra: pip install 'teq[notebook]'")
    pytest.importorskip("ipykernel", reason="needs the notebook extra: pip install 'teq[notebook]'")
    notebook = nbformat.read(config.ROOT / "notebooks" / "tour.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    monkeypatch.setenv("PYTHONPATH", str(config.ROOT), prepend=":")
    folder = {"metadata": {"path": str(config.ROOT / "notebooks")}}
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3", resources=folder).execute()
    shown = json.dumps([cell.get("outputs") for cell in notebook.cells])
    assert "Table 2: WikiText-2 perplexity at 4 bits" in shown
    assert "12.10" in shown


def test_the_notebook_on_generation_runs(own_home, monkeypatch):
    """Its cells as they are, on a model that needs no download."""
    nbformat = pytest.importorskip("nbformat", reason="needs the notebook extra: pip install 'teq[notebook]'")
    notebook = nbformat.read(config.ROOT / "notebooks" / "generate.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    source = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    found: dict = {}
    exec(source.replace("model=smollm2-135m", "model=tiny-llama").replace("grid=w4_g64", "grid=w4"), found)
    assert found["written"].shape[1] > found["read"].input_ids.shape[1]


def test_a_stage_out_of_the_cache_says_where_it_ran(added, own_home):
    job = config.jobs(["experiments=added", "model=tiny-opt", "method=teq"])[0]

    def elsewhere(data):
        data["machine"]["threads"] = 2
        for name, stage in data["stages"].items():
            machine = stage["cost"]["machine"] | {"threads": 1 if name == "scales" else 2}
            data["stages"][name] = stage | {"cost": stage["cost"] | {"machine": machine}}

    one = made(own_home / "records", job, evals={"python-docs": np.full(6, 2.0)}, change=elsewhere)
    cost = report.page.summary(one)["facts"]["cost"]
    assert cost["scales threads"] == "1" and "weights threads" not in cost


def test_what_older_records_lack_is_shown_as_not_recorded(added, own_home):
    job = config.jobs(["experiments=added", "model=tiny-opt", "method=teq"])[0]

    def complete(data):
        code, flags = {"sources": "5" * 16, "commit": "c" * 40, "dirty": False}, {"deterministic": False}
        data["code"], data["machine"]["flags"] = code, flags
        for name, stage in data["stages"].items():
            machine = stage["cost"]["machine"] | {"flags": flags}
            data["stages"][name] = stage | {"cost": stage["cost"] | {"machine": machine, "code": code}}

    def older(data):
        complete(data)
        for stage in data["stages"].values():
            stage.pop("digest")
            stage["cost"]["machine"].pop("flags")
        data["stages"]["scales"]["cost"].pop("code")
        data["stages"]["weights"]["cost"]["code"] = {"commit": "c" * 40, "dirty": False}
        data["code"] = {"commit": "c" * 40, "dirty": False}
        data["machine"].pop("flags")

    losses = {"python-docs": np.full(6, 2.0)}
    one = made(own_home / "records", job, evals=losses, change=complete)
    facts = report.page.summary(one)["facts"]
    assert facts["code"] == {"sources": "5" * 16, "commit": "c" * 40, "dirty": "False"}
    assert facts["machine"]["flags.deterministic"] == "False"
    assert facts["digests"] == dict.fromkeys(("scales", "weights", "python-docs"), "0" * 16)
    assert not any("not recorded" in str(group) for group in facts.values())
    file = own_home / "records" / "older.json"
    data = json.loads(one.file.read_text())
    older(data)
    file.write_text(json.dumps(data))
    facts = report.page.summary(record.read(file))["facts"]
    assert facts["code"]["sources"] == facts["machine"]["flags"] == "not recorded"
    assert facts["code"]["commit"] == "c" * 40
    assert set(facts["digests"].values()) == {"not recorded"}
    assert facts["cost"]["scales commit"] == facts["cost"]["scales dirty"] == "not recorded"
    assert "weights commit" not in facts["cost"] and "weights sources" not in facts["cost"]
    one.file.unlink()
    assert verbs.main(["report", "added"]) == 0


def test_a_report_after_an_edit_of_the_checkpoint_says_so(added, own_home, tmp_path, capsys):
    """A record of the weights that were there before is not the run's."""
    from teq.models.checkpoint import Folder

    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("{}")
    found = config.jobs(["experiments=added", "model=tiny-opt", "method=rtn", f"model.path={folder}"])
    for job in found:

        def of_this_folder(data):
            data["identity"] = Folder(path=str(folder)).fingerprint()

        made(own_home / "records", job, evals={"python-docs": np.full(6, 2.0)}, change=of_this_folder)
    (first, *_) = found
    library = RecordIndex(own_home / "records")
    assert library.find(first.run, {"python-docs"}).differences == {}
    before = Folder(path=str(folder)).fingerprint()
    (folder / "model.safetensors").write_text("[]")
    after = Folder(path=str(folder)).fingerprint()
    library = RecordIndex(own_home / "records")
    assert library.find(first.run, {"python-docs"}).differences == {"model.weights": (after, before)}
    assert verbs.main(["report", "added", "model=tiny-opt", "method=rtn", f"model.path={folder}"]) == 0
    out = capsys.readouterr().out
    assert f"model.weights {before} instead of {after}" in out

    def of_the_new_weights(data):
        data["identity"] = after
        data["stages"]["weights"]["digest"] = "1" * 16

    exact = made(
        own_home / "records", first, evals={"python-docs": np.full(6, 3.0)}, change=of_the_new_weights
    )
    answer = RecordIndex(own_home / "records").find(first.run, {"python-docs"})
    assert answer.differences == {} and answer.record.file == exact.file
    for file in folder.iterdir():
        file.unlink()  # what is not there cannot differ
    assert RecordIndex(own_home / "records").find(first.run, {"python-docs"}).differences == {}


def test_a_cell_shows_the_largest_errors_of_its_linears_where_its_record_has_them(added, own_home):
    shares = {f"model.layers.{i}.mlp.down_proj": 0.01 * (i + 1) for i in range(7)}
    job = config.jobs(["experiments=added", "model=tiny-opt", "method=rtn"])[0]
    losses = {"python-docs": np.full(6, 2.0)}

    def with_errors(data):
        data["quantization"]["weight_error"] = shares

    older = made(own_home / "older", job, evals=losses)
    assert "errors" not in report.page.summary(older)
    shown = report.page.summary(made(own_home / "records", job, evals=losses, change=with_errors))["errors"]
    assert shown["title"] == "Squared error of 7 linears' weights, relative: median 4.00%, the largest"
    assert shown["rows"][0] == ["model.layers.6.mlp.down_proj", "7.00%"] and len(shown["rows"]) == 5
