"""Several processes: the ranks of torchrun train together; everything else rank 0 does alone.

Rank 0 runs the very program that one process runs: it checks, talks to the store, writes and prints. The
other ranks wait for a training from it, take part in it, and wait again. Within a training the frozen blocks
are sharded over the ranks (FSDP2), each rank computes on its part of a step's samples, and the scales'
gradients are averaged. Outside of torchrun, and outside of a training, every function here leaves things as
they are.
"""

import contextlib
import dataclasses
import datetime
import gc
import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from teq.spec import Runtime, UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from teq.arch import Arch
    from teq.models import Checkpoint
    from teq.pipeline import Bench
    from teq.transforms import Load, OnStep, Transform

T = TypeVar("T")
Fitted = tuple[Mapping[str, "Tensor"], dict[str, Any]]
PATIENCE = datetime.timedelta(days=30)  # the others wait through whatever rank 0 does between two trainings
LOST = ("closed by peer", "reset by peer")  # what gloo says where another process has ended


class Lost(BaseException):
    """A rank failed within a training where the others did not: they wait for it in vain, so all must end.

    No Exception, so that nothing goes on to the next job after it.
    """


@dataclass(frozen=True)
class Task:
    """What the other ranks need for a training: frozen settings. `runtime.device` is rank 0's."""

    transform: "Transform"
    checkpoint: "Checkpoint"
    dtype: str
    runtime: Runtime
    identity: str


class _Team:
    """What this process knows of the others."""

    device = ""  # its own
    group: Any = None  # for weights and gradients: gloo on CPUs, nccl on CUDA devices
    training = False  # within a training that all ranks take part in
    agreed = False  # every rank came as far as `shard` in it


def count() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def leads() -> bool:
    """Whether this is the process that does everything but train: the only one, or rank 0."""
    return count() == 1 or os.environ["RANK"] == "0"


def own(wanted: str) -> str:
    """The device that `device=<wanted>` means for this process: under torchrun each has a CUDA device of its
    own. Raises UserError where it names a single one for all of them.
    """
    if count() == 1:
        return wanted
    if wanted.startswith("cuda:"):
        raise UserError(
            f"device={wanted} is one device for {count()} processes: under torchrun choose device=cuda "
            "(each takes its own) or device=cpu"
        )
    import torch

    on_cuda = wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available())
    return f"cuda:{os.environ['LOCAL_RANK']}" if on_cuda else wanted


def check(transform: "Transform", checkpoint: "Checkpoint") -> None:
    """Raises UserError where `count()` ranks cannot train together, where that is known without weights."""
    if count() == 1 or not _together(transform):
        return
    batch = transform.batch
    if batch > count() and batch % count():
        raise UserError(
            f"train.batch={batch} cannot be shared by {count()} ranks: it must be a multiple of them, or "
            "fewer (then all of them compute on the same samples)"
        )
    from teq.models import Hub, Wheel

    if not isinstance(checkpoint.source, Hub | Wheel):  # theirs may have to be fetched: `shard` will see
        _check_blocks(int(checkpoint.config().num_hidden_layers))


@contextlib.contextmanager
def leading(devices: set[str]) -> Iterator[None]:
    """Within: the other ranks take part in rank 0's trainings. `devices`: what the jobs were given as device.

    At its end the others are sent home. An exception ends this process instead, and then torchrun the
    others. Raises UserError where the ranks' devices do not go together.
    """
    if count() == 1:
        yield
        return
    if len(devices) > 1:
        raise UserError(f"device={','.join(sorted(devices))} is mixed: torchrun needs one for all runs")
    _meet(next(iter(devices)))
    try:
        yield
    except KeyboardInterrupt:  # torchrun passes the terminal's interrupt on: once is enough
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise
    _first(None)
    _part()


def follow() -> int:
    """What every rank but 0 does, from the beginning to the end. Returns the exit status."""
    from teq import devices

    for each in (signal.SIGINT, signal.SIGTERM):  # rank 0 is the one to stop; its end is everyone's
        signal.signal(each, signal.SIG_IGN)
    try:
        _meet("")
        with devices.taken(_Team.device.partition(":")[0]):
            while (task := _first(None)) is not None:
                with contextlib.suppress(UserError):  # rank 0 has it as well, says it and goes on
                    _take_part(dataclasses.replace(task, runtime=_as_own(task.runtime)), lambda *_: None)
    except UserError:  # rank 0 says it
        return 1
    except RuntimeError as error:
        if not any(lost in str(error) for lost in LOST):
            raise
        print(f"rank {os.environ['RANK']}: another rank is gone", file=sys.stderr)  # which has said why
        return 1
    _part()
    return 0


def fit(transform: "Transform", bench: "Bench", load: "Load", runtime: Runtime, on_step: "OnStep") -> Fitted:
    """`transform.fit` by all ranks where the transform trains, otherwise here, with the model of `load`.

    The ranks load models of their own, as `bench` would, and drop them. Raises UserError where all ranks do,
    Lost where only some failed.
    """
    if count() == 1 or not _together(transform):
        return transform.fit(load, runtime, on_step)
    if _Team.group is None:
        raise UserError("torchrun's ranks train in the process it started: leave out hydra/launcher")
    task = Task(transform, bench.checkpoint, bench.dtype, runtime, bench.identity)
    _first(task)
    try:
        return _take_part(task, on_step)
    except UserError:
        raise
    except Exception as error:
        from teq.memory import exhausted

        logging.getLogger("teq.traceback").debug("%s", traceback.format_exc())
        line = " ".join(f"{type(error).__name__}: {error}".split())
        if exhausted(error):
            line += "; try memory=checkpoint, a shorter train.length, or larger devices"
        raise Lost(f"training over {count()} ranks failed: {line}") from error


def strategy(chosen: str, transform: "Transform") -> str:
    """The strategy that ranks train with where one process would take `chosen`: `offload` becomes
    `checkpoint`, for the weights are spread already.
    """
    return "checkpoint" if chosen == "offload" and count() > 1 and _together(transform) else chosen


def shard(model: "nn.Module", arch: "Arch") -> None:
    """Spread the weights of the blocks over the ranks, each whole only while it computes; for good.

    Raises UserError where a rank could not come this far, or has no block.
    """
    if not _Team.training:
        return
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    from teq.arch import blocks

    _agree(None)
    found = blocks(model, arch)
    _check_blocks(len(found))
    mesh = DeviceMesh.from_group(_Team.group, _Team.device.partition(":")[0])
    inside = {parameter for block in found.values() for parameter in block.parameters()}
    around = {parameter for parameter in model.base_model.parameters() if parameter not in inside}
    for block in found.values():
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model.base_model, mesh=mesh, ignored_params=around)  # the root gathers a block ahead of use


def share(samples: "Tensor", whole: bool = False) -> "Tensor":
    """This rank's part of a step's `samples [batch, token]`: all of them where `whole`, or where there are
    fewer than ranks.
    """
    if not _Team.training or whole or len(samples) < count():
        return samples
    return samples.chunk(count())[int(os.environ["RANK"])]


def mean(loss: "Tensor") -> float:
    """The mean over the ranks of a number, the same on each of them."""
    if not _Team.training:
        return loss.item()
    import torch.distributed

    total = loss.detach().clone()
    torch.distributed.all_reduce(total, group=_Team.group)
    return total.item() / count()


def average(parameters: "Iterable[nn.Parameter]") -> None:
    """Replace the gradients of `parameters` by their means over the ranks."""
    if not _Team.training:
        return
    import torch

    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat, group=_Team.group)
    flat /= count()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def from_first(value: T) -> T:
    """Rank 0's `value` on every rank of a training; a rank by itself keeps its own."""
    return _first(value) if _Team.training else value


def _together(transform: Any) -> bool:
    return getattr(transform, "together", False)


def _check_blocks(blocks: int) -> None:
    if blocks < count():
        raise UserError(
            f"{count()} ranks are more than the model's {blocks} blocks, which are shared among them: start "
            f"torchrun with --nproc-per-node {blocks} or fewer"
        )


def _meet(wanted: str) -> None:
    """Join the other ranks and agree on the devices: rank 0 says what is `wanted`. Raises UserError."""
    import torch
    from torch import distributed

    from teq.pipeline import resolve_device

    distributed.init_process_group("gloo", timeout=PATIENCE)
    try:
        device, problem = resolve_device(_first(wanted)), None
    except UserError as error:
        device, problem = "", str(error)
    said: list[Any] = [None] * count()
    distributed.all_gather_object(said, (device.partition(":")[0], problem))
    _raise_first([problem for _, problem in said])
    if len({kind for kind, _ in said}) > 1:
        kinds = ", ".join(f"rank {rank} {kind}" for rank, (kind, _) in enumerate(said))
        raise UserError(f"device=auto is mixed ({kinds}): choose device=cpu, or ranks with a GPU each")
    if device != "cpu":
        torch.cuda.set_device(device)
    _Team.device, _Team.group = device, distributed.new_group(backend="gloo" if device == "cpu" else "nccl")


def _part() -> None:
    from torch import distributed

    distributed.destroy_process_group()
    _Team.device, _Team.group = "", None


def _first(value: Any) -> Any:
    """Rank 0's `value` on every rank."""
    from torch import distributed

    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def _as_own(runtime: Runtime) -> Runtime:
    """Rank 0's way of working on this rank's device; rank 0 alone writes files."""
    return dataclasses.replace(runtime, device=_Team.device, partial=None)


def _take_part(task: Task, on_step: "OnStep") -> Fitted:
    from teq.pipeline import Bench

    bench = Bench(task.checkpoint, task.dtype, _Team.device, task.identity)
    _Team.training, _Team.agreed = True, False
    try:
        return task.transform.fit(bench.to_use_up, task.runtime, on_step)
    except UserError as error:
        if not _Team.agreed:  # the others are waiting in `shard`
            _agree(str(error))
        raise
    finally:
        _Team.training = False
        del bench
        gc.collect()  # a sharded model refers to itself


def _agree(problem: str | None) -> None:
    """Wait for all ranks; raises the first problem among theirs on each of them."""
    from torch import distributed

    _Team.agreed = True
    said: list[str | None] = [None] * count()
    distributed.all_gather_object(said, problem)
    _raise_first(said)


def _raise_first(problems: list[str | None]) -> None:
    for rank, problem in enumerate(problems):
        if problem is not None:
            raise UserError(problem if rank == 0 else f"rank {rank}: {problem}")
