"""Training losses, made from the last hidden states a few tokens at a time."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from teq.models.blocks import one_sequence_a_row
from teq.models.head import Head

CHUNK = 128  # tokens whose logits exist at once; fewer make the matrix products thin


class _Chunked(torch.autograd.Function):
    """A loss whose forward pass saves the gradient to its first argument."""

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient to `hidden`; `scale` is that of the loss, a number."""
        (gradient,) = ctx.saved_tensors
        return gradient * scale.to(gradient.dtype), None, None


class ChunkedCrossEntropy(_Chunked):
    """Mean cross-entropy of a head's logits of `hidden` against `targets`, without the whole logits.

    The gradient to `hidden` is made in the forward pass, chunk by chunk, while the chunk's logits exist: the
    head's `back(softmax - one_hot) / tokens`. The head itself is frozen.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
        """Return the loss in fp32 of hidden `[token, width]` and targets `[token]`."""
        gradient = torch.empty_like(hidden)
        total = torch.zeros((), device=hidden.device)
        for part, target, slot in zip(
            hidden.split(CHUNK), targets.split(CHUNK), gradient.split(CHUNK), strict=True
        ):
            logs, slope = head.log_probabilities(part)  # [chunk, vocab]
            total -= logs.gather(1, target[:, None]).sum()
            logs.exp_().scatter_add_(1, target[:, None], logs.new_full((len(target), 1), -1.0))
            slot.copy_(head.back(logs.mul_(1 / len(targets)), slope))
        ctx.save_for_backward(gradient)
        return total / len(targets)


class ChunkedDivergence(_Chunked):
    """Mean divergence KL(p || q) over the vocabulary, p of a head's logits of `reference`, q of `hidden`.

    The gradient to `hidden` is made in the forward pass, chunk by chunk: the head's `back(q - p) / tokens`.
    The head, which both share, is frozen.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, reference: Tensor) -> Tensor:
        """Return the loss in fp32 of hidden and reference `[token, width]`."""
        gradient = torch.empty_like(hidden)
        total = torch.zeros((), device=hidden.device)
        for part, exact, slot in zip(
            hidden.split(CHUNK), reference.split(CHUNK), gradient.split(CHUNK), strict=True
        ):
            ours, slope = head.log_probabilities(part)  # [chunk, vocab]
            theirs = head.logits(exact).float().log_softmax(-1)
            p = theirs.exp()
            total += theirs.sub_(ours).mul_(p).sum()
            slot.copy_(head.back(ours.exp_().sub_(p).mul_(1 / len(hidden)), slope))
        ctx.save_for_backward(gradient)
        return total / len(hidden)


def last_hidden(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return what the output embeddings read, `[batch, token, width]`, for `tokens [batch, token]`."""
    with one_sequence_a_row():
        return model.base_model(tokens, use_cache=False).last_hidden_state


def causal_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the mean next-token cross-entropy of `tokens [batch, token]` in fp32.

    It is what `model(tokens, labels=tokens)` computes.
    """
    hidden = last_hidden(model, tokens)[:, :-1].flatten(0, 1)
    return ChunkedCrossEntropy.apply(hidden, Head.of(model), tokens[:, 1:].flatten())


def divergence_loss(model: nn.Module, tokens: Tensor, reference: Tensor) -> Tensor:
    """Return the mean KL(reference || model) of the next token's distribution in fp32.

    `reference [batch, token, width]` are the `last_hidden` of another model with the same output embeddings.
    """
    hidden = last_hidden(model, tokens).flatten(0, 1)
    return ChunkedDivergence.apply(hidden, Head.of(model), reference.flatten(0, 1))


def training_loss(model: nn.Module, tokens: Tensor, reference: Tensor | None) -> Tensor:
    """Return the `causal_loss` of `tokens [batch, token]`, or with a reference the `divergence_loss` to it.

    Both are moved to the device of the model's embeddings.
    """
    device = model.get_input_embeddings().weight.device
    if reference is None:
        return causal_loss(model, tokens.to(device))
    return divergence_loss(model, tokens.to(device), reference.to(device))


def backward(loss: Tensor, parameters: Iterable[nn.Parameter]) -> None:
    """Run the backward pass of a loss.

    Parameters that the loss does not reach (of an expert without tokens) get a gradient of zero, so that
    Adam holds moments of all, which resuming needs.
    """
    loss.backward()
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
