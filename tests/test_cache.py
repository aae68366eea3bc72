"""The verb `cache`: what lies there, whose it is, and what pruning deletes and leaves."""

import multiprocessing
import os
import shutil
import socket
import time

import numpy as np
import pytest
import torch
from record_factory import made

from teq import __main__ as verbs
from teq import config
from teq.pipeline import inventory
from teq.pipeline.store import DATA, INFO, MANIFEST, Stage, Store
from teq.verbs import cache

DAY = 24 * 3600


@pytest.fixture(autouse=True)
def user(tmp_path, monkeypatch):
    """The user's cache."""
    for module in (cache, inventory):
        monkeypatch.setattr(module, "user_cache", lambda: tmp_path / "user")
    return tmp_path / "user"


def put(home, name, setting, tensors=True):
    """An artefact of the store."""
    data = {"w": torch.zeros(2500)} if tensors else {}
    return Store(home / "store").get(Stage(name, {"a": setting}, lambda _: (data, {"x": 1})), "cpu")


def aged(path, days):
    for one in [path, *path.rglob("*")] if path.is_dir() else [path]:
        os.utime(one, (0, time.time() - days * DAY))


def in_another_process(work, *args):
    """Run `work` there: what it uses is not used any more when it has ended."""
    process = multiprocessing.get_context("fork").Process(target=work, args=args)
    process.start()
    process.join(60)
    assert process.exitcode == 0


@pytest.fixture
def filled(own_home):
    """Two artefacts of each stage, as ended processes left them; the folders of the weights."""

    def fill():
        for name in ("scales", "weights", "metrics"):
            for setting in ("old", "new"):
                aged(put(own_home, name, setting, name != "metrics").folder, 40 if setting == "old" else 0)

    in_another_process(fill)
    return {setting: put_key(own_home, "weights", setting) for setting in ("old", "new")}


def put_key(home, name, setting):
    return home / "store" / name / Stage(name, {"a": setting}, lambda _: ({}, {})).key


def names(folder):
    return {file.name for file in folder.iterdir()}


def run(*argv):
    return verbs.main(["cache", *argv])


def rows(text):
    """The table's rows as lists of cells."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_cache_is_shown_by_stage_model_and_method(own_home, filled, capsys, user):
    for method in ("rtn", "gptq"):
        (job,) = config.jobs(["model=tiny-opt", f"method={method}", "evals=[python-docs]"])

        def shares_scales(data):
            data["stages"]["scales"]["key"] = put_key(own_home, "scales", "old").name

        made(own_home / "records", job, evals={"python-docs": np.ones(3)}, change=shares_scales)
    for path, content in {
        "home/partial/scales-abc/training.safetensors": 10**6,
        "home/store/weights/abc.damaged-7/data.safetensors": 2 * 10**6,
        "home/hydra/2026-01-01_12-00-00_host-1-ab/run.log": 30,
        "home/failed/abc.safetensors": 40,
        "home/wandb/offline-run-1/x.wandb": 50,
        "home/rates.json": 60,
        "user/model.Q4-abc-v1/model.safetensors": 3 * 10**9 // 10**3,
        "user/model.Q4-abc-v1.making-host-1-1/model.gguf": 70,
        "user/digests/a.json": 80,
    }.items():
        file = own_home.parent / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes(content))
    assert run() == 0
    out = capsys.readouterr().out
    shown = {tuple(row[:3]): row[3:] for row in rows(out)[2:]}
    assert (
        shown["scales", "tiny-opt", "gptq, rtn"][0] == "1"
        and shown["scales", "tiny-opt", "gptq, rtn"][2] == "40 d ago"
    )
    assert shown["scales", "not in a record", ""][::2] == ["1", "0 min ago"]
    assert shown["weights", "not in a record", ""][0] == "2"
    assert shown["weights", "not in a record", ""][2] == "0 min to 40 d ago"
    assert shown["partial", "not in a record", ""][1] == "1.0 MB"
    assert shown["damaged", "not in a record", ""][1] == "2.0 MB"
    assert shown["converted", "model.Q4-abc-v1", ""][1] == "3.0 MB"
    assert shown["making", "model.Q4-abc-v1", ""][1] == "70 B"
    sizes = {kind: size[1] for (kind, *_), size in shown.items()}
    assert sizes["hydra"] == "30 B" and sizes["failed"] == "40 B" and sizes["wandb"] == "50 B"
    assert sizes["rates"] == "60 B" and sizes["digests"] == "80 B"
    assert str(own_home) in out and str(user) in out


def test_an_empty_cache_is_shown_and_pruned(capsys):
    assert run() == 0 and run("prune", "--stage", "all", "--yes") == 0
    out = capsys.readouterr().out
    assert "0 B" in out and "nothing to prune" in out


def test_pruning_leaves_what_tells_the_costs_and_what_was_used_since(own_home, filled, capsys):
    size = (filled["old"] / DATA).stat().st_size
    assert run("prune", "--stage", "weights", "--older", "30d", "--yes") == 0
    assert names(filled["old"]) == {INFO, MANIFEST}
    assert names(filled["new"]) == {INFO, MANIFEST, DATA}
    assert f"freed {size / 1000:.1f} kB: 1 of 1\n" in capsys.readouterr().out
    assert (put_key(own_home, "scales", "old") / DATA).is_file()
    found = put(own_home, "weights", "old")
    assert found.cached and found.info == {"x": 1}
    again = Store(own_home / "store").get(
        Stage("weights", {"a": "old"}, lambda _: ({"w": torch.zeros(2500)}, {"x": 1})), "cpu", content=True
    )
    assert not again.cached and again.digest == found.digest


def test_use_keeps_an_artefact_young(own_home, filled, capsys):
    in_another_process(put, own_home, "weights", "old")
    assert run("prune", "--stage", "weights", "--older", "30d", "--yes") == 0
    assert "nothing to prune" in capsys.readouterr().out and (filled["old"] / DATA).is_file()


def hold(home, ready, setting):
    Store(home / "store").get(Stage("weights", {"a": setting}, None), "cpu", content=True)
    ready.set()
    time.sleep(600)


def make(home, ready, name, setting):
    def never_ends(_):
        ready.set()
        time.sleep(600)

    Store(home / "store").get(Stage(name, {"a": setting}, never_ends), "cpu")


def test_what_a_running_process_got_stays_until_it_ends(own_home, filled, start_process, capsys):
    process = start_process(hold, own_home, "old")
    assert run("prune", "--stage", "weights", "--yes") == 0
    assert "1 of 2; 1 left, which running processes use" in capsys.readouterr().out
    assert (filled["old"] / DATA).is_file() and not (filled["new"] / DATA).exists()
    process.kill()
    process.join()
    assert run("prune", "--stage", "weights", "--yes") == 0
    assert not (filled["old"] / DATA).exists()


def test_what_another_machines_process_got_stays_for_a_week(own_home, filled):
    note = own_home / "store" / "in-use" / "other-1-abcd"
    note.write_text(f"weights/{filled['old'].name}\n")
    assert run("prune", "--stage", "weights", "--yes") == 0
    assert (filled["old"] / DATA).is_file()
    aged(note, 8)
    assert run("prune", "--stage", "weights", "--yes") == 0
    assert not (filled["old"] / DATA).exists()


def test_the_state_of_work_that_goes_on_stays(own_home, start_process):
    process = start_process(make, own_home, "scales", "running")
    running = put_key(own_home, "scales", "running").name
    for key in (running, "ended"):
        (own_home / "partial" / f"scales-{key}").mkdir(parents=True)
    left = own_home / "store" / "scales" / "ended.making-other-1-1"
    left.mkdir()
    aged(left, 8)
    assert run("prune", "--stage", "partial", "making", "--yes") == 0
    assert names(own_home / "partial") == {f"scales-{running}"} and not left.exists()
    assert len(list((own_home / "store" / "scales").glob(f"{running}.making-*"))) == 1
    process.kill()
    process.join()
    assert run("prune", "--stage", "partial", "making", "--yes") == 0
    assert names(own_home / "partial") == set()
    assert not list((own_home / "store" / "scales").glob("*making*"))


def test_a_kind_is_deleted_whole_and_no_other(own_home, filled, user):
    kinds = {
        "damaged": own_home / "store" / "weights" / "abc.damaged-7",
        "hydra": own_home / "hydra" / f"2026-01-01_12-00-00_{socket.gethostname()}-999999999-ab",
        "failed": own_home / "failed" / "abc.safetensors",
        "wandb": own_home / "wandb" / "offline-run-1",
        "converted": user / "model-v1",
    }
    for kind, path in kinds.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("") if kind == "failed" else path.mkdir()
    (own_home / "wandb" / "latest-run").symlink_to(kinds["wandb"])
    for i, (kind, path) in enumerate(kinds.items(), start=1):
        assert run("prune", "--stage", kind, "--yes") == 0
        assert [other.exists() for other in kinds.values()] == [False] * i + [True] * (len(kinds) - i), kind
        assert not path.exists()
    assert not (own_home / "wandb" / "latest-run").is_symlink()
    assert (filled["old"] / DATA).is_file()


def test_the_output_of_a_start_that_goes_on_stays(own_home):
    host = socket.gethostname()
    starts = {
        f"2026-01-01_12-00-00_{host}-{os.getppid()}-ab": True,
        f"2026-01-01_12-00-00_{host}-999999999-ab": False,
        "2026-01-01_12-00-00_other-host-1-ab": True,
        "2026-01-01_12-00-00": True,  # of an earlier version: whose it is, it does not say
    }
    for name in starts:
        (own_home / "hydra" / name).mkdir(parents=True)
    assert run("prune", "--stage", "hydra", "--yes") == 0
    assert names(own_home / "hydra") == {name for name, stays in starts.items() if stays}
    for name in names(own_home / "hydra"):
        aged(own_home / "hydra" / name, 8)
    assert run("prune", "--stage", "hydra", "--yes") == 0
    assert names(own_home / "hydra") == {f"2026-01-01_12-00-00_{host}-{os.getppid()}-ab"}


def test_logs_stay_while_anything_runs(own_home, filled, start_process):
    process = start_process(hold, own_home, "old")
    (own_home / "wandb" / "offline-run-1").mkdir(parents=True)
    assert run("prune", "--stage", "wandb", "--yes") == 0 and names(own_home / "wandb")
    process.kill()
    process.join()
    assert run("prune", "--stage", "wandb", "--yes") == 0 and not names(own_home / "wandb")


def test_locks_of_what_is_not_there_are_deleted_unless_held(own_home, filled, start_process):
    start_process(make, own_home, "scales", "running")
    held = put_key(own_home, "scales", "running").with_suffix(".lock")
    shutil.rmtree(put_key(own_home, "scales", "old"))
    orphan = put_key(own_home, "scales", "old").with_suffix(".lock")
    assert held.exists() and orphan.exists()
    assert run("prune", "--stage", "damaged", "--yes") == 0
    assert held.exists() and not orphan.exists()
    assert put_key(own_home, "scales", "new").with_suffix(".lock").exists()


@pytest.mark.parametrize(("answer", "deleted"), [("y", True), ("n", False), ("", False), (EOFError, False)])
def test_it_asks_on_a_terminal(filled, monkeypatch, capsys, answer, deleted):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    asked = []

    def reply(question):
        asked.append(question)
        if answer is EOFError:
            raise EOFError
        return answer

    monkeypatch.setattr("builtins.input", reply)
    assert run("prune", "--stage", "weights") == 0
    assert (filled["old"] / DATA).exists() is not deleted
    assert len(asked) == 1 and "kB of this? [y/N]" in asked[0]
    assert ("nothing was deleted" in capsys.readouterr().out) is not deleted


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["prune", "--stage", "weights"], "no terminal to ask on: add --yes"),
        (["prune"], "prune needs --stage"),
        (["prune", "--stage"], "--stage"),
        (["prune", "--stage", "metrics", "--yes"], "invalid choice: 'metrics'"),
        (["prune", "--stage", "weights", "--older", "soon", "--yes"], "--older=soon is not allowed"),
        (["prune", "--stage", "weights", "--older", "-1d", "--yes"], "--older"),
        (["--older", "30d"], "has no effect without `prune`"),
        (["clean"], "invalid choice: 'clean'"),
        (["prune", "--force"], "--force"),
    ],
)
def test_bad_arguments_are_one_line_and_delete_nothing(filled, capsys, argv, said):
    assert run(*argv) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0]
    assert all((folder / DATA).is_file() for folder in filled.values())


def test_a_cache_that_cannot_be_written_is_shown_and_its_pruning_is_one_line(
    read_only, filled, own_home, monkeypatch, capsys
):
    folder, lock = read_only
    shutil.copytree(own_home, folder / "home")
    monkeypatch.setenv("TEQ_HOME", str(folder / "home"))
    lock()
    assert run() == 0 and "weights" in capsys.readouterr().out
    assert run("prune", "--stage", "weights", "--yes") == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "Read-only file system" in lines[0]


def test_a_damaged_record_does_not_hide_the_cache(own_home, filled, capsys):
    (own_home / "records").mkdir()
    (own_home / "records" / "a-b.json").write_text("{")
    assert run() == 0 and len(rows(capsys.readouterr().out)) == 2 + 3
