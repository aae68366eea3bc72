"""README, CONTRIBUTING and docs: their commands parse, their numbers are published, their links work."""

import csv
import json
import pathlib
import re
import shlex
import xml.etree.ElementTree

import pytest

from teq import config

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
README = TEXTS["README.md"]
COMMANDS = [
    command
    for text in TEXTS.values()
    for command in re.findall(r"^    python run\.py ?(.*?)(?: +#.*)?$", text, re.MULTILINE)
]
GRIDS = ("w4", "w4_g128", "w3_g128")


def table(name: str) -> list[str]:
    """Return the rows of a published table."""
    text = (ROOT / "results" / "tables" / f"{name}.md").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line.startswith("|")]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "--help"])
def test_every_command_is_understood(command):
    if launcher := re.search(r"hydra/launcher=(\w+)", command):
        plugin = {"slurm": "submitit", "cluster": "ray"}.get(launcher[1], "joblib")
        name = f"hydra_plugins.hydra_{plugin}_launcher"
        pytest.importorskip(name, reason=f"hydra-{plugin}-launcher is not installed")
    assert config.jobs(shlex.split(command))


@pytest.mark.parametrize("page", TEXTS)
def test_every_experiment_named_exists(page):
    named = re.findall(r"python run\.py [^`\n]*?experiments=([\w-]+)", TEXTS[page])
    named += re.findall(r"python -m teq (?:report|publish) ([a-z]\w*\d?)", TEXTS[page])
    there = {file.stem for file in (ROOT / "experiments").glob("*.yaml")} | {"all"}
    assert set(named) <= there
    assert named or page != "README.md"


def test_the_table_is_the_published_one():
    rows = table("quickstart")
    assert len(rows) == 7 and "\n".join(rows) in README


def test_the_first_table_is_the_published_one_rounded():
    with (ROOT / "results" / "tables" / "smollm2.csv").open(encoding="utf-8") as file:
        published = {(row["grid"], row["method"], row["cell"]): row for row in csv.DictReader(file)}

    def shown(grid, method):
        """Return a row's perplexities as in README, bold where the table has them bold."""
        found = [published[grid, method, text] for text in ("wikitext2", "ptb", "c4")]
        if not any(cell["ours"] for cell in found):
            return "not run"
        bold = ["**" * (cell["best"] == "true") for cell in found]
        return " / ".join(f"{b}{float(cell['ours']):.1f}{b}" for b, cell in zip(bold, found, strict=True))

    for grid in GRIDS:
        row = [shown(grid, method) for method in ("rtn", "teq", "gptq", "teq+gptq")]
        assert f"| {grid} | {' | '.join(row)} |" in README
    assert re.search(r"unquantized\s+" + re.escape(shown("full", "fp")), README)


def test_the_comparison_with_autoround_is_the_measured_one():
    text = (ROOT / "benchmarks" / "results" / "autoround.json").read_text(encoding="utf-8")
    found = json.loads(text)["contenders"]
    tuned = "method=rtn quant_grid.search=clip finetune=scales+norms tune.steps=60 tune.lr=3e-3"
    for name in ("method=rtn", "autoround50", tuned, "method=best tune.lr=3e-3"):
        one = found[name]
        shown = [f"{one['perplexity'][text]:.1f}" for text in ("wikitext2", "c4-new")]
        assert f"| {one['seconds']:.0f} | {' | '.join(shown)} |" in README
        exact = [f"{one['perplexity'][text]:.2f}" for text in ("wikitext2", "c4-new")]
        assert f"| {one['token_visits']:,} | {' | '.join(exact)} |" in TEXTS["docs/beyond.md"]
    plain = " / ".join(f"{found['fp']['perplexity'][text]:.1f}" for text in ("wikitext2", "c4-new"))
    assert f"unquantized {plain}" in README
    (default,) = config.jobs(["method=best"])
    assert default.run.finetune.lr == 3e-3  # what the last contender was given


@pytest.mark.parametrize("name", [f"table{n}" for n in range(1, 8)] + ["figure2", "figure3"])
def test_the_share_of_cells_run_is_the_published_one(name):
    text = (ROOT / "results" / "tables" / f"{name}.md").read_text(encoding="utf-8")
    missing, whole = map(int, re.search(r"not run: (\d+) of (\d+)", text).groups())
    (row,) = [line for line in README.splitlines() if f"experiments={name}`" in line]
    assert f"partial ({whole - missing}/{whole})" in row


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", TEXTS[page]):
        assert target.startswith("http") or ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize("page", TEXTS)
def test_files_named_in_backticks_exist(page):
    named = re.findall(r"`((?:benchmarks|conf|docs|experiments|results|tests)/[\w./-]+)`", TEXTS[page])
    for path in named:
        assert (ROOT / path).exists(), path


def test_readme_is_short():
    assert len(README.splitlines()) <= 140
    assert len(README.split()) <= 1300
    assert max(map(len, README.splitlines())) <= 122


def test_the_pictures_are_well_formed():
    for page, text in TEXTS.items():
        for target in re.findall(r"\]\(([^)]+\.svg)\)", text):
            xml.etree.ElementTree.parse((ROOT / page).parent / target)
