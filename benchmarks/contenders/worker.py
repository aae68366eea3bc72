"""A contender in a process of its own, which does a step when it is told to.

So contenders that need other packages or a model of their own take turns with the rest, and memory is that of
one contender alone. One JSON object a line goes to and fro through stdin and stdout. The process needs torch
and transformers and imports nothing of the project that needs Hydra.
"""

import base64
import contextlib
import dataclasses
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from benchmarks.contenders import measuring
from teq.models import arch
from teq.models.checkpoint import LM, Checkpoint
from teq.models.folder import Folder, Saved
from teq.pipeline import cost, estimate
from teq.spec import Settings, UserError
from teq.transforms.teq.settings import Teq

if TYPE_CHECKING:
    from torch import Tensor

    from teq.pipeline.settings import Run

ROOT = Path(__file__).resolve().parents[2]
# glibc otherwise raises, as it goes along, the size from which freed memory goes back to the system, and
# resident memory says more about that than about the contender
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "1"}


@dataclass(frozen=True)
class Spec:
    """A contender: its name, its settings (of TEQ or of GPTQ), the model, and `rows` of `tokens` tokens."""

    name: str
    checkpoint: Checkpoint
    settings: Settings
    tokens: int
    rows: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    threads: int | None = None

    def portable(self) -> "Spec":
        """The same with the checkpoint's own folder, where it has one: to fetch it takes more packages."""
        if not isinstance(self.checkpoint.source, Saved):
            return self
        source = Folder(path=str(self.checkpoint.source.folder().resolve()))
        return dataclasses.replace(self, checkpoint=dataclasses.replace(self.checkpoint, source=source))


def training(run: "Run") -> Teq:
    """Return the TEQ settings of a run, changed to what every contender supports.

    The scales themselves are trained, from ones, at one learning rate. Raises UserError where the method
    trains none.
    """
    if not isinstance(run.transform, Teq):
        raise UserError(f"method={run.method} trains no scales: choose method=teq")
    alike = {"init": "ones", "parameter": "clip", "profile": "paper", "steps": 1, "batch": 1}
    return dataclasses.replace(run.transform, **alike)


class Stepper(Protocol):
    """What can be measured: `step` is the work, done as often as wanted, inside `installed`."""

    def installed(self) -> contextlib.AbstractContextManager[None]: ...

    def step(self, tokens: "Tensor") -> float: ...


class Worker:
    """The caller's side. `python` may be another environment's; `alone` fixes malloc's settings (memory)."""

    def __init__(self, spec: Spec, python: str | Path = sys.executable, alone: bool = False) -> None:
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | (MALLOC if alone else {})
        command = [str(python), "-c", "from benchmarks.contenders.worker import serve; serve()"]
        self.name, pipe = spec.name, subprocess.PIPE
        try:
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        except OSError as error:
            raise UserError(f"{spec.name}: {python} cannot be run ({error.strerror})") from None
        self.hello = self._ask(base64.b64encode(pickle.dumps(spec.portable())).decode())

    def step(self) -> tuple[float, float]:
        """Seconds and loss of one step."""
        answer = self._ask("step")
        return answer["seconds"], answer["value"]

    def memory(self) -> dict[str, int | None]:
        """Return what `measuring.memory` finds for a step, and what was predicted; call `step` before."""
        return self._ask("memory")

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _ask(self, line: str) -> dict[str, Any]:
        """Send a line and read the answer. Raises UserError when the process ended or failed."""
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            answer = json.loads(self.process.stdout.readline() or "null")
        except (OSError, ValueError):
            answer = None
        if answer is None or "error" in answer:
            with contextlib.suppress(OSError):  # what is left to be flushed has nowhere to go
                self.process.stdin.close()
            status = self.process.wait()
            raise UserError(f"{self.name}: " + (answer["error"] if answer else f"ended with status {status}"))
        return answer


def memory_of(spec: Spec, python: str | Path = sys.executable) -> dict[str, int | None]:
    """Peak memory of a contender's second step, in a process of its own."""
    with Worker(spec, python, alone=True) as worker:
        worker.step()
        return worker.memory()


def serve() -> None:
    """The process's side: a spec on the first line, then a command a line until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries that print do so where they do no harm
    try:
        for answer in _answers(pickle.loads(base64.b64decode(sys.stdin.readline()))):
            print(json.dumps(answer), file=answers)
    except Exception as error:  # whatever it is, the caller is told in one line
        print(json.dumps({"error": measuring.brief(error)}), file=answers)
        sys.exit(1)


def _answers(spec: Spec) -> Iterator[dict[str, Any]]:
    import torch

    torch.set_num_threads(spec.threads or torch.get_num_threads())
    # the blocks that are streamed stay in the host's memory
    lm = spec.checkpoint.load(spec.dtype, "cpu" if spec.name == "offload" else spec.device, spec.device)
    name, block = next(iter(arch.blocks(lm.model, lm.arch).items()))
    found = {
        "machine": cost.machine(spec.device),
        "parameters": sum(p.numel() for p in lm.model.parameters()),
        "block_weights": sum(linear.weight.numel() for linear in arch.linears(name, block).values()),
    }
    tokens = measuring.tokens_of(lm.model, spec.rows, spec.tokens).to(spec.device)
    stepper = _made(spec, lm)
    found["blocks"] = len(arch.blocks(lm.model, lm.arch))
    with contextlib.suppress(metadata.PackageNotFoundError):
        found["machine"]["versions"]["neural_compressor"] = metadata.version("neural_compressor")
    with stepper.installed():
        yield found
        for line in sys.stdin:
            if line.strip() == "memory":
                found = measuring.memory(lambda: stepper.step(tokens), spec.device)
                yield found | {"predicted_bytes": _predicted(spec, lm)}
            else:
                seconds, value = measuring.timed(lambda: stepper.step(tokens), spec.device)
                yield {"seconds": seconds, "value": value}


def _predicted(spec: Spec, lm: LM) -> int | None:
    """Return the peak bytes of a step over the weights as `python -m teq plan` predicts them.

    None for a contender that is not the project's own.
    """
    from benchmarks.contenders.steps import STRATEGIES

    device = spec.device.partition(":")[0]
    held = sum(t.nbytes for t in {*lm.model.parameters(), *lm.model.buffers()} if t.device.type == device)
    if spec.name == "gptq":
        return spec.settings.estimate(lm).bytes - held
    if spec.name not in STRATEGIES:
        return None
    settings = dataclasses.replace(spec.settings, length=spec.tokens, batch=spec.rows)
    strategy = STRATEGIES[spec.name]
    return estimate.estimate(settings, lm.model.config, lm.arch, spec.dtype, strategy).bytes - held


def _made(spec: Spec, lm: LM) -> Stepper:
    """The contender that a spec names."""
    if spec.name == "neural-compressor":
        from benchmarks.contenders.neural_compressor_step import NeuralCompressor

        return NeuralCompressor(lm, spec.settings)
    if spec.name == "gptq":
        from benchmarks.contenders.gptq_step import GptqBlocks

        return GptqBlocks(lm, spec.settings)
    from benchmarks.contenders.steps import Contender

    return Contender(spec.name, lm, spec.settings, spec.device)
