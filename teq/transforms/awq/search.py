"""AWQ's two searches: a ratio for each site, then bounds for the weights of each linear.

The formulas and constants are those of the official code (mit-han-lab/llm-awq, awq/quantize/auto_scale.py and
auto_clip.py). Everything is measured on the float model, and no search sees another's result; only the
bounds are those of the scaled weights.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from teq.device.memory import on_host
from teq.grid import Grid, fake_quant, in_equal_parts
from teq.models.arch import Arch, Site
from teq.models.fold import CLIP, Folding
from teq.stage import NothingDone
from teq.transforms.activations import Block, Hook, from_ones, reader, watched_blocks

SMALLEST = 1e-4  # of mean|x| ** ratio
SHRINKS = [1 - step / 20 for step in range(10)]  # of a group's largest weight, to find its bound
UNCLIPPED = ("q_", "k_", "query", "key", "qkv", "c_attn")  # clipping spoils query times key


@dataclass
class Seen:
    """What the search for one site needs: the calls of `module` (`name`), which contains its targets."""

    site: Site
    name: str
    module: nn.Module
    magnitudes: list[Tensor] = field(default_factory=list)  # mean|x| [width] of each sample
    calls: list[tuple[Any, ...]] = field(default_factory=list)  # args, keywords, output

    def note_input(self, _: nn.Module, args: tuple[Tensor, ...], *__: Any) -> None:
        """Hook of a linear that reads the site's output."""
        self.magnitudes.append(self.site.tied(args[0].abs().float().flatten(0, -2).mean(0)).mean(1))

    def note_call(self, _: nn.Module, *call: Any) -> None:
        """Hook of `module`."""
        self.calls.append(call)

    def error(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Return the mean squared change of the module's outputs under `weights` (by full name)."""
        inside = {f"{name}.weight".removeprefix(f"{self.name}."): w for name, w in weights.items()}
        lost = [
            (_first(functional_call(self.module, inside, args, kwargs)).float() - _first(output).float())
            .square()
            .mean()
            for args, kwargs, output in self.calls
        ]
        return torch.stack(lost).mean()


@dataclass
class Gram:
    """`sum over tokens of x^T x` of a linear's input, for each group of its columns alone."""

    spans: list[tuple[int, int]]
    blocks: list[Tensor] = field(default_factory=list)  # [group, group] each, fp32

    def note_input(self, _: nn.Module, args: tuple[Tensor, ...], *__: Any) -> None:
        """Hook of the linear."""
        flat = args[0].flatten(0, -2).float()
        parts = [flat[:, start:stop] for start, stop in self.spans]
        self.blocks = self.blocks or [x.new_zeros(x.shape[1], x.shape[1]) for x in parts]
        for block, x in zip(self.blocks, parts, strict=True):
            block.addmm_(x.T, x)


@torch.no_grad()
def search(
    model: nn.Module, arch: Arch, windows: Tensor, *, grid: Grid, ratios: int, clip: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return scales of every site, `start/<site>`, and with `clip` the bounds `clip/<linear>`.

    The info holds for each site the chosen ratio and the module's output error without scales and with them.
    Raises NothingDone when no site is better off with scales.
    """
    seen: dict[str, Seen] = {}
    grams: dict[str, Gram] = {}

    def watch(block: Block) -> list[tuple[nn.Module, Hook]]:
        seen.clear()
        grams.clear()
        hooks: list[tuple[nn.Module, Hook]] = []
        for site in block.sites:
            name = _around(site)
            seen[site.name] = Seen(site, name, model.get_submodule(name))
            hooks.append((reader(site), seen[site.name].note_input))
            hooks.append((seen[site.name].module, seen[site.name].note_call))
        if clip:
            for name, linear in block.linears.items():
                if not any(part in name.rpartition(".")[2] for part in UNCLIPPED):
                    grams[name] = Gram(grid.spans(linear.in_features))
                    hooks.append((linear, grams[name].note_input))
        return hooks

    scales: dict[str, Tensor] = {}
    bounds: dict[str, Tensor] = {}
    chosen: dict[str, float] = {}
    errors: dict[str, tuple[float, float]] = {}
    for block in watched_blocks(model, arch, windows, watch, "searching scales"):
        scales |= {
            site.name: torch.ones(site.width, device=site.source.weight.device) for site in block.sites
        }
        here = [site for site in block.sites if seen[site.name].calls]  # an expert may be without tokens
        # read back at once: every read waits for the device
        tried = torch.stack([search_site(seen[site.name], grid, ratios) for site in here]).tolist()
        for site, lost in zip(here, tried, strict=True):
            best = lost.index(min(lost))  # the first of equal ones
            chosen[site.name] = best / ratios
            errors[site.name] = (lost[0], lost[best])
            scales[site.name] = scale(seen[site.name].magnitudes, chosen[site.name])
        folding = Folding.of(block.sites, scales)
        for name, gram in grams.items():
            if not gram.blocks:
                continue
            weight = folding.weight(name, block.linears[name]).float()
            s = folding.columns.get(name, weight.new_ones(weight.shape[1]))
            bounds[CLIP + name] = search_bounds(weight, s, gram, grid)
    if ratios > 1 and not clip and not any(chosen.values()):
        raise NothingDone(
            "AWQ left every scale at 1: the result would be plain rounding under another name; "
            "raise awq.samples or awq.ratios"
        )
    return on_host(from_ones(scales) | bounds), {"sites": list(scales), "ratios": chosen, "errors": errors}


def scale(magnitudes: list[Tensor], ratio: float) -> Tensor:
    """Return `s = mean|x| ** ratio`, at least 1e-4, over sqrt(max s * min s), `[width]`."""
    s = torch.stack(magnitudes).mean(0).pow(ratio).clamp_(min=SMALLEST)
    return s / (s.max() * s.min()).sqrt()


def search_site(seen: Seen, grid: Grid, ratios: int) -> Tensor:
    """Return the output error of the module around the site for each exponent k / ratios, `[ratios]`.

    `FakeQuant(W diag(s)) diag(1 / s)` replaces W; the errors stay on the device.
    """
    found = []
    for k in range(ratios):
        s = seen.site.over_inputs(scale(seen.magnitudes, k / ratios))
        weights = {
            name: (fake_quant(target.weight * s, grid) / s).to(target.weight.dtype)
            for name, target in seen.site.targets.items()
        }
        found.append(seen.error(weights))
    return torch.stack(found)


def search_bounds(weight: Tensor, s: Tensor, gram: Gram, grid: Grid) -> Tensor:
    """Return the bounds `[out, parts]` of the parts of the scaled `weight [out, in]`.

    Per row and group, of `SHRINKS` times its largest weight the bound with the least squared error of the
    group's share of the output: the sum over tokens of `(x / s . (FakeQuant(clamp(w)) - w))^2`, which is
    `e G e^T` with e the weight error over `s [in]` and G the group's Gram matrix, so that all tokens count
    where the official code takes 512. Parts are the groups, or equal pieces where the last group is shorter.
    """
    chosen = []
    for (start, stop), block in zip(gram.spans, gram.blocks, strict=True):
        group = weight[:, start:stop]
        largest = group.abs().amax(1)  # [out]
        bounds = torch.stack([largest * shrink for shrink in SHRINKS])  # [step, out]
        errors = []
        for bound in bounds:
            clamped = group.clamp(-bound[:, None], bound[:, None])
            lost = (fake_quant(clamped, grid) - group) / s[start:stop]
            errors.append(((lost @ block) * lost).sum(1))
        chosen.append(bounds.gather(0, torch.stack(errors).argmin(0)[None])[0])
    return in_equal_parts(torch.stack(chosen, 1), grid, weight.shape[1])


def _around(site: Site) -> str:
    """Return the full name of the module that contains a site's targets: attention, feed-forward part.

    Where that contains the source too, as for OPT's fc1 and fc2, it is a single target by itself.
    """
    paths = zip(*(name.split(".")[:-1] for name in site.targets), strict=False)
    common = ".".join(parts[0] for parts in itertools.takewhile(lambda parts: len(set(parts)) == 1, paths))
    inside = site.name.startswith(f"{common}.")
    return next(iter(site.targets)) if inside and len(site.targets) == 1 else common


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
