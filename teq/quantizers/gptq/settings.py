"""GPTQ: round column by column and let the columns that follow make up for the error."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from teq.data.texts import Calibration
from teq.grid import Grid
from teq.spec import Runtime, Settings, option
from teq.stage import Load

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from teq.device.memory import Need
    from teq.models.checkpoint import LM

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Gptq(Settings):
    """GPTQ as its official code runs it; the defaults of the options are that code's."""

    version = 2
    group = "gptq"
    grid: Grid
    calib: Calibration
    samples: int = option(at_least=1)
    length: int = option(at_least=2)
    damping: float = option(0.01, above=0)
    block_size: int = option(128, at_least=1)
    act_order: bool = False
    static_groups: bool = False
    true_sequential: bool = False

    def corpus(self) -> str:
        """The calibration text."""
        return self.calib.corpus

    def quantize(
        self, load: Load, scales: Mapping[str, "Tensor"], runtime: Runtime
    ) -> tuple[dict[str, "Tensor"], dict[str, Any]]:
        """Quantize block by block on calibration windows; see
        `teq.quantizers.gptq.blocks.quantize_blocks`.
        """
        import torch

        from teq.device import memory
        from teq.quantizers.gptq.blocks import quantize_blocks, waiting_bytes

        lm = load()
        windows = self._windows(lm.tokenizer)
        beside = self.expected(lm).bytes - sum(p.nbytes for p in lm.model.parameters())
        if memory.fits(beside, lm.model, runtime):
            try:
                return quantize_blocks(self, lm, scales, windows, partial=runtime.partial)
            except RuntimeError as error:
                if runtime.device == "cpu" or not memory.exhausted(error):
                    raise
            # not inside the handler: the error's traceback holds the very tensors that filled the memory
            log.warning("memory ran out in GPTQ: its hidden states go to the host")
            del lm
            memory.release(runtime.device)
            lm = load()
        log.info("%.3g GB of hidden states wait in the host's memory", waiting_bytes(self, lm) / 1e9)
        return quantize_blocks(self, lm, scales, windows, torch.device("cpu"), runtime.partial)

    def check_text(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Raises UserError where the calibration text gives too few windows."""
        self._windows(tokenizer)

    def _windows(self, tokenizer: "PreTrainedTokenizerBase") -> "Tensor":
        from teq import data as corpora

        return corpora.calibration(self.calib, tokenizer, self.samples, self.length)

    def expected(self, lm: "LM") -> "Need":
        """What quantizing an outline of the model needs; see `teq.quantizers.gptq.blocks.expected`."""
        from teq.quantizers.gptq.blocks import expected

        return expected(self, lm)
