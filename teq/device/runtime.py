"""How a run executes: the device by name, and the options that no result depends on."""

from dataclasses import dataclass
from pathlib import Path

from teq.spec import Settings, UserError, option

# each takes more time and less memory: checkpoint and offload are a training step's
STRATEGIES = ("keep", "checkpoint", "offload", "stream")


@dataclass(frozen=True, kw_only=True)
class Runtime(Settings):
    """Execution options: no result depends on them, so no key has them; a job's `device` may be `auto`."""

    device: str = "cpu"
    memory: str = "auto"  # what the strategy is chosen by
    strategy: str = option("keep", among=STRATEGIES)
    batch_size: int = option(8, at_least=1, key="tasks.batch_size")
    partial: Path | None = None  # folder for the state of a stage that can be interrupted and resumed


DEFAULT_RUNTIME = Runtime()


def resolve(wanted: str) -> str:
    """Return the name of an existing device; `auto` is the first GPU, else the CPU. Raises UserError."""
    import torch

    if wanted == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise UserError(f"device={wanted} is not allowed: it must be auto, cpu or cuda:<n>") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device={wanted} does not exist: there are {torch.cuda.device_count()} CUDA devices here"
        )
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device={wanted} is not allowed: it must be auto, cpu or cuda:<n>")
    return f"cuda:{device.index or 0}" if device.type == "cuda" else "cpu"
