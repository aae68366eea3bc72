"""The store: computed once, found again, never half-written, never trusted when damaged."""

import json
import multiprocessing
import os
import shutil
import signal
import time

import pytest
import torch

from teq.spec import UserError
from teq.store import DATA, INFO, MANIFEST, Stage, Store

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


def slow_work(root, log):
    def make(_):
        with log.open("a") as stream:
            stream.write("made\n")
        time.sleep(1.5)
        return {}, {"pid": os.getpid()}

    get(Store(root), make)


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
