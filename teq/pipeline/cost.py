"""What a stage cost and where it ran: seconds, peak memory, machine, versions, code."""

import contextlib
import functools
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from teq.files.disk import sha256
from teq.spec import digest

PACKAGE = Path(__file__).resolve().parent.parent
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


class _Sources(MetaPathFinder):
    """Notes the digest of each module of this package when it is imported: what is edited later does not run.

    `imported` holds them by path below the package.
    """

    def __init__(self) -> None:
        names = [name for name in sys.modules if name.partition(".")[0] == PACKAGE.name]
        self.imported: dict[str, str] = {}
        for name in names:
            self._note(getattr(sys.modules[name], "__file__", None))

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        """Find nothing itself: that is left to the finders that follow."""
        if name.partition(".")[0] == PACKAGE.name and (spec := PathFinder.find_spec(name, path)) is not None:
            self._note(spec.origin)
            return spec
        return None

    def digest(self) -> str:
        """Return the digest of all sources of the package: as imported, and the others as they are now."""
        found = {str(file.relative_to(PACKAGE)): file for file in sorted(PACKAGE.rglob("*.py"))}
        return digest({name: self.imported.get(name) or sha256(file) for name, file in found.items()})

    def _note(self, file: str | None) -> None:
        source = None if file is None else Path(file).resolve()  # as PACKAGE is
        if source is not None and source.is_relative_to(PACKAGE) and source.is_file():
            self.imported[str(source.relative_to(PACKAGE))] = sha256(source)


@contextlib.contextmanager
def cost(device: str) -> Iterator[dict[str, Any]]:
    """Context manager: yields a dict that is filled at the end with what the work cost.

    Seconds, peak_bytes (of the device, or of the process on a CPU), machine, and the code that did it.
    """
    found: dict[str, Any] = {}
    code()  # the commit is that of now
    _reset_peak(device)
    start, before = time.perf_counter(), _Uncounted.seconds
    yield found
    found["seconds"] = round(time.perf_counter() - start - (_Uncounted.seconds - before), 3)
    found["peak_bytes"] = _peak(device)
    found["machine"] = machine(device)
    found["code"] = code()


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """Context manager: exclude the enclosed time (downloads, loading) from the stage's seconds."""
    start = time.perf_counter()
    try:
        yield
    finally:
        _Uncounted.seconds += time.perf_counter() - start


class _Uncounted:
    seconds = 0.0


def machine(device: str) -> dict[str, Any]:
    """Return the device, its name, processors, and the versions of what could change a number."""
    name = _proc("cpuinfo", "model name") or platform.processor() or platform.machine()
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
        "flags": flags(device),
    }


def versions() -> dict[str, str]:
    """Return installed versions of the libraries that matter, without importing them."""
    found = {}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def code() -> dict[str, Any]:
    """Return the running code: a digest of the sources as imported, commit and dirty flag.

    The commit is that of the first call: later commits are not the running code. `dirty` says whether the
    sources had changes then or have others now. Both are null outside a git checkout.
    """
    commit, dirty, first = _checkout()
    sources = _SOURCES.digest()
    return {
        "sources": sources,
        "commit": commit,
        "dirty": None if dirty is None else dirty or sources != first,
    }


@functools.cache
def _checkout() -> tuple[str | None, bool | None, str]:
    """Return commit, dirty flag and the digest of the sources, as at the first call."""

    def git(*args: str) -> str | None:
        command = ["git", "-C", str(PACKAGE), *args]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    status = git("status", "--porcelain")
    return git("rev-parse", "HEAD"), None if status is None else bool(status), _SOURCES.digest()


def flags(device: str) -> dict[str, Any]:
    """Return switches of PyTorch and versions of the device's libraries that can move a result."""
    import torch

    found: dict[str, Any] = {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
    if device.startswith("cuda"):
        found |= {
            "tf32": torch.backends.cuda.matmul.allow_tf32,
            "cudnn_tf32": torch.backends.cudnn.allow_tf32,
            "bf16_reduced": torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
            "fp16_reduced": torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
            "cudnn_deterministic": torch.backends.cudnn.deterministic,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": _driver(),
        }
    return found


def _driver() -> str | None:
    """Return the version of NVIDIA's driver, or None; PyTorch has no call for it."""
    with contextlib.suppress(OSError):
        found = re.search(
            r"Kernel Module.*?\s(\d+(?:\.\d+)+)", Path("/proc/driver/nvidia/version").read_text()
        )
        return found and found[1]
    return None


def _proc(file: str, name: str) -> str | None:
    """Return a value of a file in /proc, or None: only Linux has them."""
    with contextlib.suppress(OSError):
        for line in Path("/proc", file).read_text().splitlines():
            if line.startswith(name):
                return line.partition(":")[2].strip()
    return None


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
    peak = _proc("self/status", "VmHWM")
    return None if peak is None else int(peak.split()[0]) * 1024


_SOURCES = _Sources()
sys.meta_path.insert(0, _SOURCES)
