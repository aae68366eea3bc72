"""Shared fixtures: a cache of their own for every test, tiny models, and what a test may skip for."""

import gc
import hashlib
import multiprocessing
import os
import pathlib
import socket
import subprocess
import sys
import weakref

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
    """The paper's architectures in turn; `teq.models.arch.families` has all."""
    return request.param


@pytest.fixture
def tiny():
    """Make a tiny model: `tiny("opt", "float64", "sites=all")` -> LM."""
    from teq import config

    def make(family: str, dtype: str = "float32", *overrides: str):
        (job,) = config.jobs([f"model=tiny-{family}", *overrides])
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


def source_of(model, *overrides):
    """The source of a model of conf/model."""
    from teq import config

    (job,) = config.jobs([f"model={model}", *overrides])
    return job.run.model.source


def save_tiny(model, target):
    """Write a tiny model and its tokenizer as `save_pretrained` does."""
    from teq.models.synthetic import build, byte_tokenizer

    source = source_of(model)
    build(source).save_pretrained(target)
    byte_tokenizer(source.bos).save_pretrained(target)
    return target


def documents(count, words=3):
    """`count` different documents of `words` words."""
    return [" ".join(f"word{i}x{j}" for j in range(words)) for i in range(count)]


def run_python(code, endpoint, home, **environment):
    """Run `code` in a process of its own: the hub's client reads its environment when it is imported."""
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        "HF_HUB_OFFLINE": "",
    }
    inherited = {key: value for key, value in os.environ.items() if key != "TEQ_DATA"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, **settings, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def in_a_cycle(lm):
    """Make the model of `lm` refer to itself, as a kept traceback would; returns a weak reference to it."""
    lm.model.itself = [lm.model]
    return weakref.ref(lm.model)


def inputs_by_linear(lm, windows):
    """Every linear's inputs `[sample, token, in]`, from hooks on whole-model forward passes."""
    import torch

    found, handles = {}, []
    for name, module in lm.model.named_modules():
        if isinstance(module, torch.nn.Linear):

            def hook(_, args, name=name):
                found.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]))

            handles.append(module.register_forward_pre_hook(hook))
    with torch.no_grad():
        for window in windows:
            lm.model(window[None])
    for handle in handles:
        handle.remove()
    return {name: torch.stack(parts) for name, parts in found.items()}


@pytest.fixture
def unplugged(tmp_path, monkeypatch):
    """No cache, and every attempt to reach a network fails the test."""
    from huggingface_hub import constants

    def attempted(*args, **kwargs):
        raise AssertionError(f"a network call was attempted: {args}")

    monkeypatch.delenv("TEQ_DATA", raising=False)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, attempted)
    monkeypatch.setattr(socket, "getaddrinfo", attempted)


@pytest.fixture
def folder(tmp_path):
    """A tiny LLaMA as `save_pretrained` writes it."""
    return save_tiny("tiny-llama", tmp_path / "checkpoint")


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """Lay out weights as in the hub's cache: `hub_cache("facebook/opt-6.7b", "tiny-opt")` -> commit."""
    import huggingface_hub.constants

    root = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    import huggingface_hub._snapshot_download as snapshot
    import huggingface_hub.file_download as download

    for module in (snapshot, download):
        monkeypatch.setattr(module.constants, "HF_HUB_CACHE", str(root))

    def make(repo, tiny):
        commit = hashlib.sha1(repo.encode()).hexdigest()
        base = root / f"models--{repo.replace('/', '--')}"
        (base / "refs").mkdir(parents=True)
        (base / "refs" / "main").write_text(commit)
        save_tiny(tiny, base / "snapshots" / commit)
        return commit

    return make


@pytest.fixture
def no_weights(monkeypatch):
    """Loading a model is an error."""
    from teq.models.checkpoint import Checkpoint

    def load(*_):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(Checkpoint, "load", load)


@pytest.fixture
def only_counted_references():
    """Without the garbage collector, which may or may not come in time: cycles stay until they are freed."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
