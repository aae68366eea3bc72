"""Where the project's files and the output of a start of run.py are, and the options that conf/ offers."""

import datetime
import functools
import os
import socket
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from teq.files import disk
from teq.files.disk import ROOT

GROUPS = ("model", "method", "bits", "group_size", "grid", "init", "recipe", "logger")
# what groups' files refer to, most of it no user's to set
INTERNAL = ("method", "quant_grid", "calibration", "finetuning")
OF_THE_GRID = ("quant_grid.scale_dtype", "quant_grid.search")
LAUNCHER = "hydra/launcher"
LAYOUT = "layout"  # the node of an experiment file that says how its records are shown; no run reads it


def folder(name: str = "") -> Path:
    """Return the folder `conf`, `experiments` or `results` of the project (TEQ_ROOT, or this clone)."""
    return disk.project() / name


def home() -> Path:
    """Return the folder for records and cached artefacts: TEQ_HOME, or `cache` next to run.py."""
    return Path(os.environ.get("TEQ_HOME") or ROOT / "cache").expanduser().absolute()


def prepare_environment() -> None:
    """Set what conf/config.yaml refers to, which workers inherit: project, output, name of this start."""
    os.environ["TEQ_ROOT"] = str(folder())
    os.environ["TEQ_HOME"] = str(home())
    os.environ["TEQ_START"] = start_of_run()
    os.environ["TEQ_OUTPUT"] = str(output())
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name, which the other one would override
        # pinned memory by its size, not rounded up to a power of two; read at the first allocation
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "pinned_max_round_threshold_mb:1")


def _gpus() -> int:
    """Return the number of CUDA devices here, or 1: the workers of conf/hydra/launcher/gpus.yaml."""
    import torch

    return max(1, torch.cuda.device_count())


OmegaConf.register_new_resolver("teq.gpus", _gpus, replace=True)


def start_of_run() -> str:
    """Return the name of this start of run.py: the same in every process that it starts, in no other."""
    if "TEQ_START" not in os.environ:
        begin_run()
    return os.environ["TEQ_START"]


def begin_run() -> None:
    """Give this start of run.py a unique name."""
    now = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    os.environ["TEQ_START"] = f"{now}_{socket.gethostname()}-{os.getpid()}-{os.urandom(2).hex()}"


def output() -> Path:
    """Return the folder for logs and outcomes of this start of run.py; temporary if `home()` is read-only."""
    if disk.writable(home()):
        return home() / "hydra" / start_of_run()
    return Path(tempfile.gettempdir()) / f"teq-{start_of_run()}"


def groups() -> dict[str, list[str]]:
    """Return the options of each group that a user chooses from, and the experiments."""
    found = {name: option_names(folder("conf") / name) for name in GROUPS}
    return found | {
        "evals": option_names(folder("conf") / "eval"),
        LAUNCHER: option_names(folder("conf") / LAUNCHER),
        "experiments": option_names(folder("experiments")),
    }


def option_names(group: Path) -> list[str]:
    """Return the option names in a folder of YAML files; numbers by size."""
    names = [file.stem for file in group.glob("*.yaml")]
    return sorted(names, key=lambda name: (0, int(name), "") if name.lstrip("-").isdigit() else (1, 0, name))


def values() -> dict[str, Any]:
    """Return the default of each single value that a user can set, by dotted name."""
    found = flat(_plain("config.yaml"), ("defaults", "hydra"))
    return {key: value for key, value in found if not key.startswith(INTERNAL) or key in OF_THE_GRID}


def help_sentences() -> dict[str, str]:
    """Return a sentence for each group and each value, by dotted name."""
    return dict(flat(_plain("help.yaml")))


def _plain(name: str) -> dict[str, Any]:
    """Return the content of a file of conf/, read in C where possible: OmegaConf would slow `--help` down."""
    text = (folder("conf") / name).read_text(encoding="utf-8")
    return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def experiment(name: str) -> dict[str, Any]:
    """Return the content of an experiment file."""
    return read(folder("experiments") / f"{name}.yaml")


def read(file: Path) -> dict[str, Any]:
    """Return the content of a YAML file, interpolations unresolved; it is cached, so do not change it."""
    return _read(file, file.stat().st_mtime_ns)


@functools.cache
def _read(file: Path, _: int) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.load(file))


def flat(node: Mapping[str, Any], skip: tuple[str, ...] = (), prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and the value of each leaf of a configuration, without the top keys `skip`."""
    for key, value in node.items():
        if isinstance(value, dict) and key not in skip:
            yield from flat(value, (), f"{prefix}{key}.")
        elif key not in skip:
            yield f"{prefix}{key}", value
