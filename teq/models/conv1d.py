"""GPT-2's Conv1D layers as linears: what is quantized then has one orientation, `[out, in]`."""

from typing import TYPE_CHECKING

from torch import nn
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TransposedLinear(nn.Linear):
    """A linear whose weight a checkpoint holds as `[in, out]`."""


def with_linears(model: "PreTrainedModel") -> "PreTrainedModel":
    """Return the model with a `TransposedLinear` in the place of each Conv1D, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            linear = TransposedLinear(module.nx, module.nf, device="meta")
            linear.weight = nn.Parameter(module.weight.detach().T.contiguous())
            linear.bias = module.bias
            model.set_submodule(name, linear)
    return model
