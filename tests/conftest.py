"""Shared fixtures: a cache of their own for every test, tiny models, and what a test may skip for."""

import multiprocessing
import os
import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
os.environ.setdefault("TEQ_ROOT", str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models lose more to threads than they gain


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    """No test sees another's records or artefacts, or the user's."""
    monkeypatch.setenv("TEQ_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("teq.models.hub._commits", {})
    for module in ("models.hub", "files.digests"):
        monkeypatch.setattr(f"teq.{module}.user_cache", lambda: tmp_path / "user")
    return tmp_path / "home"


@pytest.fixture(params=["opt", "bloom", "llama"])
def family(request):
    """Each architecture in turn."""
    return request.param


@pytest.fixture
def tiny():
    """Make a tiny model: `tiny("opt", dtype="float64")` -> LM."""
    from teq import config

    def make(family: str, dtype: str = "float32"):
        (job,) = config.jobs([f"model=tiny-{family}"])
        return job.run.model.load(dtype, "cpu")

    return make


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a file of a mirror: `write("c4/validation", text=[...])` -> its path."""
    import pyarrow.parquet

    folder = tmp_path / "mirror"
    folder.mkdir()
    monkeypatch.setenv("TEQ_DATA", str(folder))

    def written(file, **columns):
        path = folder / f"{file}.parquet"
        path.parent.mkdir(exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        return path

    return written


@pytest.fixture
def read_only(tmp_path):
    """A folder and what makes it read-only, even to root; skips where nothing can be mounted."""
    from teq.files import in_use

    def closed():
        for stream, _ in in_use._notes.values():
            stream.close()
        in_use._notes.clear()

    def remount():
        closed()
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)

    folder = tmp_path / "mounted"
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system can be mounted")
    try:
        yield folder, remount
    finally:
        closed()
        subprocess.run(["umount", folder], check=True)


@pytest.fixture
def small_disk(tmp_path):
    """Mount a disk of so many kilobytes: `small_disk(600)` -> its folder. Skips where that is forbidden."""
    mounted = []

    def mount(size: int) -> pathlib.Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            pytest.skip(f"no disk can be mounted here: {error}")
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def start_process():
    """Return a function that starts `work(home, ready, *args)` in a process and waits for `ready`."""
    fork, started = multiprocessing.get_context("fork"), []

    def begin(work, home, *args):
        ready = fork.Event()
        process = fork.Process(target=work, args=(home, ready, *args))
        process.start()
        started.append(process)
        assert ready.wait(60)
        return process

    yield begin
    for process in started:
        process.kill()
        process.join()
