"""The one loaded model of a run, and what has been done to it."""

import logging
from typing import Any

from teq.device import memory
from teq.models.checkpoint import LM, Checkpoint
from teq.pipeline.cost import uncounted
from teq.pipeline.store import Artefact
from teq.spec import UserError

log = logging.getLogger(__name__)
PRISTINE = "pristine"


class LoadedModel:
    """A checkpoint in memory. Nothing is loaded before it is asked for, and never two models at once."""

    def __init__(self, checkpoint: Checkpoint, dtype: str, device: str) -> None:
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device
        self.identity = checkpoint.source.fingerprint(device)
        self._lm: LM | None = None
        # dtype, and PRISTINE or the key of the weights in it; None: used up
        self._state: tuple[str, str] | None = None

    def pristine(self, device: str | None = None, dtype: str | None = None) -> LM:
        """Return the model as it was loaded, on `device` in `dtype` (by default its own); to be left so.

        Raises UserError if the weights have changed since the run's keys were made.
        """
        dtype = dtype or self.dtype
        if self._lm is None or self._state != (dtype, PRISTINE):
            self._lm = None
            memory.release(self.device)  # the old model, before another one needs its room
            log.info("loading model=%s", self.checkpoint.name)
            with uncounted():
                self._lm = self.checkpoint.load(dtype, device or self.device, self.device)
                if (now := self.checkpoint.source.fingerprint(self.device)) != self.identity:
                    raise UserError(
                        f"the weights of model={self.checkpoint.name} changed while the run was under way "
                        f"({self.identity} is {now} now): start it again, what was finished is kept"
                    )
            self._state = dtype, PRISTINE
        elif self._lm.device.type != "meta":
            self._lm.model.to(device or self.device)
        return self._lm

    def to_use_up(self, dtype: str | None = None, device: str | None = None) -> LM:
        """Return the model as it was loaded; the caller may change it."""
        lm, self._state = self.pristine(device, dtype), None
        return lm

    def holding(self, weights: Artefact, grid: Any, dtype: str | None = None) -> LM:
        """Return the model with the stored weights in it: the file alone decides what is evaluated."""
        wanted = dtype or self.dtype, weights.key
        if self._state != wanted or self._lm is None:
            from teq.quantizers.quantized import restore

            restore(self.to_use_up(dtype).model, weights.tensors(self.device), grid)
            self._state = wanted
        assert self._lm is not None
        return self._lm

    def attention(self) -> str | None:
        """Return the attention kernel of the model in memory, as transformers names it."""
        return None if self._lm is None else getattr(self._lm.model.config, "_attn_implementation", None)
