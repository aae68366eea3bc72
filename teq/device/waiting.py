"""Hidden states that wait: in the host's memory, or in a mapped file where that has too little room.

Such a file loses its name at once: it is gone with its tensors, or with the process, whatever ends that.
"""

import logging
import math
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex

from teq.device import host_memory
from teq.files import disk
from teq.spec import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

log = logging.getLogger(__name__)
SHARE = 0.5  # of the host's free memory may be taken by what waits: the rest is for what computes


def fits(size: int) -> bool:
    """Return whether so many bytes may wait in the host's memory."""
    return size <= SHARE * host_memory.available()


def room(shape: tuple[int, ...], dtype: "torch.dtype") -> "Tensor":
    """Return a tensor without contents, in the host's memory or in a file. Raises UserError without room."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensor

    size = math.prod(shape) * dtype.itemsize
    if fits(size) or isinstance(torch.empty(0), FakeTensor):  # of a dry run nothing is stored
        return torch.empty(shape, dtype=dtype, device="cpu")
    folder = Path(os.environ.get("TEQ_HOME") or disk.user_cache())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, size)  # now, not by a signal when a page is written
            found = torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=dtype)
    except OSError as error:
        raise UserError(
            f"{size / 1e9:.3g} GB of hidden states have no room in the host's memory, nor in {folder} "
            f"({error.strerror}): free space there, or set TEQ_HOME to another folder"
        ) from error
    log.info("%.3g GB of hidden states wait in a file in %s", size / 1e9, folder)
    return found.view(shape)


class InFile(list["Tensor"]):
    """Parts of one tensor in a file: what is assigned is copied to where the part is."""

    def __setitem__(self, index: SupportsIndex, value: Any) -> None:  # type: ignore[override]
        self[index].copy_(value)

    def copy(self) -> "InFile":
        """Return a copy in a file of its own."""
        made = InFile(room((len(self), *self[0].shape), self[0].dtype))
        for index, part in enumerate(self):
            made[index] = part
        return made


def places(device: "torch.device | str", count: int, like: "Tensor") -> "list[Tensor]":
    """Return places on a device for `count` tensors like one: a list, or `InFile` where the host is full."""
    if not str(device).startswith("cpu") or fits(count * like.nbytes):
        return [like.to(device)] * count
    return InFile(room((count, *like.shape), like.dtype))
