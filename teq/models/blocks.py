"""Running a model's decoder blocks one at a time: the inputs of the first, and a block's output."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from teq.models.arch import Arch, blocks
from teq.spec import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn


class _Caught(Exception):
    pass


def block_inputs(model: "nn.Module", arch: Arch, tokens: "Tensor") -> tuple["Tensor", dict[str, Any]]:
    """Return hidden `[batch, token, width]` and keywords of the first block for `tokens [batch, token]`."""
    import torch

    caught: dict[str, Any] = {}

    def catch(_: "nn.Module", args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught["hidden"] = args[0] if args else kwargs["hidden_states"]
        caught["kwargs"] = {k: v for k, v in kwargs.items() if k != "hidden_states"}
        raise _Caught

    first = next(iter(blocks(model, arch).values()))
    hook = first.register_forward_pre_hook(catch, with_kwargs=True)
    with hook, torch.no_grad(), one_sequence_a_row(), contextlib.suppress(_Caught):
        model(tokens, use_cache=False)
    return caught["hidden"], caught["kwargs"]


def first_inputs(
    model: "nn.Module", arch: Arch, windows: "Tensor", kept: str | None = None
) -> tuple[list["Tensor"], dict[str, Any]]:
    """Return the first block's inputs for `windows [sample, token]`, and its keywords, the same for all.

    The inputs are `[1, token, width]` each, on the device `kept` (by default the model's).
    """
    device, hidden = model.get_input_embeddings().weight.device, []
    for window in windows:
        one, kwargs = block_inputs(model, arch, window[None].to(device))
        hidden.append(one.to(kept or device))
    return hidden, kwargs


@contextlib.contextmanager
def one_sequence_a_row() -> Iterator[None]:
    """Context manager: transformers takes each row of tokens for one sequence, which it is without a mask.

    Otherwise it reads the positions back to see that, and the host waits for the device in every forward
    pass. Fake tensors cannot be read: of them it would prepare for packed sequences.
    """
    from transformers import masking_utils

    kept = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda _: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = kept


def run_block(block: "nn.Module", hidden: "Tensor", kwargs: dict[str, Any]) -> "Tensor":
    """Return a block's output hidden states `[batch, token, width]`; some families return more."""
    out = block(hidden, **kwargs)
    return out[0] if isinstance(out, tuple) else out


def check_head(model: "nn.Module") -> None:
    """Raise UserError if the logits are more than the output embeddings of the last hidden states."""
    import torch

    tokens = torch.arange(8, device=model.get_input_embeddings().weight.device)[None]
    with one_sequence_a_row(), torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        made = model.get_output_embeddings()(model.base_model(tokens, use_cache=False)[0])
    tolerance = 1e-3 * float(expected.abs().max())
    if not torch.allclose(made, expected, rtol=1e-3, atol=tolerance, equal_nan=True):
        raise UserError(
            f"{type(model).__name__} does more to its logits than its output embeddings do: neither the "
            "training loss nor tasks can be computed from its hidden states"
        )
