"""The one loaded model of a run, and what has been done to it."""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from teq.device import memory
from teq.models.arch import by_block
from teq.models.checkpoint import LM, Checkpoint
from teq.models.lazy import change_blocks
from teq.pipeline.cost import uncounted
from teq.pipeline.store import Artefact
from teq.quantizers.quantized import restore
from teq.spec import UserError

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)
PRISTINE = "pristine"


class LoadedModel:
    """A checkpoint in memory. Nothing is loaded before it is asked for, and never two models at once."""

    def __init__(self, checkpoint: Checkpoint, dtype: str, device: str) -> None:
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device
        self.identity = checkpoint.source.fingerprint(device)
        self._lm: LM | None = None
        # dtype, whether it is lazy, and PRISTINE or the key of the weights in it; None: used up
        self._state: tuple[str, bool, str] | None = None

    def pristine(self, strategy: str = "keep", dtype: str | None = None) -> LM:
        """Return the model as it was loaded, in `dtype` (by default its own); to be left so.

        The `strategy` says where: offload in the host's memory, stream nowhere before a block is used.
        Raises UserError if the weights have changed since the run's keys were made.
        """
        dtype, lazy = dtype or self.dtype, strategy == "stream"
        device = "cpu" if strategy == "offload" else self.device
        if self._lm is None or self._state != (dtype, lazy, PRISTINE):
            self._lm = None
            memory.release(self.device)  # the old model, before another one needs its room
            log.info("loading model=%s", self.checkpoint.name)
            with uncounted():
                self._lm = self.checkpoint.load(dtype, device, self.device, lazy)
                if (now := self.checkpoint.source.fingerprint(self.device)) != self.identity:
                    raise UserError(
                        f"the weights of model={self.checkpoint.name} changed while the run was under way "
                        f"({self.identity} is {now} now): start it again, what was finished is kept"
                    )
            self._state = dtype, lazy, PRISTINE
        elif self._lm.device.type != "meta" and not lazy:
            self._lm.model.to(device)
        return self._lm

    def to_use_up(self, strategy: str = "keep", dtype: str | None = None) -> LM:
        """Return the model as it was loaded; the caller may change it."""
        lm, self._state = self.pristine(strategy, dtype), None
        return lm

    def holding(self, weights: Artefact, grid: Any, strategy: str = "keep", dtype: str | None = None) -> LM:
        """Return the model with the stored weights in it: the file alone decides what is evaluated."""
        wanted = dtype or self.dtype, strategy == "stream", weights.key
        if self._state != wanted or self._lm is None:
            lm = self.to_use_up(strategy, dtype)
            if strategy == "stream":
                restore_when_read(lm, weights.tensors(), grid)
            else:
                restore(lm.model, weights.tensors(self.device), grid)
            self._state = wanted
        assert self._lm is not None
        return self._lm

    def attention(self) -> str | None:
        """Return the attention kernel of the model in memory, as transformers names it."""
        return None if self._lm is None else getattr(self._lm.model.config, "_attn_implementation", None)


def restore_when_read(lm: LM, tensors: Mapping[str, "Tensor"], grid: Any) -> None:
    """Let each block of a lazy model have the stored `tensors` of its name in it whenever it is read.

    Those of no block, such as the last norm's, are put into the model at once.
    """
    keys = {key.removeprefix("param/"): key for key in tensors}
    parts = {
        owner: [keys[name] for name in names] for owner, names in by_block(keys, lm.model, lm.arch).items()
    }

    def change(name: str) -> None:
        restore(lm.model, {key: tensors[key].to(lm.device) for key in parts[name]}, grid)

    change("")
    change_blocks(lm.model, lm.arch, change)
