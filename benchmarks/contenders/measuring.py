"""What the benchmarks share: seconds, live bytes, medians, JSON never half written, errors in one line."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from teq.pipeline import cost as measure
from teq.spec import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")
INCOMPLETE = 3  # exit status: some contender failed, the others are there; a crash of Python itself is 1


def synchronize(device: str) -> None:
    """Wait until a GPU has done what it was given; a CPU has already."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)


def timed(work: Callable[[], T], device: str) -> tuple[float, T]:
    """The seconds that `work` took, and what it returned."""
    synchronize(device)
    start = time.perf_counter()
    result = work()
    synchronize(device)
    return time.perf_counter() - start, result


def memory(work: Callable[[], Any], device: str) -> dict[str, int | None]:
    """Return the peak bytes of `work` over what there was before it.

    It must have run once already: the first run allocates what stays.

    `live_bytes` are those of tensors: the profiler's allocation events on a CPU, the allocator's own count on
    a GPU. `resident_bytes` are the process's (null where the system does not tell). `device_bytes` are all
    that a GPU held, weights and all (null on a CPU).
    """
    if device.startswith("cuda"):
        import torch

        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        with measure.cost(device) as cost:
            work()
        peak = cost["peak_bytes"]
        return {"live_bytes": peak - before, "resident_bytes": None, "device_bytes": peak}
    # resident first: the profiler's own events take memory too
    with measure.cost(device) as cost:
        held = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        work()
    resident = None if cost["peak_bytes"] is None else max(0, cost["peak_bytes"] - held)
    return {"live_bytes": _allocated(work), "resident_bytes": resident, "device_bytes": None}


def _allocated(work: Callable[[], Any]) -> int:
    """The peak of what tensors allocate less what they free."""
    from torch import profiler

    with profiler.profile(profile_memory=True, activities=[profiler.ProfilerActivity.CPU]) as profile:
        work()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def tokens_of(model: "nn.Module", rows: int, count: int) -> "Tensor":
    """Seeded token ids `[rows, count]` on the model's device: what they say does not matter here."""
    import torch

    table = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)
    return torch.randint(table.num_embeddings, (rows, count), generator=generator).to(table.weight.device)


def default_dtype(device: str) -> str:
    """Weights are bfloat16 on a GPU and float32 on a CPU, which is slow at anything else."""
    return "bfloat16" if device.startswith("cuda") else "float32"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, min and max."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(a: float | Sequence[float] | None, b: float | Sequence[float] | None) -> float | None:
    """`a / b`; of two sequences of turns the median of the ratios turn by turn. None where one is missing."""
    if not a or not b:
        return None
    if isinstance(a, Sequence) and isinstance(b, Sequence):
        return statistics.median(x / y for x, y in zip(a, b, strict=True))
    return a / b


def shown(value: float | None, width: int, digits: int = 2) -> str:
    """A number in a table's column, or a dash."""
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.{digits}f}"


def write(file: Path, data: Any) -> None:
    """Write JSON aside and rename it into place."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(f".{os.getpid()}.part")
    aside.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")
    aside.replace(file)


def read(file: Path) -> dict[str, Any]:
    """What `write` left there. Raises UserError when it is something else."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be gone on from ({error}): move it away, or give another") from None


def brief(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, UserError) and text else f"{type(error).__name__}: {text}".rstrip(": ")


def command_line(main: Callable[[list[str]], int], argv: Sequence[str]) -> int:
    """`main(argv)`; what goes wrong for a reason that the user can do something about is one line."""
    try:
        return main(list(argv))
    except (UserError, MemoryError, subprocess.SubprocessError, OSError) as error:
        print(f"error: {brief(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
