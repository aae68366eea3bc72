"""Checkpoints: a source of weights and an architecture become a model with its tokenizer."""

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from teq.models.arch import Arch
from teq.models.folder import Folder
from teq.models.hub import Hub
from teq.models.lazy import lazy_model
from teq.models.synthetic import Outline, Random, Synthetic
from teq.models.wheel import Wheel
from teq.spec import Settings

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class LM:
    """A loaded checkpoint. `identity` names its weights (commit or digest); `arch` describes its family."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase | None"
    arch: Arch
    identity: str

    @property
    def device(self) -> "torch.device":
        """Return where the input embeddings are: token ids go there."""
        return self.model.get_input_embeddings().weight.device


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Settings):
    """A model as the user names it: where it comes from and which family it is.

    A source offers `fingerprint(device)`, which identifies its weights, `dimensions()`, `tokenizer()`,
    `model(dtype, device, drawn_on)`, its `tensors(dtype)` by name and its `generation()` settings; `at_hand`
    tells whether its dimensions are known without fetching files.
    """

    group = "model"
    name: str
    source: Hub | Folder | Wheel | Random | Synthetic | Outline
    arch: Arch

    def load(self, dtype: str, device: str, drawn_on: str | None = None, lazy: bool = False) -> LM:
        """Load the model in eval mode with frozen `dtype` weights on `device`, and its tokenizer.

        Synthetic weights are drawn on the device `drawn_on` (the same if not given), which decides their
        values. The blocks of a `lazy` model are read when they are used; see `lazy_model`.
        """
        identity, tokenizer = self.source.fingerprint(drawn_on or device), self.tokenizer()
        if lazy:
            read = functools.partial(self.source.tensors, dtype)
            model = lazy_model(self.source.dimensions(), self.arch, dtype, read, device)
        else:
            model = self.source.model(dtype, device, drawn_on or device)
        return LM(model.eval().requires_grad_(False), tokenizer, self.arch, identity)

    def tokenizer(self) -> "PreTrainedTokenizerBase | None":
        """Return the tokenizer, the same object for as long as the process lives; None of a model without."""
        fingerprint = self.source.fingerprint()
        if fingerprint not in _tokenizers:
            _tokenizers[fingerprint] = self.source.tokenizer()
        return _tokenizers[fingerprint]


_tokenizers: dict[str, "PreTrainedTokenizerBase | None"] = {}  # by fingerprint
