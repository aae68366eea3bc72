"""The store: computed once, found again, never half-written, never trusted when damaged."""

import contextlib
import errno
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from teq.files import disk
from teq.pipeline import store
from teq.pipeline.store import DATA, INFO, MANIFEST, Stage, Store
from teq.spec import UserError

TENSORS = {"w": torch.arange(6.0).view(2, 3)}


def stage(make=None, settings=None, reads=None):
    return Stage("stage", settings or {"a": 1}, make or (lambda _: (TENSORS, {"x": 1})), reads or {})


def get(store, make=None, settings=None, content=True):
    return store.get(stage(make, settings), "cpu", content)


def never(_):
    raise AssertionError("computed again")


def test_second_get_is_served_from_the_folder(tmp_path):
    first = get(Store(tmp_path))
    second = get(Store(tmp_path), never)
    assert (first.cached, second.cached) == (False, True)
    assert torch.equal(second.tensors()["w"], torch.arange(6.0).view(2, 3)) and second.info == {"x": 1}
    assert second.cost == json.loads(json.dumps(first.cost))  # the original measurement


def test_other_settings_are_other_work(tmp_path):
    store = Store(tmp_path)
    assert get(store).key != get(store, settings={"a": 2}).key


@pytest.mark.parametrize("file", [DATA, INFO, MANIFEST])
@pytest.mark.parametrize("damage", ["edit", "truncate", "delete"])
def test_damage_is_found_said_and_repaired(tmp_path, caplog, file, damage):
    folder = get(Store(tmp_path)).folder
    target = folder / file
    if damage == "delete":
        target.unlink()
    elif damage == "truncate":
        target.write_bytes(target.read_bytes()[:-9])
    else:
        content = bytearray(target.read_bytes())
        content[-3] ^= 1
        target.write_bytes(content)
    again = get(Store(tmp_path))
    assert not again.cached and "computed again" in caplog.text
    assert get(Store(tmp_path), never).cached


def test_failure_leaves_nothing(tmp_path):
    def fail(_):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        get(Store(tmp_path), fail)
    assert not [p for p in (tmp_path / "stage").iterdir() if p.is_dir()]
    assert not get(Store(tmp_path)).cached


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO, errno.EMFILE])
@pytest.mark.parametrize("reader", ["sha256", "read_text"])
def test_a_read_that_fails_is_no_damage(tmp_path, monkeypatch, reader, code):
    folder = get(Store(tmp_path)).folder

    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(*((store, "sha256") if reader == "sha256" else (pathlib.Path, "read_text")), fail)
        with pytest.raises(OSError, match=os.strerror(code)):
            get(Store(tmp_path), never)
    assert get(Store(tmp_path), never).cached
    assert [p.name for p in folder.parent.iterdir() if p.is_dir()] == [folder.name]


@pytest.mark.parametrize("tensors", [TENSORS, {}], ids=["tensors", "none"])
def test_what_is_damaged_is_moved_aside_with_all_its_content(tmp_path, tensors):
    folder = get(Store(tmp_path), lambda _: (tensors, {"x": 1})).folder
    (folder / INFO).write_text("{}")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    get(Store(tmp_path))
    (aside,) = folder.parent.glob(f"{folder.name}.damaged-*")
    assert {file.name: file.read_bytes() for file in aside.iterdir()} == before


def test_deleted_tensors_leave_what_they_cost_and_no_damage(tmp_path):
    first = get(Store(tmp_path))
    (first.folder / DATA).unlink()
    kept = get(Store(tmp_path), never, content=False)
    assert kept.cached and kept.cost == json.loads(json.dumps(first.cost)) and kept.digest == first.digest
    assert not get(Store(tmp_path)).cached
    assert not list(first.folder.parent.glob("*damaged*"))


def test_tensors_that_were_deleted_under_a_run_are_an_error_and_not_none(tmp_path):
    found, without = get(Store(tmp_path)), get(Store(tmp_path), lambda _: ({}, {}), settings={"a": 2})
    (found.folder / DATA).unlink()
    with pytest.raises(FileNotFoundError):
        found.tensors()
    assert without.tensors() == {}


def test_use_is_the_age_of_an_artefact(tmp_path):
    manifest = get(Store(tmp_path)).folder / MANIFEST
    os.utime(manifest, (0, 0))
    get(Store(tmp_path), never)
    assert time.time() - manifest.stat().st_mtime < 60


def chain(values):
    """Three stages, each made from the one before; `values` are their results, changed by a test."""

    def make(name, read):
        return lambda _, **artefacts: (
            {"w": torch.tensor(values[name]) + sum(a.tensors()["w"] for a in artefacts.values())},
            {},
        )

    first = stage(make("first", None), {"a": "first"})
    second = stage(make("second", first), {"a": "second"}, {"first": first})
    return first, second, stage(make("third", second), {"a": "third"}, {"second": second})


def test_what_was_made_from_other_results_than_are_there_is_made_again_however_far_down(tmp_path, caplog):
    values = {"first": 1.0, "second": 10.0, "third": 100.0}
    assert Store(tmp_path).get(chain(values)[2], "cpu").tensors()["w"] == 111
    shutil.rmtree(tmp_path / "stage" / chain(values)[0].key)
    assert Store(tmp_path).get(chain(values)[2], "cpu").cached  # nothing says that it is wrong
    values["first"] = 2.0
    assert not Store(tmp_path).get(chain(values)[0], "cpu").cached
    again = Store(tmp_path).get(chain(values)[2], "cpu")
    assert not again.cached and again.tensors()["w"] == 112
    assert "made from other second than those that are here" in caplog.text


def test_the_same_result_made_again_leaves_what_was_made_from_it(tmp_path):
    stages = chain({"first": 1.0, "second": 10.0, "third": 100.0})
    Store(tmp_path).get(stages[2], "cpu")
    shutil.rmtree(tmp_path / "stage" / stages[0].key)
    assert not Store(tmp_path).get(stages[0], "cpu").cached
    assert Store(tmp_path).get(stages[2], "cpu").cached


class NoLock:
    """A lock of a file system that has none: it holds nothing, or says so."""

    error = None

    def __init__(self, *_, **__):
        pass

    def acquire(self, timeout=-1):
        if self.error is not None:
            raise OSError(self.error, os.strerror(self.error))

    def release(self):
        pass


def slow_work(root, log, lock=None):
    def make(_):
        with log.open("a") as stream:
            stream.write("made\n")
        time.sleep(1.5)
        return TENSORS, {"pid": os.getpid()}

    if lock is not None:
        disk.filelock.FileLock = lock
    get(Store(root), make)


def test_two_processes_whose_locks_hold_nothing_both_end_well_with_one_result(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    log, root = tmp_path / "log", tmp_path / "store"
    both = [spawn.Process(target=slow_work, args=(root, log, NoLock)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    assert log.read_text() == "made\nmade\n"  # else nothing was tried
    assert [p.name for p in (root / "stage").iterdir()] == [get(Store(root), never).key]


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(NoLock, "error", errno.ENOLCK)
    monkeypatch.setattr(disk.filelock, "FileLock", NoLock)
    assert not get(Store(tmp_path)).cached and get(Store(tmp_path), never).cached
    assert f"{tmp_path / 'stage'} has no file locks: two processes may do the same work" in caplog.text


@pytest.mark.parametrize("code", [None, errno.ENOLCK])
def test_locks_that_do_not_work_are_said_before_the_first_job(code, tmp_path, monkeypatch, caplog):
    Store(tmp_path / "store").check()
    assert not caplog.text

    def flock(*_):
        if code is not None:  # None: every descriptor gets the lock
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", flock)
    Store(tmp_path / "store").check()
    (said,) = caplog.messages
    assert said.startswith(f"file locks do not work in {tmp_path / 'store'}: two jobs may compute the same")
    assert not list((tmp_path / "store").iterdir())


def test_what_running_processes_are_making_stays_what_ended_ones_left_goes(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / "stage").mkdir()
    host, key = socket.gethostname(), stage().key
    owners = {"running": f"{host}-{os.getppid()}", "ended": f"{host}-{ended.pid}", "elsewhere": "other-1-1"}
    made = {who: tmp_path / "stage" / f"{key}.making-{owner}-7" for who, owner in owners.items()}
    old = made["elsewhere"].with_name(f"{key}.making-other-2-7")
    for folder in (*made.values(), old):
        folder.mkdir()
    os.utime(old, (0, 0))
    get(Store(tmp_path))
    assert {who for who, folder in made.items() if folder.exists()} == {"running", "elsewhere"}
    assert not old.exists()


def test_a_result_is_stored_though_its_folder_was_deleted_while_it_was_made(tmp_path):
    def make(_):
        for folder in (tmp_path / "stage").glob("*making*"):
            folder.rmdir()
        return TENSORS, {}

    assert not get(Store(tmp_path), make).cached and get(Store(tmp_path), never).cached


def test_a_file_that_a_stage_may_not_read_is_not_the_caches_fault(tmp_path):
    def make(_):
        raise PermissionError(errno.EACCES, "Permission denied", "/somewhere/else")

    with pytest.raises(PermissionError, match="/somewhere/else"):
        get(Store(tmp_path), make)


@contextlib.contextmanager
def mask(value):
    """Context manager: the process's umask."""
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize("value", [0o002, 0o027])
def test_artefacts_have_the_permissions_that_the_umask_leaves(tmp_path, value):
    with mask(value):
        folder = get(Store(tmp_path / "store")).folder
    everything = [*folder.iterdir(), folder.with_name(f"{folder.name}.lock")]
    assert {file.stat().st_mode & 0o777 for file in everything} == {0o666 & ~value}
    folders = (tmp_path / "store", folder.parent, folder)
    assert {one.stat().st_mode & 0o777 for one in folders} == {0o777 & ~value}


def test_two_processes_compute_it_once(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    log = tmp_path / "log"
    both = [spawn.Process(target=slow_work, args=(tmp_path / "store", log)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    assert log.read_text() == "made\n"


def endless_work(root, log):
    def make(_):
        log.write_text("started")
        time.sleep(60)
        return {}, {}

    get(Store(root), make)


def test_killed_process_leaves_nothing_in_the_way(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    log, root = tmp_path / "log", tmp_path / "store"
    process = spawn.Process(target=endless_work, args=(root, log))
    process.start()
    while not log.exists():
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    leftovers = [p for p in (root / "stage").iterdir() if p.is_dir()]
    assert len(leftovers) == 1 and "making" in leftovers[0].name
    assert not get(Store(root)).cached
    assert [p.name for p in (root / "stage").iterdir() if p.is_dir()] == [get(Store(root), never).key]


def test_unwritable_folder_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .*: set TEQ_HOME"):
        Store(tmp_path / "file" / "cache").check()


def test_a_store_that_cannot_be_written_serves_what_it_holds(read_only, caplog):
    root, lock = read_only
    get(Store(root / "store"))
    lock()
    Store(root / "store").check()
    assert "serves what it holds" in caplog.text
    assert get(Store(root / "store"), never).cached
    with pytest.raises(
        UserError, match=r"cannot be written \(Read-only file system\), stage .* set TEQ_HOME"
    ):
        get(Store(root / "store"), never, settings={"a": 2})


def test_state_of_unfinished_work_is_gone_on_with_only_on_the_same_results(tmp_path):
    def second(make, value):
        first = stage(lambda _: ({"w": torch.full((2,), value)}, {}))
        return Stage("second", {"b": 1}, make, {"read": first})

    def interrupted(state, read):
        state.mkdir(parents=True)
        (state / "half").touch()
        raise KeyboardInterrupt

    seen = []

    def resumed(state, read):
        seen.append((state / "half").exists())
        if len(seen) < 3:
            raise KeyboardInterrupt
        return {}, {}

    for make, value in [(interrupted, 1.0), (resumed, 1.0), (resumed, 2.0)]:
        with pytest.raises(KeyboardInterrupt):
            Store(tmp_path / "store").get(second(make, value), "cpu")
        if value == 1.0 and make is resumed:
            shutil.rmtree(tmp_path / "store" / "stage")  # to be made again, with another result
    shutil.rmtree(tmp_path / "store" / "stage")
    made = Store(tmp_path / "store").get(second(resumed, 1.0), "cpu")
    assert seen == [True, False, True] and made.cost["resumed"]
    assert not list((tmp_path / "partial").iterdir())
