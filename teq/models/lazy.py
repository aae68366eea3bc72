"""Models whose decoder blocks are read when they are used: no more than one is in memory at a time."""

import contextlib
import ctypes
import types
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from teq.models.arch import Arch, blocks
from teq.models.synthetic import architecture

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel

Read = Callable[[], Mapping[str, "Tensor"]]  # a checkpoint's tensors by the model's names


def lazy_model(
    dimensions: "PretrainedConfig", arch: Arch, dtype: str, read: Read, device: str
) -> "PreTrainedModel":
    """Return the causal LM on `device`, all of it but the parameters of its blocks.

    Those are on the meta device while nothing uses them: a forward pass and `present` call `read` for them.
    """
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    with init_empty_weights(include_buffers=False), no_init_weights():
        model = architecture(dimensions, dtype)
    model.tie_weights()
    defer(model, arch, read, device)
    inside = {id(p) for block in blocks(model, arch).values() for p in block.parameters()}
    tensors = read()
    for name, parameter in list(model.named_parameters()):
        if id(parameter) not in inside:
            _put(model, name, tensors, device)
    model.tie_weights()
    for buffer in model.buffers():  # those that no checkpoint holds
        buffer.data = buffer.data.to(device)
    return model


def defer(model: "nn.Module", arch: Arch, read: Read, device: str) -> None:
    """Let the parameters of the model's blocks be read by `read` when they are used, from now on."""
    for name, block in blocks(model, arch).items():
        block.lazy = _Lazy(name, block, read, device)
        block.forward = _Forward(block)


def is_lazy(model: "nn.Module") -> bool:
    """Return whether the model's blocks are read when they are used."""
    return any(vars(module).get("lazy") for module in model.modules())


def held_bytes(model: "nn.Module", arch: Arch) -> tuple[int, int]:
    """Return the bytes of a model that are there all the time, and those of its largest block if lazy."""
    everything = sum(t.nbytes for t in {*model.parameters(), *model.buffers()})
    lazy = [
        sum(p.nbytes for p in block.parameters())
        for block in blocks(model, arch).values()
        if vars(block).get("lazy")
    ]
    return everything - sum(lazy), max(lazy, default=0)


def change_blocks(model: "nn.Module", arch: Arch, change: Callable[[str], None]) -> None:
    """Call `change(name)` whenever a block has been read from now on; it may write to the parameters."""
    for block in blocks(model, arch).values():
        block.lazy.change = change


@contextlib.contextmanager
def present(block: "nn.Module") -> Iterator[None]:
    """Context manager: the parameters of a block are in memory; what is written to them is lost at its end.

    Those of a block that is not lazy are there anyway.
    """
    lazy = vars(block).get("lazy")
    with contextlib.nullcontext() if lazy is None else lazy.reading():
        yield


def leave(block: "nn.Module", name: str) -> None:
    """Read the parameter of a full name no more where the block is lazy: it stays what it is put to."""
    if (lazy := vars(block).get("lazy")) is not None:
        lazy.empty.pop(name.removeprefix(f"{lazy.name}."), None)


class _Forward:
    """The forward pass of a lazy block; a copy of the block has the class's own, on copied parameters."""

    def __init__(self, block: "nn.Module") -> None:
        self.block = block

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with present(self.block):
            return type(self.block).forward(self.block, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        return types.MethodType(type(self.block).forward, memo[id(self.block)])


class _Lazy:
    """The parameters of a block, which are read when they are used, and dropped again."""

    def __init__(self, name: str, block: "nn.Module", read: Read, device: str) -> None:
        from torch import nn

        self.name, self.block, self.read, self.device = name, block, read, device
        self.change: Callable[[str], None] = lambda _: None
        self.empty = {
            key: nn.Parameter(parameter.to("meta"), requires_grad=False)
            for key, parameter in block.named_parameters()
        }
        self.users = 0
        self._drop()

    def __deepcopy__(self, _: dict[int, Any]) -> None:
        """Return None: a copy of the block is not lazy."""

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Context manager: the parameters are in memory."""
        self.users += 1
        try:
            if self.users == 1:
                tensors = self.read()
                for key in self.empty:
                    _put(self.block, key, tensors, self.device, f"{self.name}.")
                self.change(self.name)
            yield
        finally:
            self.users -= 1
            if not self.users:
                self._drop()
                _release_freed()

    def _drop(self) -> None:
        for key, parameter in self.empty.items():
            _leaf(self.block, key)._parameters[key.rpartition(".")[2]] = parameter


def _release_freed() -> None:
    """Hand freed memory back to the system: glibc would keep more of it than a block takes."""
    with contextlib.suppress(OSError, AttributeError):  # another C library has no such function
        ctypes.CDLL(None).malloc_trim(0)


def _leaf(module: "nn.Module", key: str) -> "nn.Module":
    return module.get_submodule(key.rpartition(".")[0])


def _put(
    module: "nn.Module", key: str, tensors: Mapping[str, "Tensor"], device: str, prefix: str = ""
) -> None:
    """Replace a parameter by the checkpoint's tensor of its name."""
    from torch import nn

    from teq.models.layers import TransposedLinear

    leaf, name = _leaf(module, key), key.rpartition(".")[2]
    tensor = tensors[prefix + key].to(device)
    if isinstance(leaf, TransposedLinear) and name == "weight":
        tensor = tensor.T.contiguous()
    leaf._parameters[name] = nn.Parameter(tensor, requires_grad=False)
