"""What the README says is what there is: commands that parse, the published table, links that work."""

import pathlib
import re
import shlex

import pytest

from teq import config

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    python run\.py ?(.*?)(?: +#.*)?$", README, re.MULTILINE)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "--help"])
def test_every_command_of_the_readme_is_understood(command):
    if "joblib" in command:
        pytest.importorskip(
            "hydra_plugins.hydra_joblib_launcher", reason="hydra-joblib-launcher is not installed"
        )
    assert config.jobs(shlex.split(command))


def test_the_table_is_the_published_one():
    published = (ROOT / "results" / "tables" / "quickstart.md").read_text(encoding="utf-8")
    rows = [line for line in published.splitlines() if line.startswith("|")]
    assert len(rows) == 7 and "\n".join(rows) in README


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
