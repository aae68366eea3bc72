"""Linears in the place of layers that transformers makes of other modules: GPT-2's Conv1D, fused experts.

What is quantized then is always an `nn.Linear` with a weight `[out, in]`.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class TransposedLinear(nn.Linear):
    """A linear whose weight a checkpoint holds as `[in, out]`."""


class Expert(nn.Module):
    """A gated feed-forward layer whose linears are named as checkpoints name them."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor, act_fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = map(_linear, (gate, up, down))
        self.act_fn = act_fn

    def forward(self, x: Tensor) -> Tensor:
        """Return the output `[token, width]` for x `[token, width]`."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.ModuleList):
    """Experts of which each computes the tokens that are routed to it; one without tokens is not called."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of the outputs of every token's experts, `[token, width]`.

        Of `hidden_states [token, width]`; index and weights of their experts are `[token, k]`. Experts add
        one after the other, as in transformers' own loop.
        """
        total = torch.zeros_like(hidden_states)
        chosen, weights = top_k_index.flatten(), top_k_weights.flatten()
        order = chosen.argsort(stable=True)
        for expert, places in zip(self, order.split(self._counts(chosen)), strict=True):
            if len(places):
                tokens = places // top_k_index.shape[1]
                out = expert(hidden_states[tokens]) * weights[places, None]
                total.index_add_(0, tokens, out.to(total.dtype))
        return total

    def _counts(self, chosen: Tensor) -> list[int]:
        """Return how many of the choices fall on each expert; on fake tensors, equal shares."""
        if isinstance(chosen, FakeTensor):
            least, more = divmod(len(chosen), len(self))
            return [least + (i < more) for i in range(len(self))]
        return chosen.bincount(minlength=len(self)).tolist()


def with_linears(model: "PreTrainedModel") -> "PreTrainedModel":
    """Return the model with linears in the place of each Conv1D and of fused experts, in place.

    The linears of experts are views of the fused weights. Experts with biases, another layout or a gate of
    their own stay fused.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            linear = _linear(module.weight.detach().T.contiguous(), TransposedLinear)
            linear.bias = module.bias
            model.set_submodule(name, linear)
        elif _is_fused(module):
            parts = zip(module.gate_up_proj.detach(), module.down_proj.detach(), strict=True)
            experts = (Expert(*both.chunk(2), down, module.act_fn) for both, down in parts)
            model.set_submodule(name, Experts(experts))
    return model


def _linear(weight: Tensor, kind: type[nn.Linear] = nn.Linear) -> nn.Linear:
    """Return a linear of `weight [out, in]` without a bias."""
    out, width = weight.shape
    linear = kind(width, out, bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    return linear


def _is_fused(module: nn.Module) -> bool:
    """Tell whether a module holds experts as `gate_up_proj [expert, 2 n, width]` and `down_proj`.

    Attributes that older versions of transformers do not set have one value there.
    """
    gate = getattr(type(module), "_apply_gate", None)
    return (
        getattr(gate, "__name__", "") == "_default_apply_gate"
        and getattr(module, "has_gate", True)
        and getattr(module, "is_concatenated", True)
        and not module.is_transposed
        and not module.has_bias
        and not getattr(module, "has_post_expert_norm", False)
    )


def replaced(model: nn.Module) -> str | None:
    """Return the name of a layer that `with_linears` put in the place of another, None without one."""
    kinds = (TransposedLinear, Experts)
    return next((name for name, module in model.named_modules() if isinstance(module, kinds)), None)


def multiplying_itself(model: nn.Module) -> str | None:
    """Return the name of a linear of a class that has a `forward` of its own (Falcon's), None without one."""
    every = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return next((name for name, module in every if type(module).forward is not nn.Linear.forward), None)


def read_shares(block: nn.Module, config: "PretrainedConfig") -> dict[nn.Linear, float]:
    """Return what share of the tokens each linear of a block's experts reads, on average."""
    every = [module for module in block.modules() if isinstance(module, Experts)]
    return {
        linear: config.num_experts_per_tok / len(experts)
        for experts in every
        for linear in experts.modules()
        if isinstance(linear, nn.Linear)
    }
