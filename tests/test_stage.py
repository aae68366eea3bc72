"""The contract of a method: what CONTRIBUTING shows is a method, built in a copy of the project and run."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


def shown(section):
    """The files of a section of CONTRIBUTING: path and content of each block, whose first line names it."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition(f"## {section}")[2]
    found = re.findall(r"^```\w+\n# (\S+)\n(.*?)^```$", text.partition("\n## ")[0], re.S | re.M)
    assert found, section
    return dict(found)


@pytest.fixture
def project(tmp_path):
    """A copy of what a run needs, to add files to."""
    for name in ("teq", "conf", "experiments"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "run.py", tmp_path)
    return tmp_path


def test_the_method_that_contributing_shows_is_one(project):
    """Ten lines and two short files: the scales are computed, weights rounded by RTN, the run recorded."""
    files = shown("A method")
    code = next(text for name, text in files.items() if name.endswith(".py"))
    body = [line for line in code.splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(body) <= 10 and len(files) == 3
    for name, text in files.items():
        assert not (project / name).exists()
        (project / name).write_text(text)
    argv = ["model=tiny-llama", "method=equalize", "bits=3", "group_size=16", "ppl.limit=2", "ppl.context=48"]
    home = project / "home"
    environment = os.environ | {"TEQ_HOME": str(home), "PYTHONPATH": str(project)}
    environment.pop("TEQ_ROOT", None)
    done = subprocess.run(
        [sys.executable, "run.py", *argv, "evals=[python-docs]"],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (home / "records").glob("*.json")
    data = json.loads(file.read_text())
    assert data["run"]["transform"]["kind"] == "Equalize" and data["run"]["method"] == "equalize"
    assert data["training"]["scales"].keys() and data["metrics"]["python-docs"]["values"]["ppl"] > 1
    assert "equalize" in done.stdout
