"""Running a model's decoder blocks one at a time: the inputs of the first, and a block's output."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from teq.models.arch import Arch, blocks
from teq.models.lazy import present

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class _Caught(Exception):
    pass


def block_inputs(
    model: "nn.Module", arch: Arch, tokens: "Tensor", count: int | None = None
) -> tuple["Tensor", list[dict[str, Any]]]:
    """Return the first block's hidden `[batch, token, width]` for `tokens [batch, token]`, and keywords.

    The keywords are those of the first `count` blocks, by default all: sliding and full attention get masks
    and position embeddings of their own. Blocks of one kind share the tensors.
    """
    import torch

    hidden: list[Tensor] = []
    keywords: list[dict[str, Any]] = []
    watched = list(blocks(model, arch).values())[:count]

    def catch(_: "nn.Module", args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not hidden:
            hidden.append(args[0] if args else kwargs["hidden_states"])
        keywords.append({k: v for k, v in kwargs.items() if k != "hidden_states"})
        if len(keywords) == len(watched):
            raise _Caught

    with contextlib.ExitStack() as hooks, torch.no_grad(), one_sequence_a_row():
        hooks.enter_context(bypassed(watched))  # the keywords do not depend on what blocks compute
        for block in watched:
            hooks.enter_context(block.register_forward_pre_hook(catch, with_kwargs=True))
        with contextlib.suppress(_Caught):
            model(tokens, use_cache=False)
    return hidden[0], keywords


@contextlib.contextmanager
def bypassed(parts: "Iterable[nn.Module]", given: Any = None) -> Iterator[None]:
    """Context manager: all blocks but the first output what they read.

    The first computes, or outputs `given` where there is that. Some families' blocks output a tuple: all
    output the kind that the first does.
    """
    first, *others = parts
    computed, said = first.forward, [given]

    def forward(*args: Any, **kwargs: Any) -> Any:
        if given is None:
            said[0] = computed(*args, **kwargs)
        return said[0]

    def unchanged(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *said[0][1:]) if isinstance(said[0], tuple) else hidden

    with forwards({first: forward} | dict.fromkeys(others, unchanged)):
        yield


@contextlib.contextmanager
def forwards(instead: "Mapping[nn.Module, Callable[..., Any]]") -> Iterator[None]:
    """Context manager: each module computes by another function than its own."""
    kept = {module: vars(module).get("forward") for module in instead}
    try:
        for module, forward in instead.items():
            module.forward = forward
        yield
    finally:
        for module, forward in kept.items():
            vars(module).pop("forward")
            if forward is not None:
                module.forward = forward


def first_inputs(
    model: "nn.Module",
    arch: Arch,
    windows: "Tensor",
    places: "Callable[[int, Tensor], list[Tensor]]" = lambda count, like: [like] * count,
) -> tuple[list["Tensor"], list[dict[str, Any]]]:
    """Return the first block's inputs for `windows [sample, token]`, and each block's keywords.

    The inputs are `[1, token, width]` each, in what `places(count, like)` gives for them. The keywords are
    the same for all windows.
    """
    device = model.get_input_embeddings().weight.device
    one, keywords = block_inputs(model, arch, windows[:1].to(device))
    hidden = places(len(windows), one)
    for i, window in enumerate(windows):
        one, _ = block_inputs(model, arch, window[None].to(device), count=1)
        hidden[i] = one.to(hidden[i].device)
    return hidden, keywords


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


@contextlib.contextmanager
def no_casts_to_fp32() -> Iterator[None]:
    """Context manager: fp64 stays fp64 where Gemma's norms and routers' softmax would round to fp32."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Exact(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            exact = bool(args) and getattr(args[0], "dtype", None) == torch.float64
            if func is torch.Tensor.float and exact:
                return args[0]
            if exact and (kwargs or {}).get("dtype") == torch.float32:
                kwargs = kwargs | {"dtype": torch.float64}
            return func(*args, **(kwargs or {}))

    with Exact():
        yield


def run_block(block: "nn.Module", hidden: "Tensor", kwargs: dict[str, Any]) -> "Tensor":
    """Return a block's output hidden states `[batch, token, width]`; some families return more."""
    out = block(hidden, **kwargs)
    return out[0] if isinstance(out, tuple) else out


def pass_on(
    block: "nn.Module", hidden: list["Tensor"], kwargs: dict[str, Any], device: "torch.device"
) -> bool:
    """Replace each block input `[1, token, width]` by the block's output; it stays on its device.

    Returns whether the block puts out a tuple.
    """
    out: Any = None
    with present(block):
        for i, sample in enumerate(hidden):
            out = block(sample.to(device), **kwargs)
            hidden[i] = (out[0] if isinstance(out, tuple) else out).to(sample.device)
    return isinstance(out, tuple)
