"""What a stage cost and where it ran: seconds, peak memory, machine, versions, code."""

import contextlib
import functools
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from teq import ranks

LIBRARIES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "lm_eval",
    "datasets",
    "hydra-core",
    "numpy",
)


@contextlib.contextmanager
def cost(device: str) -> Iterator[dict[str, Any]]:
    """Fills the yielded dict at its end: seconds, peak_bytes (of the device, or of the process on a CPU),
    machine, and the code that did it.
    """
    found: dict[str, Any] = {"code": code()}
    _reset_peak(device)
    start, before = time.perf_counter(), _Uncounted.seconds
    yield found
    found["seconds"] = round(time.perf_counter() - start - (_Uncounted.seconds - before), 3)
    found["peak_bytes"] = _peak(device)
    found["machine"] = machine(device)


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """Time that no stage is charged for: loading a checkpoint takes what the disk and the network take."""
    start = time.perf_counter()
    try:
        yield
    finally:
        _Uncounted.seconds += time.perf_counter() - start


class _Uncounted:
    seconds = 0.0


def machine(device: str) -> dict[str, Any]:
    """The device, its name, the processor count and the versions of everything that could change a number."""
    name = _processor()
    torch = sys.modules.get("torch")
    if device.startswith("cuda") and torch is not None:
        name = torch.cuda.get_device_name(device)
    return {
        "device": device,
        "name": name,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads() if torch is not None else None,
        "python": platform.python_version(),
        "versions": versions(),
    } | ({"ranks": ranks.count()} if ranks.count() > 1 else {})


def versions() -> dict[str, str]:
    """Installed versions of the libraries that matter, without importing them."""
    found = {}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


@functools.cache
def code() -> dict[str, Any]:
    """The commit of this code and whether the tree had uncommitted changes when the process first asked: what
    is committed while it runs is not what runs. Nulls outside a git checkout.
    """
    folder = Path(__file__).resolve().parent.parent

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *args], capture_output=True, text=True, check=False
            )
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    status = git("status", "--porcelain")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _reset_peak(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        # initializes CUDA as well: resetting the peak of a named device does not
        torch.cuda.set_device(device)
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: start VmHWM again from the present size


def _peak(device: str) -> int | None:
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return None
