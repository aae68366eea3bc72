"""The code that a record names is the code that ran."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from tiny_jobs import GPTQ, QUICK, run

from teq import config, record


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A copy of the package in a git repository with a commit, to be copied for each edit."""
    root = tmp_path_factory.mktemp("package")
    shutil.copytree(config.ROOT / "teq", root / "teq", ignore=shutil.ignore_patterns("__pycache__"))
    git = ["git", "-C", str(root), "-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "as it was"]):
        subprocess.run([*git, *command], check=True)
    return root


@pytest.fixture
def project(package, tmp_path):
    """A copy that a test may edit."""
    return shutil.copytree(package, tmp_path / "project")


def said(root, code):
    """What a process prints as JSON lines that imports the package of `root`."""
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    prelude = (
        "import json, pathlib\nfrom teq.pipeline import cost\nshow = lambda: print(json.dumps(cost.code()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", prelude + code],
        env=environment,
        cwd=root.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


EDIT = "file = cost.PACKAGE / {!r}\nfile.write_text(file.read_text() + '# edited')\n"


def test_what_is_imported_changes_no_digest_of_equal_sources(project):
    (few,) = said(project, "show()")
    more = said(project, "show()\nimport teq.report.compare, teq.report.render.wording\nshow()")
    assert [few, few] == more and few["dirty"] is False and len(few["commit"]) == 40


def test_a_module_edited_before_its_import_is_other_code(project):
    lazy = EDIT.format("report/compare.py")
    before, edited, ran = said(project, f"show()\n{lazy}show()\nimport teq.report.compare\nshow()")
    assert edited["sources"] != before["sources"] and edited == ran
    assert (before["dirty"], edited["dirty"]) == (False, True) and edited["commit"] == before["commit"]


def test_a_module_edited_after_its_import_is_not_what_runs(project):
    before, after = said(project, f"show()\n{EDIT.format('spec.py')}show()")
    assert before == after


def test_a_commit_after_an_edit_does_not_make_the_code_that_runs_clean(project):
    commit = (
        "import subprocess\n"
        "git = ['git', '-C', str(cost.PACKAGE), '-c', 'user.name=n', '-c', 'user.email=e']\n"
        "subprocess.run([*git, 'commit', '-qam', 'later'], check=True)\n"
    )
    before, after = said(
        project, f"show()\n{EDIT.format('report/compare.py')}{commit}import teq.report.compare\nshow()"
    )
    assert after["commit"] == before["commit"] and after["dirty"] and after["sources"] != before["sources"]


def test_a_package_that_is_reached_through_a_link_has_the_same_digest(project, tmp_path):
    (tmp_path / "link").symlink_to(project)
    assert said(tmp_path / "link", "show()") == said(project, "show()")


def test_outside_of_a_checkout_the_sources_are_known_and_the_commit_is_not(project):
    (inside,) = said(project, "show()")
    shutil.rmtree(project / ".git")
    (outside,) = said(project, "show()")
    assert outside == {"sources": inside["sources"], "commit": None, "dirty": None}


def test_record_holds_what_can_move_a_number_and_is_in_no_key(own_home):
    finished = run(own_home, "method=rtn", "evals=[python-docs,lastword-python-docs]")
    flags = finished.data["stages"]["weights"]["cost"]["machine"]["flags"]
    assert flags["deterministic"] is False and flags["matmul_precision"] == "highest" and flags["cpu"]
    assert finished.metrics["python-docs"]["info"]["attention"] == "sdpa"
    assert finished.metrics["lastword-python-docs"]["info"]["batch_size"] == 8
    assert {len(stage["digest"]) for stage in finished.data["stages"].values()} == {16}


def test_code_edited_under_a_run_is_not_what_its_record_names(own_home, tmp_path):
    """The solver is imported when its stage begins, after a training that it may be edited under."""
    root, copy = config.ROOT, tmp_path / "project"
    for name in ("teq", "conf", "experiments"):
        shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    git = ["git", "-C", str(copy), "-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "as it was"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
    code = """
import sys
from teq import config
from teq.pipeline import run as pipeline
from teq.pipeline.store import Store
from teq.device.runtime import Runtime
solver = config.ROOT / "teq" / "quantizers" / "gptq" / "solver.py"

class Edit:
    def step(self, step, loss):
        assert "teq.quantizers.gptq.solver" not in sys.modules
        solver.write_text(solver.read_text() + "# edited\\n")

    def finish(self, finished):
        pass

(job,) = config.jobs(sys.argv[1:])
home = config.home()
print(pipeline.run(job.run, Store(home / "store"), home, Runtime(), Edit()).file)
"""
    environment = {
        **os.environ,
        "PYTHONPATH": str(copy),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TEQ_ROOT": str(copy),
    }
    argv = [*QUICK, *GPTQ, "method=teq+gptq"]
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], env=environment, cwd=copy, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    data = record.read(pathlib.Path(done.stdout.split()[-1])).data
    stages = {name: stage["cost"]["code"] for name, stage in data["stages"].items()}
    assert {code["commit"] for code in (data["code"], *stages.values())} == {commit}
    assert data["code"]["dirty"] and stages["weights"]["dirty"]
    assert stages["weights"]["sources"] == data["code"]["sources"]
    clean = subprocess.check_output(
        [sys.executable, "-c", "from teq.pipeline import cost; print(cost.code()['sources'])"],
        env=os.environ | {"PYTHONPATH": str(root)},
        cwd=tmp_path,
        text=True,
    ).strip()
    assert data["code"]["sources"] != clean
