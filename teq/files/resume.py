"""State of unfinished work in a stage's folder, `Runtime.partial`: the next process resumes from it.

A disk that is full stops no work here: what cannot be written is a warning, once, and is tried again later.
"""

import contextlib
import functools
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teq.files import disk

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

log = logging.getLogger(__name__)
VECTORS = ("free", "mean", "square", "best")  # of a training's state: one number for each that is trained
SECONDS = 60.0  # between two writes of a training's state: the most that a kill without warning costs


class Writer:
    """Runs writes that may fail. `what` names the work in messages."""

    def __init__(self, what: str) -> None:
        self.what, self.warned = what, False

    def attempt(self, write: Callable[[], Any]) -> bool:
        """Return whether `write()` succeeded; the first OSError is logged."""
        try:
            write()
        except OSError as error:
            if not self.warned:
                log.warning("the state of %s cannot be saved (%s): the work goes on", self.what, error)
            self.warned = True
            return False
        return True


class ResumeFile:
    """The state of a training loop in one file.

    It holds the parameters, which are vectors, Adam's moments, losses, the best parameters where they are
    kept, and the CPU's random state: with dropout (profile `inc`) on another device a resumed training draws
    other numbers.
    """

    def __init__(
        self, file: Path | None, free: "Mapping[str, nn.Parameter]", optimizer: "torch.optim.Adam"
    ) -> None:
        self.file, self.free, self.optimizer = file, free, optimizer
        self.writer = Writer("the training")
        self.written, self.saved = 0, time.monotonic()  # steps in the file, and when it was written
        self.state: tuple[int, list[float], dict[str, Tensor], Mapping[str, Tensor] | None] | None = None

    def restore(self) -> "tuple[list[float], dict[str, Tensor]] | None":
        """Put back what was saved; return losses and best parameters so far, or None without a file."""
        import torch

        state = self._read()
        if state is None:
            return None
        losses = state["losses"].tolist()
        parts = {name: self._split(state[name]) for name in VECTORS if name in state}
        torch.set_rng_state(state["random"])
        for name, parameter in self.free.items():
            parameter.data.copy_(parts["free"][name])
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(len(losses))),
                "exp_avg": parts["mean"][name],
                "exp_avg_sq": parts["square"][name],
            }
        self.written = len(losses)
        log.info("training goes on from step %d", len(losses))
        return losses, parts.get("best", {})

    def keep(self, losses: list[float], best: "Mapping[str, Tensor] | None" = None) -> None:
        """Take a copy of the state after a whole step; write it where the last time was `SECONDS` ago."""
        import torch

        if self.file is None:
            return
        copied = self.copied() | {"random": torch.get_rng_state()}
        self.state = len(losses), losses, copied, best  # at once: an interruption leaves the last step's
        if time.monotonic() - self.saved >= SECONDS:
            self.write()

    def copied(self) -> "dict[str, Tensor]":
        """Return a copy of what is trained and its moments, on the device: no step waits for it."""
        import torch

        moments = [self.optimizer.state[parameter] for parameter in self.free.values()]
        return {
            "free": torch.cat([parameter.detach() for parameter in self.free.values()]),
            "mean": torch.cat([moment["exp_avg"] for moment in moments]),
            "square": torch.cat([moment["exp_avg_sq"] for moment in moments]),
        }

    def write(self) -> None:
        """Write the last copy, unless the file holds it already."""
        import torch

        if self.file is None or self.state is None or self.state[0] == self.written:
            return
        count, losses, copied, best = self.state
        state = copied | {"losses": torch.tensor(losses[:count], dtype=torch.float64)}
        if best is not None:
            state["best"] = torch.cat([best[name] for name in self.free])
        if self.writer.attempt(lambda: disk.write_tensors(self.file, state)):
            self.written = count
        self.saved = time.monotonic()

    def _split(self, flat: "Tensor") -> "dict[str, Tensor]":
        sizes = [parameter.numel() for parameter in self.free.values()]
        return {
            name: part.to(parameter.device, copy=True)
            for (name, parameter), part in zip(self.free.items(), flat.split(sizes), strict=True)
        }

    def _read(self) -> "dict[str, Tensor] | None":
        """Return what was saved, when all of it is there."""
        if self.file is None or (found := disk.read_tensors(self.file, "training starts anew")) is None:
            return None
        state, numbers = found[0], sum(parameter.numel() for parameter in self.free.values())
        flat = [state[name] for name in VECTORS if name in state]
        needed = {"free", "mean", "square", "losses", "random"}
        if any(t.shape != (numbers,) for t in flat) or not needed <= state.keys():
            log.warning("%s is of another training: training starts anew", self.file)
            return None
        return state


class BlockFiles:
    """Finished blocks of a model in a folder: a file of tensors for each, with a report in its metadata."""

    def __init__(self, folder: Path | None, what: str) -> None:
        self.folder, self.what, self.writer = folder, what, Writer(what)
        self.read_count = 0  # blocks that were read
        self.waiting: list[tuple[int, dict[str, Tensor], dict[str, Any]]] = []

    def read(self, index: int) -> "tuple[dict[str, Tensor], dict[str, Any]] | None":
        """Return tensors and report of block `index`, where it and all blocks before it are there."""
        found = None
        if self.folder is not None and self.read_count == index:
            found = disk.read_tensors(self._file(index), f"{self.what} begins at this block")
        if found is None:
            if index and self.read_count == index:
                log.info("%s goes on from block %d", self.what, index)
            return None
        self.read_count += 1
        return found[0], json.loads(found[1]["report"])

    def write(self, index: int, tensors: "dict[str, Tensor]", report: dict[str, Any]) -> "dict[str, Tensor]":
        """Store a finished block, and first those before it that could not be stored when they were.

        Returns the tensors; where they were stored, mapped from the file, which takes no memory.
        """
        if self.folder is None:
            return tensors
        self.waiting.append((index, tensors, report))
        while self.waiting:
            number, part, about = self.waiting[0]
            metadata = {"report": json.dumps(about)}
            if not self.writer.attempt(
                functools.partial(disk.write_tensors, self._file(number), part, metadata)
            ):
                return tensors
            del self.waiting[0]
        found = disk.read_tensors(self._file(index), "what was computed is used")
        return tensors if found is None else found[0]

    def _file(self, index: int) -> Path:
        assert self.folder is not None
        return self.folder / f"block-{index:04d}.safetensors"


class Journal:
    """JSON values, one for each finished piece of work, in a file that only grows.

    `entries` holds those of an earlier process. A last line that was torn is ignored and written over. Lines
    are not forced to the disk: what a killed process wrote is there all the same.
    """

    def __init__(self, file: Path | None, what: str) -> None:
        self.file, self.writer = file, Writer(what)
        self.entries: list[Any] = []
        self.size, self.waiting = 0, b""  # bytes of whole lines in the file, the lines that follow
        if file is None or not file.is_file():
            return
        with contextlib.suppress(ValueError):  # torn, as is what no newline ends
            for line in file.read_bytes().split(b"\n")[:-1]:
                self.entries.append(json.loads(line))
                self.size += len(line) + 1
        log.info("%s goes on: %d pieces are done", what, len(self.entries))

    def append(self, entry: Any) -> None:
        """Add a value; floats come back exactly."""
        if self.file is None:
            return
        self.waiting += json.dumps(entry).encode() + b"\n"
        if self.writer.attempt(self._write):
            self.size, self.waiting = self.size + len(self.waiting), b""

    def _write(self) -> None:
        assert self.file is not None
        self.file.parent.mkdir(parents=True, exist_ok=True)
        opened = os.open(self.file, os.O_WRONLY | os.O_CREAT, 0o666)
        with os.fdopen(opened, "wb") as stream:
            stream.truncate(self.size)
            stream.seek(self.size)
            stream.write(self.waiting)
