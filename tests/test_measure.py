"""The code that a record names is the code that ran."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from teq import config


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
