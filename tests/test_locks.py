"""Jobs share out the host's CUDA devices: none is held twice, and each is free in the end."""

import multiprocessing
import os
import signal
import tempfile
import threading
from types import SimpleNamespace

import filelock
import pytest
import torch

from teq import config
from teq.device import locks
from teq.spec import UserError
from teq.verbs import run as cli

COUNT = 3


@pytest.fixture(autouse=True)
def three_devices(monkeypatch, tmp_path):
    """A host with three CUDA devices, and lock files of its own."""
    properties = [SimpleNamespace(uuid=f"uuid-{index}") for index in range(COUNT)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: COUNT)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties.__getitem__)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(locks, "POLL", 0.01)
    monkeypatch.setattr(locks._Last, "index", 0)


def locked(tmp_path):
    """The devices whose lock somebody holds."""
    held = []
    for file in sorted((tmp_path / f"teq-devices-{os.getuid()}").glob("*.lock")):
        try:
            filelock.FileLock(file).acquire(blocking=False).lock.release()
        except filelock.Timeout:
            held.append(file.stem)
    return held


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_no_device_is_held_twice_and_all_are_free_in_the_end(wanted, tmp_path):
    lock, using, most, problems = threading.Lock(), [], [], []
    full = threading.Barrier(COUNT)

    def job(first):
        with locks.taken(wanted) as name:
            with lock:
                problems.extend({name} & set(using))
                using.append(name)
                most.append(len(using))
            if first:
                full.wait(timeout=60)  # three hold a device at once
            with lock:
                using.remove(name)

    threads = [threading.Thread(target=job, args=(index < COUNT,)) for index in range(COUNT)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == COUNT
    threads = [threading.Thread(target=job, args=(False,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == COUNT + 8 and not problems and not using
    assert locked(tmp_path) == []


def test_a_job_waits_for_a_device_and_says_so(caplog):
    caplog.set_level("INFO")
    held = [locks.taken("auto") for _ in range(COUNT)]
    names = [one.__enter__() for one in held]
    assert names == ["cuda:0", "cuda:1", "cuda:2"]
    found = []
    waiting = threading.Thread(target=lambda: found.append(_name("auto")))
    waiting.start()
    while "all 3 CUDA devices here are taken by other runs: waiting for one" not in caplog.text:
        assert waiting.is_alive()
    assert not found
    held[1].__exit__(None, None, None)
    waiting.join()
    assert found == ["cuda:1"]
    for one in (held[0], held[2]):
        one.__exit__(None, None, None)


def _name(wanted):
    with locks.taken(wanted) as name:
        return name


def test_a_killed_process_frees_its_device(tmp_path):
    fork = multiprocessing.get_context("fork")
    begun = fork.Event()

    def hold():
        with locks.taken("auto"):
            begun.set()
            signal.pause()

    process = fork.Process(target=hold)
    process.start()
    assert begun.wait(60)
    assert locked(tmp_path) == ["uuid-0"] and _name("auto") == "cuda:1"
    process.kill()
    process.join()
    assert locked(tmp_path) == []


def test_an_explicit_device_is_used_at_once_and_others_keep_off_it(tmp_path):
    with locks.taken("cuda:0") as first:
        assert (first, _name("auto"), locked(tmp_path)) == ("cuda:0", "cuda:1", ["uuid-0"])
        with locks.taken("cuda:0") as second:  # the user's word
            assert second == "cuda:0"
        assert locked(tmp_path) == ["uuid-0"]
    assert locked(tmp_path) == []


def test_a_process_keeps_to_the_device_it_had():
    with locks.taken("auto") as other:
        first = _name("auto")
    assert (other, first, _name("auto")) == ("cuda:0", "cuda:1", "cuda:1")


def test_devices_are_told_apart_by_uuid(monkeypatch, tmp_path):
    with locks.taken("auto"):  # uuid-0
        other = [SimpleNamespace(uuid=f"uuid-{index}") for index in (0, 2)]  # CUDA_VISIBLE_DEVICES=0,2
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_device_properties", other.__getitem__)
        with locks.taken("auto") as name:
            assert name == "cuda:1" and locked(tmp_path) == ["uuid-0", "uuid-2"]


@pytest.mark.parametrize("wanted", ["cpu", "tpu", "cuda:7"])
def test_other_names_are_handed_on_without_a_lock(wanted, tmp_path):
    assert _name(wanted) == wanted and locked(tmp_path) == []


def test_without_a_device_nothing_is_locked(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert [_name(wanted) for wanted in ("auto", "cuda")] == ["auto", "cuda"]
    assert not list(tmp_path.iterdir())


def test_a_job_runs_on_the_device_it_took(own_home, monkeypatch, tmp_path):
    (job,) = config.jobs(["model=tiny-llama", "method=rtn", "evals=[python-docs]"])
    seen = []
    monkeypatch.setattr(cli.pipeline, "run", lambda *given: seen.append((given[3].device, locked(tmp_path))))
    with locks.taken("auto"):
        cli.run_job(job)
    assert seen == [("cuda:1", ["uuid-0", "uuid-1"])] and locked(tmp_path) == []


def test_a_device_of_another_host_is_checked_there(monkeypatch):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    sweep = ["-m", "model=tiny-llama", "method=rtn,fp", "evals=[python-docs]"]
    for device in ("cuda", "cuda:1"):
        with pytest.raises(UserError, match=f"device={device} does not exist: there are 0 CUDA devices here"):
            cli.checked_jobs([*sweep, f"device={device}"])
        with pytest.raises(UserError, match="does not exist"):  # no sweep: the launcher has no part in it
            cli.checked_jobs(["model=tiny-llama", "hydra/launcher=joblib", f"device={device}"])
        assert len(cli.checked_jobs([*sweep, f"device={device}", "hydra/launcher=joblib"])) == 2
    with pytest.raises(UserError, match="device=tpu is not allowed"):
        cli.checked_jobs([*sweep, "device=tpu", "hydra/launcher=joblib"])
