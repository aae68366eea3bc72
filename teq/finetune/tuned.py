"""A quantized model whose scales and norms are trained while its codes and zeros stay."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from teq.device.offload import saving
from teq.finetune.linear import DequantizedLinear
from teq.grid import Grid, storable
from teq.models.arch import Arch, blocks, by_block, linears
from teq.models.blocks import forwards
from teq.models.lazy import leave, present
from teq.models.loss import backward, training_loss
from teq.quantizers.quantized import Quantized

BETAS = (0.9, 0.95)
PARAM = "param/"  # before a parameter's name in stored tensors


class Part:
    """Numbers that are trained: `start + unit * free`, rounded as they are stored, straight-through."""

    def __init__(self, start: Tensor, unit: Tensor, rounded: Callable[[Tensor], Tensor]) -> None:
        self.start, self.unit, self.rounded = start, unit, rounded
        self.free = nn.Parameter(torch.zeros(start.numel(), device=start.device))

    def value(self) -> Tensor:
        """Return the numbers as a function of what is trained."""
        exact = self.start + self.unit * self.free.view_as(self.start)
        rounded = self.rounded(exact.detach())
        return rounded + (exact - exact.detach()).to(rounded.dtype)  # to the bit what is stored


class Tuned:
    """A quantized model whose scales, and norms where wanted, are trained; the model is used up.

    `params` are other parameters that the quantizer changed, by full name. `read(name, linear)` gives a
    linear on the grid: its codes take the place of its weight, on their own device, everything else is on
    `device`. Where the codes are packed, the zeros stay where they are too.
    """

    def __init__(
        self,
        model: nn.Module,
        arch: Arch,
        params: Mapping[str, Tensor],
        read: Callable[[str, nn.Linear], Quantized],
        *,
        grid: Grid,
        norms: bool,
        device: torch.device,
    ) -> None:
        self.model, self.arch, self.grid, self.device = model, arch, grid, device
        self.parts: dict[str, Part] = {}
        self.norms: dict[str, tuple[nn.Module, str]] = {}
        self.frozen: dict[nn.Linear, tuple[str, Tensor, Tensor | None]] = {}  # scale's name, zero, g_idx
        trained = normalizations(model, arch) if norms else {}
        changed, released = by_block(params, model, arch), by_block(trained, model, arch)
        parts: dict[str, dict[str, Part]] = {}  # of each norm
        for owner, block in {**blocks(model, arch), "": model}.items():
            for name, linear in linears(owner, block).items() if owner else ():
                q = read(name, linear)
                leave(block, f"{name}.weight")
                linear.weight = nn.Parameter(q.codes, requires_grad=False)
                scale, zero = q.scale.to(device), q.zero if q.codes.ndim == 1 else q.zero.to(device)
                g_idx = None if q.g_idx is None else q.g_idx.to(device).long()
                self.frozen[linear] = f"{name}/scale", zero, g_idx
                self.parts[f"{name}/scale"] = Part(scale, scale, self._stored_scale)
            with present(block):
                for name in changed[owner]:
                    model.get_parameter(name).data.copy_(params[name])
                    leave(block, name)
                for name in released[owner]:
                    parts[name] = self._release(name, trained[name], block)
        for name in trained:
            self.parts |= parts[name]
        self.free = {name: part.free for name, part in self.parts.items()}
        self.optimizer = torch.optim.Adam(self.free.values(), betas=BETAS, weight_decay=0)
        self.current: dict[str, Tensor] = {}  # the numbers that the step in progress computes with

    def _stored_scale(self, scale: Tensor) -> Tensor:
        return storable(scale.clamp(min=torch.finfo(scale.dtype).tiny), self.grid)

    def _release(self, name: str, module: nn.Module, block: nn.Module) -> dict[str, Part]:
        """Train a norm's weight relative to itself, and its bias in units of the weight."""
        parts = {}
        exact = torch.promote_types(module.weight.dtype, torch.float32)
        unit = module.weight.detach().to(self.device, exact)
        for key, parameter in list(module.named_parameters(recurse=False)):
            start = parameter.detach().to(self.device, exact)
            rounded = functools.partial(Tensor.to, dtype=parameter.dtype)
            parts[f"{PARAM}{name}.{key}"] = Part(start, unit if key == "weight" else unit.abs(), rounded)
            self.norms[f"{PARAM}{name}.{key}"] = module, key
            # no parameter any more: it may be computed from what is trained, and offload does not copy it
            leave(block, f"{name}.{key}")
            delattr(module, key)
            setattr(module, key, parameter.detach())
        return parts

    def refresh(self) -> None:
        """Compute with the present numbers from now on."""
        self.current.update({name: part.value() for name, part in self.parts.items()})
        for name, (module, key) in self.norms.items():
            setattr(module, key, self.current[name])

    @contextlib.contextmanager
    def running(self, strategy: str) -> Iterator[None]:
        """Context manager: linears compute from codes; `strategy` as in `teq.device.offload.saving`."""
        instead = {
            linear: functools.partial(self._output, linear, *frozen) for linear, frozen in self.frozen.items()
        }
        every = blocks(self.model, self.arch).values()
        with forwards(instead), saving(every, strategy, self.device):
            yield

    def _output(self, linear: nn.Linear, scale: str, zero: Tensor, g_idx: Tensor | None, x: Tensor) -> Tensor:
        codes, now = linear.weight, self.current[scale]
        return DequantizedLinear.apply(x, now, codes, zero, g_idx, linear.bias, self.grid)

    def loss(self, tokens: Tensor, reference: Tensor | None) -> Tensor:
        """Return the loss of `tokens [batch, token]`: the model's own, or the divergence to a reference."""
        return training_loss(self.model, tokens, reference)

    def move(self, loss: Tensor, rate: float) -> None:
        """Run the backward pass and Adam's update."""
        backward(loss, self.free.values())
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """Return what is trained as it is stored, in host memory."""
        return {name: part.value().cpu() for name, part in self.parts.items()}


def normalizations(model: nn.Module, arch: Arch) -> dict[str, nn.Module]:
    """Return the normalization layers of the blocks and the one after them, by full name."""
    inside = tuple(f"{name}." for name in blocks(model, arch))
    found = {name: m for name, m in model.named_modules() if getattr(m, "weight", None) is not None}
    return {
        name: module
        for name, module in found.items()
        # a norm of the embeddings, such as BLOOM's, comes before the blocks
        if module.weight.ndim == 1 and (name.startswith(inside) or "embed" not in name)
    }
