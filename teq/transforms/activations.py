"""Float activations on calibration text: what blocks and sites read in order, what the model ends with."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from teq.console import track
from teq.device import waiting
from teq.device.offload import saving
from teq.models.arch import Arch, Site, blocks, linears, sites
from teq.models.blocks import first_inputs, pass_on
from teq.models.fold import check_equivalence
from teq.models.lazy import present
from teq.models.loss import last_hidden

Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]  # module, args, keywords, output


@dataclass(frozen=True)
class Block:
    """A decoder block with its sites and all its linears by full name."""

    name: str
    module: nn.Module
    sites: list[Site]
    linears: dict[str, nn.Linear]


@torch.no_grad()
def watched_blocks(
    model: nn.Module,
    arch: Arch,
    windows: Tensor,
    watch: Callable[[Block], list[tuple[nn.Module, Hook]]],
    what: str,
) -> Iterator[Block]:
    """Yield each block of the float model once it has run on all `windows [sample, token]`.

    While it runs, one sample at a time, the hooks of `watch(block)` see the calls of their modules; `what`
    names the work to the user. Raises UserError where folding a site would change the function.
    """
    check_equivalence(model, arch)
    found = sites(model, arch)
    device = model.get_input_embeddings().weight.device
    hidden, keywords = first_inputs(model, arch, windows, functools.partial(waiting.places, device))
    for index, (name, module) in enumerate(track(blocks(model, arch).items(), what)):
        here = [site for site in found if site.block == index]
        block = Block(name, module, here, linears(name, module))
        with present(module):
            with contextlib.ExitStack() as hooks:
                for at, hook in watch(block):
                    hooks.enter_context(at.register_forward_hook(hook, with_kwargs=True))
                pass_on(module, hidden, keywords[index], device)
            yield block


@torch.no_grad()
def outputs(
    model: nn.Module, arch: Arch, windows: Tensor, batch: int, strategy: str, device: torch.device
) -> Tensor:
    """Return the model's last hidden states `[window, token, width]` in host memory or in a file.

    With the frozen output embeddings they are the exact distribution of every token.
    """
    head = model.get_output_embeddings().weight
    found = waiting.room((*windows.shape, head.shape[1]), head.dtype)
    with saving(blocks(model, arch).values(), strategy, device):
        for part, place in zip(windows.split(batch), found.split(batch), strict=True):
            place.copy_(last_hidden(model, part.to(device)))
    return found


def reader(site: Site) -> nn.Module:
    """Return a module whose input is the site's: its first target, or the router that sees all tokens."""
    return next(iter((site.kept or site.targets).values()))


def from_ones(scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the scales by site, and the ones that they started from as `start/<site>`."""
    return {**scales, **{f"start/{name}": torch.ones_like(s) for name, s in scales.items()}}
